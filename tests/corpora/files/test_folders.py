"""Folders of several files, and datasets on disk and in memory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.corpora import RECORDS, SPLITS, blocks_of, decoded, in_lines, joined, the_tokenizer
from support.disk import hide

from cascade.core.errors import CorpusError
from cascade.corpora.blocks import load_blocks


def test_files_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "Rows.jsonl"
    (folder / "b").mkdir(parents=True)
    in_lines(folder / "b" / "part-0.jsonl", RECORDS[6:])
    (folder / "a2.json").write_text(json.dumps(RECORDS[3:6]))
    with gzip.open(folder / "a1.ndjson.gz", "wt") as file:
        file.write("".join(json.dumps(record) + "\n" for record in RECORDS[:3]))
    for name in ("README.md", "LICENSE", "_SUCCESS", ".part-0.jsonl.crc"):
        (folder / name).write_text("no data")
    blocks = blocks_of(folder, seq_len=103)
    assert decoded(blocks) == joined(RECORDS)
    assert (blocks.name, blocks.records) == ("rows", 8)


def test_text_files_of_a_folder_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.txt").write_text("abc")
    blocks = blocks_of(tmp_path, seq_len=11)
    assert (decoded(blocks), blocks.records) == ("one~two\nabc", 2)


@pytest.mark.parametrize("names", ["{}-00000-of-00001.jsonl", "{}/rows.jsonl", "my.{}.v2.jsonl"])
def test_files_that_are_named_after_splits(names: str, tmp_path: Path) -> None:
    for split, records in SPLITS.items():
        path = tmp_path / names.format(split)
        path.parent.mkdir(exist_ok=True)
        in_lines(path, records)
    for split, records in ({None: SPLITS["train"]} | SPLITS).items():
        text = joined(records)
        assert decoded(blocks_of(tmp_path, split=split, seq_len=len(text))) == text
    with pytest.raises(CorpusError, match="expected --split among test, train, got validation"):
        blocks_of(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (["a.jsonl", "b.csv"], None, "expected files of one kind in a folder, got a.jsonl and b."),
        (["a.jsonl", "b.pdf"], None, "files in a folder, got b.pdf; name one file, or move other"),
        (["a.jsonl"], "test", "no file is named after a split; leave out --split"),
        (["dev.jsonl", "eval.jsonl"], None, "--split among test, validation, got none"),
        ([], None, "files in a folder, got none"),
    ],
)
def test_a_folder_of_other_files_is_refused(
    names: list[str], split: str | None, message: str, tmp_path: Path
) -> None:
    for name in names:
        in_lines(tmp_path / name, RECORDS)
    with pytest.raises(CorpusError) as caught:
        blocks_of(tmp_path, split=split)
    assert message in str(caught.value)


def test_saved_datasets_are_read(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list(RECORDS)
    one.save_to_disk(tmp_path / "one")
    assert decoded(blocks_of(tmp_path / "one", seq_len=103)) == joined(RECORDS)
    both = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in SPLITS.items()})
    both.save_to_disk(tmp_path / "both")
    test = blocks_of(tmp_path / "both", split="test", seq_len=38)
    assert (decoded(test), test.name) == (joined(SPLITS["test"])[:38], "both-test")
    datasets.DatasetDict(test=both["test"]).save_to_disk(tmp_path / "single")
    assert np.array_equal(blocks_of(tmp_path / "single", seq_len=38).ids, test.ids)
    for name, split, message in (
        ("both", None, "expected --split among test, train, got none"),
        ("both", "dev", "expected --split among test, train, got dev"),
        ("one", "test", "holds one dataset without splits; leave out --split"),
    ):
        with pytest.raises(CorpusError, match=message):
            blocks_of(tmp_path / name, split=split)
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"one is not a readable dataset \(.*\); save it again"):
        blocks_of(tmp_path / "one")


def in_memory() -> dict[str, Any]:
    import datasets
    import pandas
    import pyarrow

    dataset = datasets.Dataset.from_list(RECORDS)
    return {
        "dataset": dataset,
        "iterable dataset": dataset.to_iterable_dataset(),
        "data frame": pandas.DataFrame(RECORDS),
        "series": pandas.DataFrame(RECORDS)["text"],
        "Arrow table": pyarrow.Table.from_pylist(RECORDS),
        "generator": (record for record in RECORDS),
        "texts": [record["text"] for record in RECORDS],
    }


@pytest.mark.parametrize("kind", in_memory())
def test_data_in_memory_gives_the_same_text(kind: str, tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", RECORDS)
    for settings in ({"seed": None}, {"seed": 3, "num_samples": 4}):
        blocks = load_blocks(in_memory()[kind], the_tokenizer(), seq_len=25, **settings)
        assert np.array_equal(blocks.ids, blocks_of(path, seq_len=25, **settings).ids)


def test_a_folder_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "more/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Some text.\n")
    hide(tmp_path / "more", monkeypatch)
    with pytest.raises(CorpusError, match=r"cannot list .*more: Permission denied; change its"):
        load_blocks(str(tmp_path), the_tokenizer(), seq_len=8)

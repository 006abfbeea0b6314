"""Every source gives its records or a one-line error that says what to do."""

from __future__ import annotations

import collections
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from support.corpora import (
    RECORDS,
    SPLITS,
    blocks_of,
    decoded,
    embedded_records,
    in_json,
    in_lines,
    in_parquet,
    in_vocabulary,
    joined,
    outcome,
    the_tokenizer,
)
from support.tiny_models import tiny_tokenizer

from cascade.core.errors import CorpusError
from cascade.corpora.blocks import load_blocks
from cascade.corpora.files.kinds import ENDINGS
from cascade.corpora.forms import alpaca_text, record_text

if TYPE_CHECKING:
    from cascade import DecoderStack

WRITERS: dict[str, Callable[[Path, Sequence[Any]], Path]] = {
    "My Corpus.jsonl": in_lines,
    "My Corpus.json": in_json,
    "My Corpus.parquet": in_parquet,
    "My Corpus.JSONL": in_lines,
}


@pytest.mark.parametrize("name", WRITERS)
def test_all_file_formats_give_the_same_blocks(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, RECORDS)
    blocks = blocks_of(path, seq_len=103)
    assert decoded(blocks) == joined(RECORDS)
    assert (blocks.source, blocks.name, blocks.records) == (str(path), "my corpus", 8)


@pytest.mark.parametrize("name", WRITERS)
def test_all_file_formats_support_alpaca_records_and_a_text_column(
    tmp_path: Path, name: str
) -> None:
    record = {"instruction": "Add.", "input": "1 + 1", "output": "2", "note": "as noted"}
    path = WRITERS[name](tmp_path / name, [record])
    text = in_vocabulary(alpaca_text("Add.", "1 + 1", "2"))
    assert decoded(blocks_of(path, seq_len=len(text))) == text
    assert decoded(blocks_of(path, seq_len=8, text_column="note")) == "as noted"


def test_text_file_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("# one two three\n", encoding="utf-8")
    blocks = blocks_of(path, seq_len=5)
    assert blocks.records == 1
    assert blocks.ids.ravel().tolist() == the_tokenizer()("# one two three")["input_ids"]


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"text": "abcd"}\r\n  \n\n{"text": \n', encoding="utf-8")
    assert blocks_of(path, num_samples=1).records == 1
    with pytest.raises(CorpusError, match=r"x\.jsonl, line 5: not JSON \(.*\); fix it"):
        blocks_of(path)


def test_unicode_line_separators_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "ab\u2028cd\u0085ef"}\n', encoding="utf-8")
    assert blocks_of(path, seq_len=8).records == 1


def test_path_with_tilde_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    in_lines(tmp_path / "mine.jsonl", RECORDS)
    assert blocks_of("~/mine.jsonl").name == "mine"


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "x.txt"])
def test_missing_file_is_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorpusError, match=f"no corpus file .*{name}; expected a path to an exist"):
        blocks_of(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(CorpusError, match="files in a folder, got none"):
        blocks_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", "is empty; expected at least one record"),
        ("x.jsonl", b"\n \n", "is empty; expected at least one record"),
        ("x.json", b"[]", "is empty; expected at least one record"),
        ("x.txt", b"", "is empty; expected at least one record"),
        ("x.txt", b" \n\t\n", "is empty; expected at least one record"),
        ("x.jsonl", b'{"text": ""}\n', "gives 0 tokens, expected at least one block of 4"),
        ("x.jsonl", b'{"text": "abcd"}\n{"text"\n', "line 2: not JSON"),
        ("x.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("x.jsonl", b"[1, 2]\n", "record 1: expected an object, got int"),
        ("x.jsonl", b"[1]\n\n[2]\n", "record 1: expected an object, got list"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "record 1: column 'text' is not valid Unicode"),
        ("x.jsonl", b'{"text": "abc\xff"}\n', "expected UTF-8 text"),
        ("x.json", b"[1,", "record 1: expected an object, got int"),
        ("x.json", b'[{"text": "abcd"},\n', "x.json, line 2: not JSON"),
        ("x.json", b'[{"text": "abcd"},\n{"text": "efgh"}]\n]', "x.json, line 3: not JSON (more"),
        ("x.json", b'[{"text": "abcd"}\n{"text": "efgh"}]', "line 2: not JSON (expected ','"),
        ("x.json", b"", "x.json is empty"),
        ("x.json", b"[" * 100_000, "x.json, line 1: not JSON"),
        ("x.json", b"[3]", "record 1: expected an object, got int"),
        ("x.txt", b"abc\xff", "expected UTF-8 text"),
        ("x.parquet", b"", "is not a readable Parquet file"),
        ("x.parquet", b"PAR1 and no more", "is not a readable Parquet file"),
        (
            "noname",
            b"abcdef",
            "expected a .jsonl, .json, .ndjson, .csv, .tsv, .txt, .parquet or .arrow",
        ),
    ],
)
def test_file_without_records_is_rejected(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        blocks_of(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_parquet_file_is_rejected(tmp_path: Path) -> None:
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "x.parquet"
    )
    with pytest.raises(CorpusError, match="is empty; expected at least one record"):
        blocks_of(tmp_path / "x.parquet")


@functools.cache
def a_parquet_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return in_parquet(Path(folder) / "x.parquet", RECORDS * 20).read_bytes()


@given(st.data())
def test_damaged_parquet_file_gives_records_or_a_corpus_error(data: st.DataObject) -> None:
    damaged = bytearray(a_parquet_file())
    for _ in range(3):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    del damaged[data.draw(st.integers(len(damaged) // 2, len(damaged))) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.parquet"
        path.write_bytes(damaged)
        blocks = outcome(blocks_of, path)
    if isinstance(blocks, CorpusError):
        assert "\n" not in str(blocks)
    else:
        assert blocks.records > 0


@given(st.binary())
def test_random_bytes_in_a_jsonl_file_give_a_corpus_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=r"not JSON|UTF-8|is empty|expected an object|column"):
            blocks_of(path)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep `datasets` offline, with its own cache folder."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub_dataset(tmp_path: Path, offline: None) -> Path:
    """Return a folder like a hub dataset with two configurations and two splits."""
    folder = tmp_path / "Hub Dataset"
    for config, records in (("plain", SPLITS), ("loud", {"train": [{"body": "LOUD AND CLEAR"}]})):
        (folder / config).mkdir(parents=True)
        for split, rows in records.items():
            in_lines(folder / config / f"{split}.jsonl", rows)
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: plain\n  default: true\n  data_files:\n"
        "  - {split: train, path: plain/train.jsonl}\n  - {split: test, path: plain/test.jsonl}\n"
        "- config_name: loud\n  data_files:\n  - {split: train, path: loud/train.jsonl}\n---\n"
    )
    return folder


def test_dataset_reads_its_train_split_by_default(hub_dataset: Path) -> None:
    blocks = blocks_of(hub_dataset, seq_len=64)
    assert decoded(blocks) == joined(SPLITS["train"])
    assert (blocks.name, blocks.records) == ("hub dataset", 5)
    blocks = blocks_of(hub_dataset, split="test", seq_len=38)
    assert decoded(blocks) == joined(SPLITS["test"])
    assert blocks.name == "hub dataset-test"


def test_dataset_reads_the_named_configuration_and_column(hub_dataset: Path) -> None:
    blocks = blocks_of(hub_dataset, config="loud", text_column="body", seq_len=14)
    assert decoded(blocks) == "LOUD AND CLEAR"
    assert blocks.name == "hub dataset-loud"


def test_dataset_is_sampled_like_a_file(hub_dataset: Path, tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", SPLITS["train"])
    for settings in ({"seed": 3}, {"seed": 3, "num_samples": 2}, {"max_tokens": 20}):
        expected = blocks_of(path, **settings)
        assert blocks_of(hub_dataset, **settings).fingerprint() == expected.fingerprint()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "validation"}, 'Unknown split "validation". Should be one of'),
        ({"config": "quiet"}, "BuilderConfig 'quiet' not found"),
        (
            {"config": "loud"},
            "record 1: expected the column 'text' or instruction and output, messages",
        ),
        ({"text_column": "body"}, "record 1: expected the column 'body', got text"),
    ],
)
def test_missing_split_configuration_or_column_is_rejected(
    hub_dataset: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError) as caught:
        blocks_of(hub_dataset, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nobody/no-such-corpus", "no such corpus"])
def test_error_for_an_unknown_dataset_lists_the_valid_sources(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError) as caught:
        blocks_of(source)
    assert str(caught.value).startswith(f"no corpus {source}: ")
    assert f"expected embedded, a {ENDINGS} file, a folder of such" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_corpus_names_contain_no_path(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine/below")
    in_lines(tmp_path / "mine/x.jsonl", RECORDS)
    assert blocks_of("../x.jsonl").name == "x"
    assert blocks_of("..").name == "mine"


def test_name_of_a_hub_dataset_is_a_valid_file_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        calls.append((args, kwargs))
        return RECORDS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    blocks = blocks_of("Salesforce/wikitext", config="wikitext-2-raw-v1", split="validation")
    assert calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "validation"})]
    assert blocks.name == "salesforce--wikitext-wikitext-2-raw-v1-validation"
    assert blocks_of("tatsu-lab/alpaca").name == "tatsu-lab--alpaca"
    assert calls[1] == (("tatsu-lab/alpaca", None), {"split": "train"})


def test_streamed_dataset_gives_the_same_text(hub_dataset: Path) -> None:
    for settings in ({}, {"split": "test"}, {"config": "loud", "text_column": "body"}):
        fetched = blocks_of(hub_dataset, **settings)
        assert (
            blocks_of(hub_dataset, stream=True, **settings).fingerprint() == fetched.fingerprint()
        )
    some = blocks_of(hub_dataset, stream=True, num_samples=2)
    assert decoded(some) == joined(SPLITS["train"][:2])[: some.tokens]


def test_stream_reads_only_the_records_that_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    read = []

    def endless() -> Any:
        for number in range(1000):
            read.append(number)
            yield {"text": f"record {number}"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: endless())
    assert blocks_of("allenai/c4", config="en", stream=True, num_samples=3).records == 3
    assert read == [0, 1, 2]


def test_interrupted_stream_gives_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def breaking() -> Any:
        yield {"text": "the first record"}
        raise ConnectionError("the network went away\nTraceback")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: breaking())
    with pytest.raises(CorpusError) as caught:
        blocks_of("allenai/c4", config="en", stream=True)
    assert str(caught.value).startswith("no corpus allenai/c4: the network went away; expected")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "validation"}, "validation"),
        ({"config": "quiet"}, "BuilderConfig 'quiet' not found"),
        ({"text_column": "body"}, "record 1: expected the column 'body', got text"),
        ({"seed": 0}, "expected no seed for a stream"),
    ],
)
def test_stream_rejects_missing_names_and_a_seed(
    hub_dataset: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError) as caught:
        blocks_of(hub_dataset, stream=True, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_embedded_corpus_has_500_distinct_records() -> None:
    records = embedded_records()
    assert len(records) == 500
    assert len({record["id"] for record in records}) == 500
    assert len({(record["instruction"], record["input"]) for record in records}) == 500


def test_embedded_records_are_complete() -> None:
    for record in embedded_records():
        assert set(record) == {
            "id",
            "split",
            "category",
            "output_by",
            "instruction",
            "input",
            "output",
        }
        for name in ("id", "category", "output_by", "instruction", "output"):
            assert record[name].strip(), record["id"]
        assert record["input"] == "" or record["input"].strip(), record["id"]


def test_third_of_the_embedded_records_has_an_input() -> None:
    assert sum(bool(record["input"]) for record in embedded_records()) >= 500 / 3


def test_sizes_of_the_embedded_splits() -> None:
    sizes = collections.Counter(record["split"] for record in embedded_records())
    assert sizes == {"train": 400, "held-out": 100}
    held_out = collections.Counter(
        record["category"] for record in embedded_records() if record["split"] == "held-out"
    )
    everything = collections.Counter(record["category"] for record in embedded_records())
    assert held_out == {category: size // 5 for category, size in everything.items()}


def test_embedded_splits_together_are_the_whole_corpus() -> None:
    parts = {
        split: blocks_of("embedded", split=split, num_samples=None, seq_len=128)
        for split in ("train", "held-out", None)
    }
    assert {split: part.records for split, part in parts.items()} == {
        "train": 400,
        "held-out": 100,
        None: 500,
    }
    names = {split: part.name for split, part in parts.items()}
    assert names == {"train": "embedded-train", "held-out": "embedded-held-out", None: "embedded"}
    held_out = next(record for record in embedded_records() if record["split"] == "held-out")
    text = in_vocabulary(record_text(held_out, source="", number=0))
    assert decoded(parts["held-out"])[:60] == text[:60]


def test_embedded_corpus_rejects_unknown_split_and_configuration() -> None:
    with pytest.raises(CorpusError, match="expected --split among held-out, train, got test"):
        blocks_of("embedded", split="test")
    with pytest.raises(CorpusError, match="--config belongs to hub datasets, got it for embedded"):
        blocks_of("embedded", config="small")


def test_embedded_corpus_has_enough_characters() -> None:
    # 43,008 tokens of 4.5 characters, more than English text has with SmolLM2's tokenizer.
    texts = [record_text(record, source="", number=0) for record in embedded_records()]
    assert sum(map(len, texts)) >= 43_008 * 4.5


@pytest.mark.saturation
def test_embedded_corpus_has_as_many_tokens_as_the_seed_study(
    reference_model: DecoderStack,
) -> None:
    blocks = load_blocks("embedded", reference_model.tokenizer)
    assert blocks.tokens >= 43_008
    assert blocks.ids.shape == (blocks.tokens // 128, 128)
    assert blocks.records == 500


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_byte_order_mark_is_ignored(tmp_path: Path, name: str) -> None:
    text = '{"text": "some words to read"}' if name == "a.jsonl" else "some words to read"
    plain, marked = tmp_path / "plain" / name, tmp_path / "marked" / name
    for path, encoding in ((plain, "utf-8"), (marked, "utf-8-sig")):
        path.parent.mkdir()
        path.write_text(text, encoding=encoding)
    blocks = [load_blocks(str(path), tiny_tokenizer(), seq_len=4) for path in (plain, marked)]
    assert np.array_equal(blocks[0].ids, blocks[1].ids)


@pytest.mark.parametrize("source", ["~nobody-of-that-name/x.txt", "x" * 300 + ".txt"])
def test_invalid_path_is_a_missing_corpus(source: str) -> None:
    with pytest.raises(CorpusError, match="no corpus file"):
        load_blocks(source, tiny_tokenizer())

"""Corpora: every source becomes the blocks it should, or a line that says what to do."""

from __future__ import annotations

import collections
import functools
import json
import re
import string
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from support.tiny_models import tiny_tokenizer

from cascade.core.errors import CorpusError
from cascade.core.schema import UNSET, to_plain
from cascade.corpora.blocks import TokenBlocks, corpus_name, load_blocks
from cascade.corpora.readers import EMBEDDED
from cascade.corpora.record_text import alpaca_text, record_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from cascade import DecoderStack

EOS = 1
RECORDS = [{"text": f"{number:02} {letter * 9}"} for number, letter in enumerate("abcdefgh")]
SPLITS = {"train": RECORDS[:5], "test": RECORDS[5:]}


@functools.cache
def the_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of one token per character: text can be read back from its ids."""
    return tiny_tokenizer()


def blocks_of(source: object, **settings: Any) -> TokenBlocks:
    return load_blocks(str(source), the_tokenizer(), **({"seq_len": 4} | settings))


def decoded(blocks: TokenBlocks) -> str:
    """Return the text of all blocks, EOS shown as a line break, the unknown as a tilde."""
    symbols = the_tokenizer().convert_ids_to_tokens(blocks.ids.ravel().tolist())
    return "".join(symbols).replace("<eos>", "\n").replace("<unk>", "~")


def in_vocabulary(text: str) -> str:
    """Return a text as `decoded` shows it: line breaks in a row are one unknown token."""
    return re.sub("\n+", "~", text)


def outcome(read: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a call returns, or the CorpusError that it raises; no other error."""
    try:
        return read(*args, **kwargs)
    except CorpusError as error:
        return error


def joined(records: Sequence[dict[str, str]]) -> str:
    return "\n".join(record["text"] for record in records)


def in_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def in_json(path: Path, records: Sequence[Any]) -> Path:
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    return path


def in_parquet(path: Path, records: Sequence[Any]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(list(records)), path, row_group_size=3)
    return path


def some_blocks(ids: Any) -> TokenBlocks:
    return TokenBlocks(np.array(ids, dtype=np.int32), "here", "here", 1)


# --- A record's text -------------------------------------------------------------------------


def test_alpaca_form_is_put_together_to_the_letter() -> None:
    assert alpaca_text("Add.", "1 + 1", "2") == (
        "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n2"
    )


def test_alpaca_form_without_input_has_no_input_part() -> None:
    expected = "### Instruction:\nSay hi.\n\n### Response:\nhi"
    assert alpaca_text("Say hi.", "", "hi") == expected
    for missing in ({}, {"input": ""}, {"input": None}):
        record = {"instruction": "Say hi.", "output": "hi"} | missing
        assert record_text(record, source="here", number=1) == expected


def test_nested_instances_give_the_first_ones_input_and_output() -> None:
    record = {
        "instruction": "Add.",
        "output": "not this",
        "instances": [{"input": "1 + 1", "output": "2"}, {"input": "2 + 2", "output": "4"}],
    }
    expected = "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n2"
    assert record_text(record, source="here", number=1) == expected


def test_alpaca_form_is_preferred_to_a_text_column_unless_one_is_named() -> None:
    record = {"instruction": "Add.", "input": "", "output": "2", "text": "as is", "other": "o"}
    assert record_text(record, source="here", number=1).startswith("### Instruction:\nAdd.")
    assert record_text(record, source="here", number=1, text_column="text") == "as is"
    assert record_text(record, source="here", number=1, text_column="other") == "o"


@pytest.mark.parametrize(
    ("record", "column", "message"),
    [
        (["text"], None, "expected an object, got list"),
        (None, None, "expected an object, got NoneType"),
        ({"body": "b", "id": "1"}, None, "'text' or instruction and output, got body, id; name"),
        ({}, None, "got no columns"),
        ({"text": "t"}, "body", "expected the column 'body', got text; name one with --text-col"),
        ({"instruction": "i"}, None, "'text' or instruction and output, got instruction;"),
        ({"text": 3}, None, "expected text in column 'text', got int"),
        ({"text": None}, None, "expected text in column 'text', got NoneType"),
        ({"instruction": "i", "output": 3}, None, "expected text in column 'output', got int"),
        ({"instruction": None, "output": "o"}, None, "expected text in column 'instruction'"),
        ({"instruction": "i", "input": [1], "output": "o"}, None, "text in column 'input', got l"),
        ({"instruction": "i", "instances": ["output"]}, None, "got instances, instruction"),
        ({"instruction": "i", "instances": [3]}, None, "got instances, instruction"),
        ({"instruction": "i", "instances": []}, None, "got instances, instruction"),
        ({"text": "half a pair: \ud800"}, None, "column 'text' is no valid Unicode"),
        ({"instruction": "\udfff", "output": "o"}, None, "column 'instruction' is no valid Uni"),
    ],
)
def test_a_record_that_gives_no_text_is_named_with_what_was_expected(
    record: Any, column: str | None, message: str
) -> None:
    with pytest.raises(CorpusError) as caught:
        record_text(record, source="here.jsonl", number=7, text_column=column)
    assert str(caught.value).startswith("here.jsonl, record 7: ")
    assert message in str(caught.value)


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=4))
def test_whatever_the_columns_hold_gives_text_or_a_corpus_error(value: Any) -> None:
    nested = {"instruction": "i", "instances": [value]}
    for record in (value, {"text": value}, {"instruction": value, "output": "o"}, nested):
        text = outcome(record_text, record, source="here", number=1)
        if isinstance(text, CorpusError):
            assert "\n" not in str(text)
        else:
            assert isinstance(value, str)
            assert value in text


# --- Blocks ----------------------------------------------------------------------------------


def test_records_are_joined_by_eos_and_the_rest_is_dropped(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", [{"text": "abc"}, {"text": "de"}, {"text": "fghij"}])
    blocks = blocks_of(path)
    assert decoded(blocks) == "abc\nde\nfghij"[:12]
    assert blocks.ids.shape == (3, 4)
    assert blocks.ids.dtype == np.int32
    assert (blocks.ids.ravel() == EOS).nonzero()[0].tolist() == [3, 6]
    assert decoded(blocks_of(path, seq_len=5)) == "abc\nde\nfgh"
    assert (blocks.records, blocks.tokens) == (3, 12)


TEXTS = st.lists(st.text(string.ascii_lowercase + " ", min_size=1), min_size=1, max_size=8)


@given(
    texts=TEXTS,
    seq_len=st.integers(2, 9),
    max_tokens=st.none() | st.integers(9, 40),
    num_samples=st.none() | st.integers(1, 9),
)
def test_blocks_are_the_longest_allowed_prefix_of_the_joined_text(
    texts: list[str], seq_len: int, max_tokens: int | None, num_samples: int | None
) -> None:
    everything = "\n".join(texts[:num_samples])
    limit = len(everything) if max_tokens is None else min(len(everything), max_tokens)
    expected = everything[: limit // seq_len * seq_len]
    with tempfile.TemporaryDirectory() as folder:
        path = in_lines(Path(folder) / "x.jsonl", [{"text": text} for text in texts])
        settings = {"seq_len": seq_len, "max_tokens": max_tokens, "num_samples": num_samples}
        if not expected:
            with pytest.raises(CorpusError, match="expected at least one block"):
                blocks_of(path, **settings)
            return
        blocks = blocks_of(path, **settings)
    assert decoded(blocks) == expected
    assert blocks.ids.shape == (len(expected) // seq_len, seq_len)


def test_a_tokenizers_own_special_tokens_are_left_out(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", EOS)]
    )
    assert tokenizer("ab")["input_ids"][0] == EOS
    path = in_lines(tmp_path / "x.jsonl", [{"text": "abc"}, {"text": "def"}])
    blocks = load_blocks(str(path), tokenizer, seq_len=7)
    assert decoded(blocks) == "abc\ndef"


def test_only_as_many_records_are_read_as_are_needed(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", [*RECORDS, {"no": "text"}])
    assert blocks_of(path, num_samples=8).records == 8
    assert blocks_of(path, num_samples=3).records == 3
    assert blocks_of(path, max_tokens=16).records == 2
    assert blocks_of(path, max_tokens=16).tokens == 16
    with pytest.raises(CorpusError, match="record 9"):
        blocks_of(path, num_samples=None)


def test_without_a_seed_records_come_in_the_corpus_order(tmp_path: Path) -> None:
    assert decoded(blocks_of(in_lines(tmp_path / "x.jsonl", RECORDS))) == joined(RECORDS)[:100]


def test_a_seed_draws_a_permutation_of_the_same_records(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", RECORDS)
    drawn = [decoded(blocks_of(path, seed=seed, seq_len=103)) for seed in range(20)]
    for text in drawn:
        assert sorted(text.split("\n")) == sorted(record["text"] for record in RECORDS)
    assert len(set(drawn)) > 15
    assert drawn == [decoded(blocks_of(path, seed=seed, seq_len=103)) for seed in range(20)]


def test_a_seed_draws_from_all_records_before_some_are_taken(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", RECORDS)
    first = {decoded(blocks_of(path, seed=seed, num_samples=1, seq_len=12)) for seed in range(100)}
    assert first == {record["text"] for record in RECORDS}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 1}, "expected --seq-len of at least 2, got 1"),
        ({"seq_len": 200}, "gives 103 tokens, expected at least one block of 200; take more"),
        ({"seq_len": 50, "max_tokens": 49}, "--max-tokens of at least one block of 50 tokens"),
        ({"seq_len": 50, "num_samples": 2}, "gives 25 tokens, expected at least one block of 50"),
        ({"split": "train"}, "--split and --config belong to hub datasets"),
        ({"config": "small"}, "--split and --config belong to hub datasets"),
        ({"text_column": "body"}, "record 1: expected the column 'body', got text"),
    ],
)
def test_settings_that_give_no_block_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = in_lines(tmp_path / "x.jsonl", RECORDS)
    with pytest.raises(CorpusError) as caught:
        blocks_of(path, **settings)
    assert message in str(caught.value)


def test_a_model_without_tokenizer_or_eos_reads_no_text(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", RECORDS)
    with pytest.raises(CorpusError, match="has no tokenizer"):
        load_blocks(str(path), None)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(CorpusError, match="no EOS token to join records with; set one"):
        load_blocks(str(path), tokenizer)


# --- Files -----------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path, Sequence[Any]], Path]] = {
    "My Corpus.jsonl": in_lines,
    "My Corpus.json": in_json,
    "My Corpus.parquet": in_parquet,
    "My Corpus.JSONL": in_lines,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_of_file_gives_the_same_blocks(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, RECORDS)
    blocks = blocks_of(path, seq_len=103)
    assert decoded(blocks) == joined(RECORDS)
    assert (blocks.source, blocks.name, blocks.records) == (str(path), "my corpus", 8)


@pytest.mark.parametrize("name", WRITERS)
def test_every_form_of_file_takes_alpaca_records_and_a_text_column(
    tmp_path: Path, name: str
) -> None:
    record = {"instruction": "Add.", "input": "1 + 1", "output": "2", "note": "as noted"}
    path = WRITERS[name](tmp_path / name, [record])
    text = in_vocabulary(alpaca_text("Add.", "1 + 1", "2"))
    assert decoded(blocks_of(path, seq_len=len(text))) == text
    assert decoded(blocks_of(path, seq_len=8, text_column="note")) == "as noted"


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("# one two three\n", encoding="utf-8")
    blocks = blocks_of(path, seq_len=5)
    assert blocks.records == 1
    assert blocks.ids.ravel().tolist() == the_tokenizer()("# one two three")["input_ids"]


def test_blank_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"text": "abcd"}\r\n  \n\n{"text": \n', encoding="utf-8")
    assert blocks_of(path, num_samples=1).records == 1
    with pytest.raises(CorpusError, match=r"x\.jsonl, line 5: not JSON \(.*\); mend it"):
        blocks_of(path)


def test_line_breaks_inside_a_records_text_do_not_end_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "ab\u2028cd\u0085ef"}\n', encoding="utf-8")
    assert blocks_of(path, seq_len=8).records == 1


def test_a_path_below_the_home_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    in_lines(tmp_path / "mine.jsonl", RECORDS)
    assert blocks_of("~/mine.jsonl").name == "mine"


def test_a_name_never_leaves_the_folder_of_baselines(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine/below")
    in_lines(tmp_path / "mine/x.jsonl", RECORDS)
    assert blocks_of("../x.jsonl").name == "x"
    assert blocks_of("..").name == "mine"


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "x.txt"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorpusError, match=f"no corpus file .*{name}; expected a path to an exist"):
        blocks_of(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(CorpusError, match="no corpus file"):
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
        ("x.jsonl", b"[1, 2]\n", "record 1: expected an object, got list"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "record 1: column 'text' is no valid Unicode"),
        ("x.jsonl", b'{"text": "abc\xff"}\n', "expected UTF-8 text"),
        ("x.json", b"[1,", "x.json: not JSON"),
        ("x.json", b"", "x.json: not JSON"),
        ("x.json", b"[" * 100_000, "x.json: not JSON"),
        ("x.json", b'{"text": "abcd"}', "expected a list of records, got dict"),
        ("x.json", b"[3]", "record 1: expected an object, got int"),
        ("x.txt", b"abc\xff", "expected UTF-8 text"),
        ("x.parquet", b"", "is not a readable Parquet file"),
        ("x.parquet", b"PAR1 and no more", "is not a readable Parquet file"),
        ("x.csv", b"text\nabcdef\n", "expected a .jsonl, .json, .parquet, .txt file, got"),
        ("noname", b"abcdef", "expected a .jsonl, .json, .parquet, .txt file, got"),
    ],
)
def test_a_file_that_gives_no_records_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        blocks_of(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_parquet_file_is_refused(tmp_path: Path) -> None:
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
def test_a_damaged_parquet_file_gives_records_or_a_corpus_error(data: st.DataObject) -> None:
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
def test_any_bytes_in_a_file_of_lines_give_records_or_a_corpus_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=r"not JSON|UTF-8|is empty|expected an object|column"):
            blocks_of(path)


# --- datasets --------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep `datasets` off the network and in a cache folder of this test."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def hub_dataset(tmp_path: Path, offline: None) -> Path:
    """A folder as the hub holds it: two configurations, two splits."""
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


def test_a_dataset_gives_its_train_split_and_others_by_name(hub_dataset: Path) -> None:
    blocks = blocks_of(hub_dataset, seq_len=64)
    assert decoded(blocks) == joined(SPLITS["train"])
    assert (blocks.name, blocks.records) == ("hub dataset", 5)
    blocks = blocks_of(hub_dataset, split="test", seq_len=38)
    assert decoded(blocks) == joined(SPLITS["test"])
    assert blocks.name == "hub dataset-test"


def test_a_dataset_gives_the_configuration_and_column_named(hub_dataset: Path) -> None:
    blocks = blocks_of(hub_dataset, config="loud", text_column="body", seq_len=14)
    assert decoded(blocks) == "LOUD AND CLEAR"
    assert blocks.name == "hub dataset-loud"


def test_a_dataset_is_drawn_from_like_a_file(hub_dataset: Path, tmp_path: Path) -> None:
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
            "record 1: expected the column 'text' or instruction and output, got b",
        ),
        ({"text_column": "body"}, "record 1: expected the column 'body', got text"),
    ],
)
def test_a_dataset_without_what_is_named_is_refused(
    hub_dataset: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError) as caught:
        blocks_of(hub_dataset, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["nobody/no-such-corpus", "no such corpus", "empty"])
def test_a_dataset_that_is_nowhere_is_refused_with_what_can_be_given(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError) as caught:
        blocks_of(source)
    assert str(caught.value).startswith(f"no corpus {source}: ")
    assert "expected embedded, a .jsonl, .json, .parquet or .txt file" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_named_for_a_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return RECORDS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    blocks = blocks_of("Salesforce/wikitext", config="wikitext-2-raw-v1", split="validation")
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "validation"})]
    assert blocks.name == "salesforce--wikitext-wikitext-2-raw-v1-validation"
    assert blocks_of("tatsu-lab/alpaca").name == "tatsu-lab--alpaca"
    assert asked[1] == (("tatsu-lab/alpaca", None), {"split": "train"})


def test_a_dataset_can_be_streamed_and_gives_the_same_text(hub_dataset: Path) -> None:
    for settings in ({}, {"split": "test"}, {"config": "loud", "text_column": "body"}):
        fetched = blocks_of(hub_dataset, **settings)
        assert (
            blocks_of(hub_dataset, stream=True, **settings).fingerprint() == fetched.fingerprint()
        )
    some = blocks_of(hub_dataset, stream=True, num_samples=2)
    assert decoded(some) == joined(SPLITS["train"][:2])[: some.tokens]


def test_a_stream_is_read_no_further_than_its_records_are_taken(
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


def test_a_stream_that_breaks_off_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def breaking() -> Any:
        yield {"text": "the first record"}
        raise ConnectionError("the network went away\nTraceback")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: breaking())
    with pytest.raises(CorpusError) as caught:
        blocks_of("allenai/c4", config="en", stream=True)
    assert str(caught.value).startswith("no corpus allenai/c4: the network went away -- expected")
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
def test_a_stream_without_what_is_named_is_refused(
    hub_dataset: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError) as caught:
        blocks_of(hub_dataset, stream=True, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- Sequences spread over the text ----------------------------------------------------------


@given(rows=st.integers(1, 60), wanted=st.integers(1, 80))
def test_sequences_are_spread_evenly(rows: int, wanted: int) -> None:
    ids = np.repeat(np.arange(rows), 3).reshape(rows, 3)
    blocks = some_blocks(ids).spread(wanted)
    taken = blocks.ids[:, 0].tolist()
    assert len(taken) == min(rows, wanted)
    if wanted >= rows:
        assert taken == list(range(rows))
        assert blocks.spread_over is None
        assert blocks.provenance().spread is UNSET
        return
    steps = np.diff([-1, *taken, rows])
    apart = rows / wanted
    assert all(apart - 1 < step < apart + 1 for step in steps[1:-1])
    # As much is left out before the first as behind the last, to one sequence.
    assert abs(int(steps[0]) - int(steps[-1])) <= 1
    assert blocks.provenance().spread == f"evenly over {rows} sequences"
    assert blocks.provenance().sequences == wanted


def test_marks_go_with_the_sequences_that_are_taken(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", [{"instruction": "ab", "output": "cd" * 9}] * 6)
    whole = blocks_of(path, marks=True, part="train")
    some = whole.spread(5)
    rows = [int(np.flatnonzero((whole.ids == row).all(axis=1))[0]) for row in some.ids]
    assert some.record_of is not None
    assert some.response is not None
    assert whole.record_of is not None
    assert whole.response is not None
    assert some.record_of.shape == some.response.shape == some.ids.shape
    assert some.ids.shape == (5, 4)
    assert len(set(rows)) > 1
    places = (np.arange(5) * 2 + 1) * len(whole.ids) // 10
    assert (some.record_of == whole.record_of[places]).all()
    assert (some.response == whole.response[places]).all()
    assert some.provenance().part == "train"
    assert some.spread(2).provenance().spread == f"evenly over {len(whole.ids)} sequences"


# --- Fingerprints ----------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    at=st.integers(0, 15),
    change=st.integers(1, 90),
)
def test_the_fingerprint_changes_with_any_one_token(
    shape: tuple[int, int], at: int, change: int
) -> None:
    ids = np.arange(shape[0] * shape[1]).reshape(shape)
    other = ids.copy()
    row, column = np.unravel_index(at % ids.size, shape)
    other[row, column] += change
    assert some_blocks(other).fingerprint() != some_blocks(ids).fingerprint()
    same = some_blocks(other).sequence_fingerprints() == some_blocks(ids).sequence_fingerprints()
    assert same.tolist() == [number != row for number in range(shape[0])]


def test_the_fingerprint_changes_with_the_shape() -> None:
    shapes = [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2)]
    found = {some_blocks(np.arange(12).reshape(shape)).fingerprint() for shape in shapes}
    assert len(found) == len(shapes)


def test_fingerprints_stay_what_stored_baselines_hold() -> None:
    import hashlib

    ids = np.array([[1, 2], [3, 40_000]], dtype="<i4")
    blocks = some_blocks(ids)
    expected = hashlib.sha256(b"(2, 2)" + ids.tobytes()).hexdigest()
    assert blocks.fingerprint() == f"sha256:{expected}"
    first = hashlib.sha256(ids[0].tobytes()).digest()[:8]
    assert blocks.sequence_fingerprints()[0] == int.from_bytes(first, "little")
    assert blocks.sequence_fingerprints().dtype == np.uint64


def test_fingerprints_do_not_depend_on_the_memory_layout() -> None:
    ids = np.arange(12).reshape(3, 4)
    turned = TokenBlocks(np.asfortranarray(ids.astype(np.int32)), "here", "here", 1)
    assert turned.fingerprint() == some_blocks(ids).fingerprint()
    assert (turned.sequence_fingerprints() == some_blocks(ids).sequence_fingerprints()).all()


@given(sequences=st.integers(1, 9), batch_size=st.integers(1, 10))
def test_batches_hold_every_sequence_once_in_order(sequences: int, batch_size: int) -> None:
    blocks = some_blocks(np.arange(sequences * 3).reshape(sequences, 3))
    batches: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = list(blocks.batches(batch_size))
    assert np.array_equal(np.concatenate([ids for ids, _ in batches]), blocks.ids)
    assert np.concatenate([numbers for _, numbers in batches]).tolist() == list(range(sequences))
    assert {len(ids) for ids, _ in batches[:-1]} <= {batch_size}
    assert all(len(ids) == len(numbers) for ids, numbers in batches)


def test_the_provenance_says_all_of_the_corpus(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", RECORDS)
    blocks = blocks_of(path, num_samples=5, seq_len=16)
    assert to_plain(blocks.provenance()) == {
        "source": str(path),
        "name": "x",
        "fingerprint": blocks.fingerprint(),
        "records": 5,
        "tokens": 64,
        "sequences": 4,
        "seq_len": 16,
    }


# --- The embedded corpus ---------------------------------------------------------------------


@functools.cache
def embedded_records() -> list[dict[str, str]]:
    text = resources.files("cascade").joinpath("data/embedded.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_embedded_corpus_has_500_records_that_differ() -> None:
    records = embedded_records()
    assert len(records) == 500
    assert len({record["id"] for record in records}) == 500
    assert len({(record["instruction"], record["input"]) for record in records}) == 500


def test_every_embedded_record_is_complete() -> None:
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


def test_a_third_of_the_embedded_records_have_an_input() -> None:
    assert sum(bool(record["input"]) for record in embedded_records()) >= 500 / 3


def test_the_embedded_split_is_fixed_and_has_both_parts() -> None:
    sizes = collections.Counter(record["split"] for record in embedded_records())
    assert sizes == {"train": 400, "held-out": 100}
    held_out = collections.Counter(
        record["category"] for record in embedded_records() if record["split"] == "held-out"
    )
    everything = collections.Counter(record["category"] for record in embedded_records())
    assert held_out == {category: size // 5 for category, size in everything.items()}


def test_the_embedded_parts_together_are_the_whole() -> None:
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


def test_the_embedded_corpus_refuses_what_it_does_not_have() -> None:
    with pytest.raises(CorpusError, match="expected --split among held-out, train, got test"):
        blocks_of("embedded", split="test")
    with pytest.raises(CorpusError, match="--config belongs to hub datasets, got it for embedded"):
        blocks_of("embedded", config="small")


def test_the_embedded_corpus_is_as_long_as_the_study_needs() -> None:
    # 43,008 tokens at 4.5 characters each, more than English text has with SmolLM2's tokenizer.
    texts = [record_text(record, source="", number=0) for record in embedded_records()]
    assert sum(map(len, texts)) >= 43_008 * 4.5


@pytest.mark.saturation
def test_the_embedded_corpus_has_the_seeds_number_of_tokens(
    reference_model: DecoderStack,
) -> None:
    blocks = load_blocks("embedded", reference_model.tokenizer)
    assert blocks.tokens >= 43_008
    assert blocks.ids.shape == (blocks.tokens // 128, 128)
    assert blocks.records == 500


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_token(tmp_path: Path, name: str) -> None:
    text = '{"text": "some words to read"}' if name == "a.jsonl" else "some words to read"
    plain, marked = tmp_path / "plain" / name, tmp_path / "marked" / name
    for path, encoding in ((plain, "utf-8"), (marked, "utf-8-sig")):
        path.parent.mkdir()
        path.write_text(text, encoding=encoding)
    blocks = [load_blocks(str(path), tiny_tokenizer(), seq_len=4) for path in (plain, marked)]
    assert np.array_equal(blocks[0].ids, blocks[1].ids)


@pytest.mark.parametrize("source", ["~nobody-of-that-name/x.txt", "x" * 300 + ".txt"])
def test_a_path_that_cannot_be_is_a_missing_corpus(source: str) -> None:
    with pytest.raises(CorpusError, match="no corpus file"):
        load_blocks(source, tiny_tokenizer())


@pytest.mark.parametrize("split", [None, "held-out"])
def test_a_corpus_is_known_by_its_name_before_it_is_read(split: str | None) -> None:
    blocks = load_blocks(EMBEDDED, tiny_tokenizer(), split=split, max_tokens=256)
    assert corpus_name(EMBEDDED, split=split) == blocks.name


# --- Parts and marks -------------------------------------------------------------------------

ALPACA = st.fixed_dictionaries(
    {
        "instruction": st.text(string.ascii_lowercase + " ", min_size=1, max_size=9),
        "input": st.text(string.ascii_lowercase, max_size=5),
        "output": st.text(string.ascii_lowercase + " ", max_size=9),
    }
)
PLAIN = st.fixed_dictionaries({"text": st.text(string.ascii_lowercase, min_size=1, max_size=9)})
MIXED = st.lists(ALPACA | PLAIN, min_size=1, max_size=12)


def marked_by_hand(records: Sequence[dict[str, str]]) -> list[tuple[str, int, bool]]:
    """Return (symbol, record, response) of every token of the tiny tokenizer, EOS between texts."""
    found = []
    for number, record in enumerate(records, start=1):
        template = ""
        if "text" not in record:
            template = alpaca_text(record["instruction"], record["input"], "")
        output = record.get("text", record.get("output", ""))
        # A run of line breaks is one token, which begins where its first one does.
        found += [(symbol, number, False) for symbol in in_vocabulary(template)]
        found += [(symbol, number, True) for symbol in output]
        found += [("\n", number, True)]
    return found[:-1]


@given(records=MIXED, seq_len=st.integers(2, 9), max_tokens=st.none() | st.integers(9, 90))
def test_every_token_knows_its_record_and_whether_it_is_response_text(
    records: list[dict[str, str]], seq_len: int, max_tokens: int | None
) -> None:
    expected = marked_by_hand(records)
    limit = min(len(expected), max_tokens or len(expected)) // seq_len * seq_len
    if not limit:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = in_lines(Path(folder) / "x.jsonl", records)
        settings = {"seq_len": seq_len, "max_tokens": max_tokens}
        blocks = blocks_of(path, marks=True, **settings)
        plain = blocks_of(path, **settings)
    assert blocks.record_of is not None
    assert blocks.response is not None
    assert (blocks.record_of.dtype, blocks.response.dtype) == (np.int32, np.bool_)
    assert blocks.record_of.shape == blocks.response.shape == blocks.ids.shape
    marks = zip(decoded(blocks), blocks.record_of.flat, blocks.response.flat, strict=True)
    assert [(*mark,) for mark in marks] == expected[:limit]
    # What is asked for besides changes no token.
    assert np.array_equal(blocks.ids, plain.ids)
    assert blocks.provenance() == plain.provenance()
    assert (plain.record_of, plain.response) == (None, None)


@given(
    records=st.lists(PLAIN | ALPACA, min_size=5, max_size=23),
    seed=st.none() | st.integers(0, 9),
    num_samples=st.none() | st.integers(5, 23),
)
def test_parts_have_no_record_in_common_and_together_all_of_them(
    records: list[dict[str, str]], seed: int | None, num_samples: int | None
) -> None:
    settings = {"seed": seed, "num_samples": num_samples, "marks": True, "seq_len": 2}
    named = [record | {"text": f"{number:03}"} for number, record in enumerate(records)]
    with tempfile.TemporaryDirectory() as folder:
        path = in_lines(Path(folder) / "x.jsonl", named)
        whole, train, held_out = (
            blocks_of(path, part=part, text_column="text", **settings)
            for part in (None, "train", "held-out")
        )
    assert whole.records == train.records + held_out.records == len(named[:num_samples])
    assert (train.name, held_out.name) == ("x-train", "x-held-out")
    for part in (train, held_out):
        assert part.record_of is not None
        held = part.record_of % 5 == 0
        assert held.all() if part is held_out else not held.any()
    in_order = re.findall(r"\d{3}", decoded(whole))
    for part in (train, held_out):
        own = re.findall(r"\d{3}", decoded(part))
        chosen = [text for n, text in enumerate(in_order, 1) if (n % 5 == 0) == (part is held_out)]
        # The last text can lack a letter that fills no block.
        assert own == chosen[: len(own)]
        assert len(own) >= len(chosen) - 1


def test_the_embedded_parts_are_its_splits_and_keep_the_whole_corpus_numbers() -> None:
    whole = [record["split"] for record in embedded_records()]
    for part in ("train", "held-out"):
        blocks = blocks_of("embedded", part=part, num_samples=None, seq_len=128, marks=True)
        split = blocks_of("embedded", split=part, num_samples=None, seq_len=128)
        assert np.array_equal(blocks.ids, split.ids)
        assert blocks.name == split.name == f"embedded-{part}"
        assert blocks.record_of is not None
        assert {whole[number - 1] for number in np.unique(blocks.record_of)} == {part}


def test_the_provenance_says_how_a_corpus_was_parted(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", RECORDS)
    said = blocks_of(path, part="held-out").provenance()
    assert (said["part"], said["parted"]) == ("held-out", "by record, every 5th is held out")
    said = blocks_of("embedded", part="train", num_samples=9).provenance()
    assert (said["part"], said["parted"]) == ("train", "by record, as the corpus says of each")
    assert not {"part", "parted"} & set(blocks_of(path).provenance())


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("embedded", {"part": "train", "split": "train"}, "its splits, got the part train and"),
        ("x.jsonl", {"part": "test"}, "expected a part among train, held-out, got 'test'"),
        ("x.jsonl", {"part": "held-out", "num_samples": 4}, "at least one record in its held-out"),
        ("x.jsonl", {"part": "held-out", "seq_len": 99}, "gives 12 tokens in its held-out part"),
    ],
)
def test_a_part_that_is_none_or_empty_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, settings: Any, message: str
) -> None:
    in_lines(tmp_path / "x.jsonl", RECORDS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError) as caught:
        blocks_of(source, **settings)
    assert message in str(caught.value)


class Slow:
    """A tokenizer without offsets: one token per pair of letters, or per letter."""

    is_fast = False
    eos_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        pieces = [text[start : start + self.size] for start in range(0, len(text), self.size)]
        return {"input_ids": [1 + sum(map(ord, piece)) for piece in pieces]}


def test_without_offsets_the_border_is_known_where_a_token_ends_on_it(tmp_path: Path) -> None:
    record = {"instruction": "Add.", "input": "", "output": "fours"}
    template = len(alpaca_text("Add.", "", ""))
    path = in_lines(tmp_path / "x.jsonl", [record])
    letters: Any = Slow(1)
    blocks = load_blocks(str(path), letters, seq_len=template + 5, marks=True)
    assert blocks.response is not None
    assert blocks.response.sum() == 5
    assert blocks.response[0, template:].all()
    pairs: Any = Slow(2 if template % 2 else 4)
    with pytest.raises(CorpusError, match="record 1: this tokenizer has no offsets and a token ac"):
        load_blocks(str(path), pairs, seq_len=2, marks=True)
    plain = in_lines(tmp_path / "y.jsonl", [{"text": "no border at all"}])
    unmarked = load_blocks(str(plain), pairs, seq_len=2, marks=True)
    assert unmarked.response is not None
    assert unmarked.response.all()


def test_a_token_across_the_border_is_the_templates(tmp_path: Path) -> None:
    # The tiny tokenizer reads line breaks in a row as one token.
    path = in_lines(tmp_path / "x.jsonl", [{"instruction": "i", "input": "", "output": "\nabc"}])
    text = in_vocabulary(alpaca_text("i", "", "\nabc"))
    blocks = blocks_of(path, seq_len=len(text), marks=True)
    assert blocks.response is not None
    assert blocks.response[0].tolist() == [False] * (len(text) - 3) + [True] * 3


@pytest.mark.saturation
def test_the_reference_tokenizer_marks_the_answers_letter_by_letter(
    reference_model: DecoderStack,
) -> None:
    tokenizer = reference_model.tokenizer
    assert tokenizer is not None
    blocks = load_blocks("embedded", tokenizer, num_samples=200, marks=True)
    assert blocks.record_of is not None
    assert blocks.response is not None
    for number in range(1, 180):
        own = blocks.response & (blocks.record_of == number)
        answer = tokenizer.decode(blocks.ids[own]).removesuffix(tokenizer.eos_token)
        assert answer == embedded_records()[number - 1]["output"]

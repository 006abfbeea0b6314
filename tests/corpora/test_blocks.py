"""Blocks of tokens: cutting, spreading and splitting a corpus, and its fingerprints."""

from __future__ import annotations

import re
import string
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.corpora import (
    ALPACA,
    EOS,
    PLAIN,
    RECORDS,
    blocks_of,
    decoded,
    embedded_records,
    in_lines,
    joined,
    some_blocks,
)
from support.tiny_models import tiny_tokenizer
from tokenizers import Regex
from tokenizers.normalizers import Replace

from cascade.core.errors import CorpusError
from cascade.core.schema import UNSET, to_plain
from cascade.corpora.blocks import TokenBlocks, corpus_name, load_blocks
from cascade.corpora.readers import EMBEDDED

if TYPE_CHECKING:
    pass


def test_records_are_joined_by_eos_and_the_incomplete_block_is_dropped(tmp_path: Path) -> None:
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


def test_special_tokens_of_the_tokenizer_are_not_added(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", EOS)]
    )
    assert tokenizer("ab")["input_ids"][0] == EOS
    path = in_lines(tmp_path / "x.jsonl", [{"text": "abc"}, {"text": "def"}])
    blocks = load_blocks(str(path), tokenizer, seq_len=7)
    assert decoded(blocks) == "abc\ndef"


def test_only_needed_records_are_read(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", [*RECORDS, {"no": "text"}])
    assert blocks_of(path, num_samples=8).records == 8
    assert blocks_of(path, num_samples=3).records == 3
    assert blocks_of(path, max_tokens=16).records == 2
    assert blocks_of(path, max_tokens=16).tokens == 16
    with pytest.raises(CorpusError, match="record 9"):
        blocks_of(path, num_samples=None)


def test_records_keep_the_corpus_order_without_a_seed(tmp_path: Path) -> None:
    assert decoded(blocks_of(in_lines(tmp_path / "x.jsonl", RECORDS))) == joined(RECORDS)[:100]


def test_seed_permutes_the_records(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", RECORDS)
    drawn = [decoded(blocks_of(path, seed=seed, seq_len=103)) for seed in range(20)]
    for text in drawn:
        assert sorted(text.split("\n")) == sorted(record["text"] for record in RECORDS)
    assert len(set(drawn)) > 15
    assert drawn == [decoded(blocks_of(path, seed=seed, seq_len=103)) for seed in range(20)]


def test_records_are_shuffled_before_num_samples_are_taken(tmp_path: Path) -> None:
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
def test_options_that_give_no_block_are_rejected(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = in_lines(tmp_path / "x.jsonl", RECORDS)
    with pytest.raises(CorpusError) as caught:
        blocks_of(path, **settings)
    assert message in str(caught.value)


def test_missing_tokenizer_or_eos_is_rejected(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", RECORDS)
    with pytest.raises(CorpusError, match="has no tokenizer"):
        load_blocks(str(path), None)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(CorpusError, match="no EOS token to join records with; set one"):
        load_blocks(str(path), tokenizer)


def test_one_document_needs_no_eos(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("abcdefgh")
    tokenizer = tiny_tokenizer()
    expected = load_blocks(tmp_path / "x.txt", tokenizer, seq_len=4)
    tokenizer.eos_token = None
    assert np.array_equal(load_blocks(tmp_path / "x.txt", tokenizer, seq_len=4).ids, expected.ids)


def test_null_records_are_skipped_and_empty_ones_counted(tmp_path: Path) -> None:
    records = [{"text": "abcd"}, None, {"text": None}, {"text": " "}, {"text": ""}, {"text": "ef"}]
    blocks = blocks_of(in_lines(tmp_path / "x.jsonl", records), seq_len=2)
    assert decoded(blocks) == "abcd\n \n\nef"[:10]
    assert (blocks.records, blocks.empty_records) == (4, 4)
    assert blocks.provenance().empty_records == 4
    whole = blocks_of(in_lines(tmp_path / "x.jsonl", records[:1]), seq_len=2)
    assert whole.provenance().empty_records is UNSET


def test_every_instance_of_a_record_is_read(tmp_path: Path) -> None:
    record = {"instruction": "i", "instances": [{"output": "abc"}, {"output": "xyz..."}]}
    blocks = blocks_of(in_lines(tmp_path / "x.jsonl", [record]), marks=True)
    assert "abc" in decoded(blocks)
    assert "xyz" in decoded(blocks)
    assert blocks.records == 1
    assert set(np.asarray(blocks.record_of).ravel()) == {1}


def without_merges() -> Any:
    """Return a tokenizer as transformers makes it where files are missing: text is nothing."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Replace(Regex("."), "")
    return tokenizer


def of_unknown_tokens() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Replace(Regex("."), "\u00e4")
    return tokenizer


@pytest.mark.parametrize("make", [without_merges, of_unknown_tokens])
def test_a_tokenizer_that_cannot_read_the_text_is_refused(make: Any, tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", RECORDS)
    with pytest.raises(CorpusError) as error:
        load_blocks(path, make(), seq_len=2)
    assert "the tokenizer turns 8 of 8 texts of " in str(error.value)
    assert "copy tokenizer.json" in str(error.value)


def test_a_corpus_of_empty_records_is_refused(tmp_path: Path) -> None:
    records = [*[{"text": ""}] * 30, {"text": "abcd"}]
    with pytest.raises(CorpusError, match=r"30 of 34 tokens of .* are EOS, because most of its"):
        blocks_of(in_lines(tmp_path / "x.jsonl", records))


def test_a_file_of_nul_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\0" * 50 + b"text")
    with pytest.raises(CorpusError, match=r"50 of 54 characters of .* are NUL; expected text"):
        blocks_of(tmp_path / "x.txt")


@given(rows=st.integers(1, 60), wanted=st.integers(1, 80))
def test_spread_sequences_are_evenly_spaced(rows: int, wanted: int) -> None:
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
    # The gaps before the first and after the last sequence differ by at most one.
    assert abs(int(steps[0]) - int(steps[-1])) <= 1
    assert blocks.provenance().spread == f"evenly over {rows} sequences"
    assert blocks.provenance().sequences == wanted


def test_spread_keeps_the_marks_of_its_sequences(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", [{"instruction": "ab", "output": "cd" * 9}] * 6)
    whole = blocks_of(path, marks=True, record_split="train")
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
    assert some.provenance().record_split == "train"
    assert some.spread(2).provenance().spread == f"evenly over {len(whole.ids)} sequences"


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    at=st.integers(0, 15),
    change=st.integers(1, 90),
)
def test_fingerprint_depends_on_every_token(shape: tuple[int, int], at: int, change: int) -> None:
    ids = np.arange(shape[0] * shape[1]).reshape(shape)
    other = ids.copy()
    row, column = np.unravel_index(at % ids.size, shape)
    other[row, column] += change
    assert some_blocks(other).fingerprint() != some_blocks(ids).fingerprint()
    same = some_blocks(other).sequence_fingerprints() == some_blocks(ids).sequence_fingerprints()
    assert same.tolist() == [number != row for number in range(shape[0])]


def test_fingerprint_depends_on_the_shape() -> None:
    shapes = [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2)]
    found = {some_blocks(np.arange(12).reshape(shape)).fingerprint() for shape in shapes}
    assert len(found) == len(shapes)


def test_fingerprints_match_stored_baselines() -> None:
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
def test_batches_contain_every_sequence_once_in_order(sequences: int, batch_size: int) -> None:
    blocks = some_blocks(np.arange(sequences * 3).reshape(sequences, 3))
    batches: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = list(blocks.batches(batch_size))
    assert np.array_equal(np.concatenate([ids for ids, _ in batches]), blocks.ids)
    assert np.concatenate([numbers for _, numbers in batches]).tolist() == list(range(sequences))
    assert {len(ids) for ids, _ in batches[:-1]} <= {batch_size}
    assert all(len(ids) == len(numbers) for ids, numbers in batches)


def test_provenance_describes_the_corpus(tmp_path: Path) -> None:
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
        "num_samples": 5,
    }


@pytest.mark.parametrize("split", [None, "held-out"])
def test_corpus_name_equals_the_name_of_the_blocks(split: str | None) -> None:
    blocks = load_blocks(EMBEDDED, tiny_tokenizer(), split=split, max_tokens=256)
    assert corpus_name(EMBEDDED, split=split) == blocks.name


@given(
    records=st.lists(PLAIN | ALPACA, min_size=5, max_size=23),
    seed=st.none() | st.integers(0, 9),
    num_samples=st.none() | st.integers(5, 23),
)
def test_splits_are_disjoint_and_complete(
    records: list[dict[str, str]], seed: int | None, num_samples: int | None
) -> None:
    settings = {"seed": seed, "num_samples": num_samples, "marks": True, "seq_len": 2}
    named = [record | {"text": f"{number:03}"} for number, record in enumerate(records)]
    with tempfile.TemporaryDirectory() as folder:
        path = in_lines(Path(folder) / "x.jsonl", named)
        whole, train, held_out = (
            blocks_of(path, record_split=part, text_column="text", **settings)
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
        # The last letter of the last text may not fill a block.
        assert own == chosen[: len(own)]
        assert len(own) >= len(chosen) - 1


def test_record_splits_of_the_embedded_corpus_are_its_own_splits() -> None:
    whole = [record["split"] for record in embedded_records()]
    for part in ("train", "held-out"):
        blocks = blocks_of("embedded", record_split=part, num_samples=None, seq_len=128, marks=True)
        split = blocks_of("embedded", split=part, num_samples=None, seq_len=128)
        assert np.array_equal(blocks.ids, split.ids)
        assert blocks.name == split.name == f"embedded-{part}"
        assert blocks.record_of is not None
        assert {whole[number - 1] for number in np.unique(blocks.record_of)} == {part}


def test_provenance_says_how_a_corpus_was_split(tmp_path: Path) -> None:
    path = in_lines(tmp_path / "x.jsonl", RECORDS)
    found = blocks_of(path, record_split="held-out").provenance()
    assert (found.record_split, found.split_rule) == (
        "held-out",
        "by record, every 5th is held out",
    )
    found = blocks_of("embedded", record_split="train", num_samples=9).provenance()
    assert (found.record_split, found.split_rule) == (
        "train",
        "by record, as the corpus says of each",
    )
    assert not {"part", "parted"} & set(to_plain(blocks_of(path).provenance()))


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        (
            "embedded",
            {"record_split": "train", "split": "train"},
            "expected record_split or split for embedded, got record_split train and",
        ),
        (
            "x.jsonl",
            {"record_split": "test"},
            "expected record_split among train, held-out, got 'test'",
        ),
        (
            "x.jsonl",
            {"record_split": "held-out", "num_samples": 4},
            "at least one record in its held-out",
        ),
        (
            "x.jsonl",
            {"record_split": "held-out", "seq_len": 99},
            "12 tokens in its held-out",
        ),
    ],
)
def test_unknown_or_empty_split_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, settings: Any, message: str
) -> None:
    in_lines(tmp_path / "x.jsonl", RECORDS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError) as caught:
        blocks_of(source, **settings)
    assert message in str(caught.value)


# --- Corpora in memory -----------------------------------------------------------------------


def _dataset(column: str = "text", **options: Any) -> Any:
    import datasets

    return datasets.Dataset.from_dict({column: ["abc", "de", "fghij"]}, **options)


@pytest.mark.parametrize(
    "texts",
    [
        ["abc", "de", "fghij"],
        ("abc", "de", "fghij"),
        [{"text": "abc"}, {"text": "de"}, {"text": "fghij"}],
        _dataset(),
        _dataset().to_iterable_dataset(),
    ],
    ids=["list", "tuple", "records", "dataset", "iterable_dataset"],
)
def test_texts_in_memory_give_the_same_blocks_as_a_file(texts: Any, tmp_path: Path) -> None:
    file = in_lines(tmp_path / "x.jsonl", [{"text": "abc"}, {"text": "de"}, {"text": "fghij"}])
    found, expected = load_blocks(texts, tiny_tokenizer(), seq_len=4), blocks_of(file)
    assert found.fingerprint() == expected.fingerprint()
    assert (found.source, found.name, found.records) == ("texts", "texts", 3)


def test_dataset_in_memory_reads_text_column_and_is_named_by_its_split() -> None:
    dataset = _dataset("body", split="test")
    blocks = load_blocks(dataset, tiny_tokenizer(), seq_len=4, text_column="body")
    assert decoded(blocks) == "abc\nde\nfghij"[:12]
    assert blocks.name == "texts-test"
    with pytest.raises(CorpusError, match="record 1: expected the column 'text' or instruction"):
        load_blocks(dataset, tiny_tokenizer(), seq_len=4)


def test_load_blocks_accepts_a_path(tmp_path: Path) -> None:
    file = in_lines(tmp_path / "x.jsonl", [{"text": "abcdefgh"}])
    assert load_blocks(Path(file), tiny_tokenizer(), seq_len=4).source == str(file)


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        (None, {}, "expected a list of texts, a dataset or a corpus's name, got NoneType"),
        (b"abcdefgh", {}, "expected a list of texts, a dataset or a corpus's name, got bytes"),
        (
            {"train": _dataset(), "test": _dataset()},
            {},
            "expected texts or one split of a dataset, got the splits 'train', 'test'",
        ),
        ([1, 2], {}, "texts, record 1: expected an object, got int; fix it"),
        ([], {}, "texts is empty; expected at least one record"),
        (
            ["abcdefgh"],
            {"split": "test"},
            "split is for hub datasets, got it for texts in memory; leave it out",
        ),
        (
            ["abcdefgh"],
            {"stream": True},
            "stream is for hub datasets, got it for texts in memory; leave it out",
        ),
    ],
)
def test_invalid_corpus_in_memory_is_rejected(
    corpus: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError) as error:
        load_blocks(corpus, tiny_tokenizer(), seq_len=4, **options)
    assert str(error.value) == message


def test_blocks_are_one_readable_line_in_a_console() -> None:
    blocks = load_blocks(["abcdefgh"], tiny_tokenizer(), seq_len=4)
    assert repr(blocks) == "<TokenBlocks: texts, 2 sequences of 4 tokens>"

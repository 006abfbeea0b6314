"""BOS: the tokenizer decides, and every record, sequence and prompt begins alike."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.corpora import EOS
from support.tiny_models import made_tokenizer, tiny_bos_tokenizer, tiny_tokenizer
from tokenizers.normalizers import Replace

from cascade.core.errors import CorpusError, UsageError
from cascade.core.schema import UNSET
from cascade.corpora.blocks import load_blocks
from cascade.corpora.bos import adds_bos, bos_rule
from cascade.corpora.reading import CorpusReading

BOS = 97
TEXTS = [f"{number} {letter * 5}" for number, letter in enumerate("abcdefgh")]


# --- What the tokenizer does -----------------------------------------------------------------


def flags_that_lie(template: str, *, flag: bool) -> Any:
    tokenizer = made_tokenizer(template, bos_token="<bos>")
    tokenizer.init_kwargs["add_bos_token"] = flag
    return tokenizer


def always_adding() -> Any:
    """Return a tokenizer that begins every text with BOS, whatever it is asked for."""

    class Always:
        bos_token_id, eos_token_id, is_fast = BOS, EOS, False

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [BOS, *tiny_tokenizer()(text)["input_ids"]]}

    return Always()


def of_unknown_a(template: str) -> Any:
    """Return a tokenizer whose unknown token is its BOS, and to which the letter a is unknown."""
    tokenizer = made_tokenizer(template, bos_token="<unk>")
    tokenizer.backend_tokenizer.normalizer = Replace("a", "\u00e4")
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (tiny_tokenizer(), False),
        (
            made_tokenizer("$A", bos_token="<bos>"),
            False,
        ),  # Qwen and GPT-2 name one, and do not add it
        (made_tokenizer("<bos> $A", bos_token="<bos>"), True),
        (made_tokenizer("<bos> $A <eos>", bos_token="<bos>"), True),
        (made_tokenizer("<eos> $A", bos_token="<eos>"), True),  # OPT: BOS is EOS
        (made_tokenizer("$A <eos>", bos_token="<eos>"), False),
        (made_tokenizer("$A <eos>", bos_token="<bos>"), False),
        (made_tokenizer("<cls> $A <sep>", cls_token="<cls>", sep_token="<sep>"), False),
        (made_tokenizer("<bos> <en> $A", bos_token="<bos>", sep_token="<en>"), True),
        (made_tokenizer("<en> <bos> $A", bos_token="<bos>", sep_token="<en>"), False),
        (flags_that_lie("$A", flag=True), False),
        (flags_that_lie("<bos> $A", flag=False), True),
        (of_unknown_a("$A"), False),
        (of_unknown_a("$A <eos>"), False),
        (of_unknown_a("<unk> $A"), True),
        (always_adding(), True),
    ],
)
def test_bos_is_what_the_tokenizer_puts_before_a_text(tokenizer: Any, expected: bool) -> None:
    assert adds_bos(tokenizer) is expected
    assert bos_rule(tokenizer).recorded == ("yes" if expected else UNSET)
    assert bos_rule(tokenizer, "no").recorded == ("no" if expected else UNSET)


def test_a_choice_that_does_not_exist_and_a_missing_bos_token_are_refused() -> None:
    with pytest.raises(UsageError, match="expected --bos auto, yes, no, got 'maybe'"):
        load_blocks(TEXTS, tiny_tokenizer(), seq_len=4, bos="maybe")
    with pytest.raises(
        UsageError, match="with a BOS token to read text with BOS, got none; use --bos no"
    ):
        load_blocks(TEXTS, tiny_tokenizer(), seq_len=4, bos="yes")


# --- Corpora ---------------------------------------------------------------------------------

TEXT = st.text("abc", max_size=9)


@given(
    # The last record makes sure that there are enough tokens for a sequence.
    records=st.lists(TEXT, max_size=7).map(lambda texts: [*texts, "abc" * 14]),
    seq_len=st.integers(2, 9),
)
def test_every_record_and_every_sequence_begins_with_one_bos(
    records: list[str], seq_len: int
) -> None:
    blocks = load_blocks(records, tiny_bos_tokenizer(), seq_len=seq_len, marks=True)
    assert (blocks.ids[:, 0] == BOS).all()
    assert not ((blocks.ids[:, 1:] == BOS) & (blocks.ids[:, :-1] == BOS)).any()
    # Without BOS the text is the same, record by record, token by token.
    plain = load_blocks(records, tiny_bos_tokenizer(), seq_len=2, bos="no").ids.ravel()
    kept = blocks.ids != BOS
    text = blocks.ids[kept]
    assert (text[: len(plain)] == plain[: len(text)]).all()
    assert (blocks.record_of[kept] == _record_numbers(records)[: len(text)]).all()  # type: ignore[index]
    assert not blocks.response[~kept].any()  # type: ignore[index]
    assert blocks.response[kept].all()  # type: ignore[index]
    for number, row in itertools.product(range(2, len(records) + 1), range(len(blocks.ids))):
        first = np.flatnonzero(blocks.record_of[row] == number)[:1]  # type: ignore[index]
        assert all(blocks.ids[row, place] == BOS for place in first)


def _record_numbers(records: list[str]) -> np.ndarray[Any, Any]:
    # The EOS between two records belongs to the first.
    sizes = [len(text) + 1 for text in records]
    return np.repeat(np.arange(1, len(records) + 1), sizes)


def test_without_bos_the_ids_are_those_of_a_tokenizer_that_has_none() -> None:
    plain = load_blocks(TEXTS, tiny_tokenizer(), seq_len=4)
    for tokenizer, bos, recorded in (
        (tiny_bos_tokenizer(), "no", "no"),
        (made_tokenizer("$A", bos_token="<bos>"), "auto", UNSET),
        (made_tokenizer("$A", bos_token="<bos>"), "no", UNSET),
    ):
        found = load_blocks(TEXTS, tokenizer, seq_len=4, bos=bos)
        assert found.fingerprint() == plain.fingerprint()
        assert found.provenance().bos == recorded
    forced = load_blocks(TEXTS, made_tokenizer("$A", bos_token="<bos>"), seq_len=4, bos="yes")
    assert forced.fingerprint() == load_blocks(TEXTS, tiny_bos_tokenizer(), seq_len=4).fingerprint()
    assert forced.provenance().bos == "yes"


def test_one_token_is_both_where_eos_is_bos() -> None:
    tokenizer = made_tokenizer("<eos> $A", bos_token="<eos>")
    blocks = load_blocks(["abc", "def"], tokenizer, seq_len=8)
    assert tokenizer.convert_ids_to_tokens(blocks.ids[0].tolist()) == [
        *("<eos>", "a", "b", "c", "<eos>", "d", "e", "f")
    ]


def test_texts_that_begin_with_bos_get_no_second_one_and_with_no_lose_it() -> None:
    texts = ["<bos>abc"]
    for tokenizer in (tiny_bos_tokenizer(), always_adding()):
        assert load_blocks(texts, tokenizer, seq_len=4).ids[0, :2].tolist()[0] == BOS
        assert BOS not in load_blocks(["abcdef"], tokenizer, seq_len=4, bos="no").ids
    blocks = load_blocks(texts, tiny_bos_tokenizer(), seq_len=4)
    assert (blocks.ids == BOS).sum() == 1
    assert BOS not in load_blocks(texts, tiny_bos_tokenizer(), seq_len=3, bos="no").ids


def test_max_tokens_and_shorter_readings_give_the_same_sequences() -> None:
    whole = load_blocks(TEXTS, tiny_bos_tokenizer(), seq_len=5)
    few = load_blocks(TEXTS, tiny_bos_tokenizer(), seq_len=5, max_tokens=17)
    assert few.tokens == 15
    assert (few.ids == whole.ids[:3]).all()
    again = CorpusReading.of(few.provenance())
    assert (load_blocks(TEXTS, tiny_bos_tokenizer(), **again.options()).ids == few.ids).all()


def test_a_corpus_of_empty_records_is_refused_with_bos_too() -> None:
    with pytest.raises(CorpusError, match="are EOS, because most of its records are empty"):
        load_blocks([*[""] * 20, "ab"], tiny_bos_tokenizer(), seq_len=4)

"""Test that invalid splits are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.reference_early_exit import (
    a_stack,
    one_line,
)
from support.tiny_hard_tokens import (
    Splits,
    some_splits,
)

from cascade.core.errors import (
    CorpusError,
)
from cascade.stages.hard_tokens.collecting import collect_hard
from cascade.stages.hard_tokens.plan import CollectingConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"train": p["train"]}, "expected the splits train and held-out, got train"),
        (lambda p: p | {"train": replace(p["train"], response=None)}, "marks=True"),
        (
            lambda p: p | {"held-out": replace(p["held-out"], record_of=None)},
            "in the held-out split",
        ),
        (lambda p: p | {"train": replace(p["train"], ids=p["train"].ids[:3])}, "marks=True"),
        (lambda p: p | {"train": some_splits(8, 3, 11)["train"]}, "one length, got 11 tokens in"),
        (lambda _: some_splits(3, 3, 65), "sequences of 65 tokens exceed the model's 64 positions"),
    ],
)
def test_invalid_splits_are_refused(
    tmp_path: Path, change: Callable[[Splits], Splits], message: str
) -> None:
    config = CollectingConfig(layer=3, hard_ratio=0.5)
    with pytest.raises(CorpusError) as caught:
        collect_hard(a_stack("llama"), change(some_splits()), tmp_path / "d", config)
    assert message in one_line(caught)
    assert not (tmp_path / "d").exists()


def test_held_out_sequences_in_the_training_split_give_a_note(tmp_path: Path) -> None:
    train = some_splits()["train"]
    seen = replace(
        train, ids=train.ids[:3], record_of=train.record_of[:3], response=train.response[:3]
    )
    found = collect_hard(
        a_stack("llama"),
        {"train": train, "held-out": seen},
        tmp_path / "d",
        CollectingConfig(layer=3, hard_ratio=0.5),
    )
    (note,) = found.notes
    assert note.startswith("3 of the held-out sequences are also in the training split")

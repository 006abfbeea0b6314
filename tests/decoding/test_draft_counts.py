"""Lossless decoding counts its drafts by position and by proposer."""

from __future__ import annotations

from typing import Any

import torch
from support.drafting import FREE, Oracle, Stubborn
from support.tiny_models import VOCABULARY, random_ids, tiny_model

from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.growing_text import Generation
from cascade.models.stack import DecoderStack

_NEW = 16


def generated(drafter: Any, ids: torch.Tensor, **settings: Any) -> Generation:
    early = EarlyExit(DecoderStack(tiny_model("llama")))
    settings = {"do_sample": False, "eos_token_id": (), "max_new_tokens": _NEW} | settings
    made = early.generate(
        ids,
        torch.ones_like(ids),
        verify=True,
        drafter=drafter,
        pass_costs=FREE,
        return_dict_in_generate=True,
        **settings,
    )
    assert isinstance(made, Generation)
    return made


def own_text(ids: torch.Tensor) -> list[int]:
    made = EarlyExit(DecoderStack(tiny_model("llama"))).generate(
        ids, torch.ones_like(ids), do_sample=False, eos_token_id=(), max_new_tokens=_NEW
    )
    assert isinstance(made, torch.Tensor)
    found: list[int] = made[0].tolist()
    return found


def check_sums(made: Generation) -> None:
    assert made.sources is not None
    assert len(made.proposed) == len(made.proposers)
    assert sum(made.proposed) == made.drafted
    assert sum(right for _, right in made.positions) == made.accepted
    assert int((made.sources > 0).sum()) == made.accepted
    tries = [drafts for drafts, _ in made.positions]
    assert tries == sorted(
        tries, reverse=True
    )  # a draft that reaches a position reaches those before
    assert all(right <= drafts for drafts, right in made.positions)


def test_all_of_a_perfect_drafters_tokens_are_accepted_at_every_position() -> None:
    ids = random_ids(1, 8)
    made = generated(Oracle({0: own_text(ids)}, VOCABULARY, length=4), ids)
    check_sums(made)
    first, right = made.positions[0]
    assert first == right == made.passes
    assert "oracle" in made.proposers
    assert made.proposed[made.proposers.index("oracle")] > 0


def test_wrong_drafts_are_counted_but_never_as_accepted() -> None:
    ids = random_ids(1, 8)
    text = own_text(ids)
    wrong = next(token for token in range(2, VOCABULARY) if token not in text)
    made = generated(Stubborn([wrong] * 3), ids)
    check_sums(made)
    number = made.proposers.index("stubborn") + 1
    assert made.proposed[number - 1] > 0
    assert made.sources is not None
    assert not bool((made.sources == number).any())


def test_trees_count_each_position_once() -> None:
    ids = random_ids(1, 8)
    made = generated(Oracle({0: own_text(ids)}, VOCABULARY, siblings=2, length=3), ids)
    check_sums(made)
    assert made.positions[0][0] <= made.passes
    assert made.drafted > sum(drafts for drafts, _ in made.positions)


def test_an_end_token_inside_a_draft_is_counted_once() -> None:
    ids = random_ids(1, 8)
    text = own_text(ids)
    made = generated(Oracle({0: text}, VOCABULARY, length=6), ids, eos_token_id=text[8 + 3])
    check_sums(made)
    assert made.accepted > 0


def test_rows_of_a_batch_are_counted_together() -> None:
    ids = random_ids(2, 8)
    texts = {row: own_text(ids[row : row + 1]) for row in range(2)}
    made = generated(Oracle(texts, VOCABULARY, length=3), ids)
    check_sums(made)
    assert made.positions[0][0] > made.passes  # two drafts in most passes

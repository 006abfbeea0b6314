"""Generated texts on disk: reproducible, continued after an interruption, refused if others."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.disk import contents
from support.tiny_drafters import BRIEF, LAYERS, a_drafted_stack
from support.tiny_models import random_ids

from cascade.core.errors import OutputError
from cascade.drafters.records import PromptCorpus
from cascade.drafters.texts import shards
from cascade.drafters.texts.batches import GeneratedText, Job
from cascade.drafters.texts.prompts import Prompts
from cascade.drafters.texts.shards import TextPlan, generate_texts


class Counted:
    """Counts what is reported, and stops after a number of passes."""

    def __init__(self, stop: int | None = None) -> None:
        self.starts: list[tuple[int, int]] = []
        self.tokens, self.passes, self.stop = 0, 0, stop

    def generating(self, tokens: int, done: int) -> None:
        self.starts.append((tokens, done))

    def generated(self, tokens: int) -> None:
        self.tokens += tokens
        self.passes += 1
        if self.passes == self.stop:
            raise KeyboardInterrupt


def some_prompts(*, around: bool = False, train: int = 30) -> Prompts:
    ids = [tuple(random_ids(1, 5 + n % 9, seed=n)[0].tolist()) for n in range(train + 12)]
    corpus = PromptCorpus(
        source="here", records=42, train=train, held_out=12, too_long=0, fingerprint=f"{train}"
    )
    turns = ((5, 6), (7, 8)) if around else None
    return Prompts(tuple(ids[:train]), tuple(ids[train:]), (corpus,), turns)


def a_plan(prompts: Prompts | None = None, **changes: Any) -> TextPlan:
    config = replace(BRIEF, **changes)
    return TextPlan(a_drafted_stack(), prompts or some_prompts(), config, LAYERS, (1,))


def made(
    plan: TextPlan, folder: Path, progress: Any = None, *, overwrite: bool = False
) -> tuple[list[GeneratedText], list[GeneratedText]]:
    return generate_texts(plan, folder, overwrite=overwrite, progress=progress or Counted())


def ids_of(texts: list[GeneratedText]) -> list[list[int]]:
    return [text.ids.tolist() for text in texts]


def test_texts_are_generated_until_there_are_enough_tokens(tmp_path: Path) -> None:
    shown = Counted()
    train, held_out = made(a_plan(), tmp_path, shown)
    total = sum(text.new_tokens for text in train)
    last = train[-24:]  # a shard
    assert total - sum(text.new_tokens for text in last) < 400 <= total
    assert shown.starts == [(400, 0)]
    # The first token of a text is chosen with its prompt.
    assert shown.tokens == total - len(train)
    assert len(held_out) == 8
    assert all(text.greedy for text in held_out)


def test_held_out_texts_are_spread_over_the_held_out_prompts(tmp_path: Path) -> None:
    prompts = some_prompts()
    _, held_out = made(a_plan(prompts, held_out_texts=3), tmp_path)
    found = [tuple(text.ids[: text.prompt].tolist()) for text in held_out]
    assert found == [prompts.held_out[at] for at in (2, 6, 10)]


def test_training_prompts_are_continued_greedily_once_and_sampled_after_that(
    tmp_path: Path,
) -> None:
    prompts = some_prompts(train=10)
    train, _ = made(a_plan(prompts, tokens=900), tmp_path)
    seen = [tuple(text.ids[: text.prompt].tolist()) for text in train]
    assert set(seen) == set(prompts.train)
    greedy = [prompt for prompt, text in zip(seen, train, strict=True) if text.greedy]
    assert sorted(greedy) == sorted(prompts.train)


def test_no_held_out_prompt_is_trained_on(tmp_path: Path) -> None:
    prompts = some_prompts(around=True)
    train, _ = made(a_plan(prompts, tokens=900), tmp_path)
    assert not {tuple(text.ids[: text.prompt].tolist()) for text in train} & set(prompts.held_out)


def test_an_instruction_that_is_held_out_or_too_short_is_not_answered() -> None:
    words = list(range(20, 30))
    held_out = (5, 6, *words, 7, 8)
    plan = a_plan(replace_prompts(some_prompts(around=True), held_out))

    def answered(*new: int) -> tuple[int, ...] | None:
        ids = torch.tensor([5, 6, *new], dtype=torch.int32)
        job = Job((5, 6), 1.0, "0", 40, instruction=True)
        answer = plan.answer(job, GeneratedText(ids, 2, False, torch.zeros(0)))
        return None if answer is None else answer.ids

    assert answered(*words, 31, 1) == (5, 6, *words, 31, 7, 8)
    assert answered(*words, 1) is None  # held out
    assert answered(*words, 31) is None  # has no end
    assert answered(20, 21, 22, 23, 24, 1) is None  # five words
    assert answered(*words * 4, 1) is None  # longer than a prompt


def replace_prompts(prompts: Prompts, held_out: tuple[int, ...]) -> Prompts:
    return dataclasses.replace(prompts, held_out=(*prompts.held_out, held_out))


def test_own_instructions_are_answered_behind_the_turn_of_the_template(tmp_path: Path) -> None:
    plan = a_plan(some_prompts(around=True), tokens=1500, longest_prompt=40, own_instructions=0.8)
    shown = Counted()
    train, _ = made(plan, tmp_path, shown)
    # Tokens of instructions are not counted.
    assert shown.tokens == sum(text.new_tokens - 1 for text in train)
    prompts = set(plan.prompts.train)
    own = [text for text in train if tuple(text.ids[: text.prompt].tolist()) not in prompts]
    assert len(own) > 3
    for text in own:
        ids = text.ids[: text.prompt].tolist()
        assert (ids[:2], ids[-2:]) == ([5, 6], [7, 8])
        assert 1 not in ids
    assert {text.greedy for text in own} == {True, False}


def test_the_same_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        made(a_plan(some_prompts(around=True)), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    made(a_plan(some_prompts(around=True), seed=1), tmp_path / "c")
    assert contents(tmp_path / "a").keys() == contents(tmp_path / "c").keys()
    assert (
        contents(tmp_path / "a")["00000.safetensors"]
        != contents(tmp_path / "c")["00000.safetensors"]
    )


@pytest.mark.parametrize("stop", [2, 30, 45])
def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path: Path, stop: int) -> None:
    made(a_plan(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        made(a_plan(), tmp_path / "cut", Counted(stop))
    before = len(list((tmp_path / "cut").glob("0*.safetensors")))
    shown = Counted()
    made(a_plan(), tmp_path / "cut", shown)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert (shown.starts[0][1] > 0) == (before > 0)


def test_finished_texts_are_read_and_not_generated_again(tmp_path: Path) -> None:
    plan = a_plan()
    first = made(plan, tmp_path)
    shown = Counted()
    again = made(plan, tmp_path, shown)
    assert (shown.starts, shown.tokens) == ([], 0)
    for one, other in zip(itertools.chain(*first), itertools.chain(*again), strict=True):
        assert (one.prompt, one.greedy) == (other.prompt, other.greedy)
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.features, other.features)


def test_more_tokens_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    few, _ = made(a_plan(), tmp_path)
    more, _ = made(a_plan(tokens=900), tmp_path)
    assert ids_of(more)[: len(few)] == ids_of(few)
    assert sum(text.new_tokens for text in more) >= 900
    assert ids_of(made(a_plan(), tmp_path)[0]) == ids_of(few)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],
        lambda data: b"",
        lambda data: b"x" * 99,
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    ],
)
def test_a_torn_or_edited_shard_is_generated_again(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    made(a_plan(), tmp_path)
    before = contents(tmp_path)
    path = tmp_path / "00000.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    made(a_plan(), tmp_path)
    assert contents(tmp_path) == before


def test_texts_of_other_arguments_are_refused_or_replaced(tmp_path: Path) -> None:
    made(a_plan(), tmp_path)
    before = contents(tmp_path)
    message = r"holds texts of another run \(seed\); continue with its arguments, .* --overwrite"
    with pytest.raises(OutputError, match=message):
        made(a_plan(seed=1), tmp_path)
    assert contents(tmp_path) == before
    found, _ = made(a_plan(seed=1), tmp_path, overwrite=True)
    assert ids_of(found) == ids_of(made(a_plan(seed=1), tmp_path / "new")[0])


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_texts_with_a_torn_request_are_refused(tmp_path: Path, content: str) -> None:
    made(a_plan(), tmp_path)
    (tmp_path / "request.json").write_text(content)
    with pytest.raises(OutputError, match=r"its request.json is missing or torn"):
        made(a_plan(), tmp_path)


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"its request.json is missing or torn"):
        made(a_plan(), tmp_path)


def test_a_disk_that_is_too_small_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match=r"needs about 0.000205 GB, but the disk has 1e-06 GB"):
        made(a_plan(), tmp_path)

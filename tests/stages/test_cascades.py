"""Cascades: the laws of early exit hold across stages, and what is saved is what comes back."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.disk import contents, largest_file
from support.reference_early_exit import (
    ALL_FAMILIES,
    CLOSE,
    LAYERS,
    SKIPPING_FAMILIES,
    a_bf16_stack,
    a_stack,
    apart,
    by_hand,
    difference,
    one_line,
    own_logits,
    random_blocks,
    some_heads,
    some_mask,
    state_of,
    visited,
)
from support.tiny_models import random_ids, tiny_model
from support.tiny_stages import TEXT, a_cascade, a_moved_stage, ends, share_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from cascade.core.errors import CascadeError, ModelError, OutputError, RecordError, UsageError
from cascade.decoding.early_exit import Propagation, Score
from cascade.decoding.generation import Generation
from cascade.exits.head_fitting import fit_heads
from cascade.models.stack import DecoderStack
from cascade.stages import cascades
from cascade.stages.cascades import CONFIG, Cascade, Entry
from cascade.stages.stage import new_stage

INF = math.inf
NEW = 8
MASK = some_mask(3, 20)
#: The first row is three tokens shorter, padded on the left.
PROMPT, PROMPT_MASK = random_ids(3, 9, seed=3), some_mask(3, 9)
BOTH = pytest.mark.parametrize("propagation", ["frozen", "exact"])
STAGES = pytest.mark.parametrize("stages", [1, 2])


def logits_of(score: Score) -> Tensor:
    assert score.logits is not None
    return score.logits


def generated(cascade: Cascade, *args: Any, **settings: Any) -> Generation:
    settings = {"max_new_tokens": NEW, "eos_token_id": None} | settings
    result = cascade.generate(*args, return_dict_in_generate=True, **settings)
    assert isinstance(result, Generation)
    return result


def own_generate(stack: DecoderStack, ids: Tensor, mask: Tensor) -> Tensor:
    model: Any = stack.model
    settings = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 1}
    sequences: Tensor = model.generate(ids, attention_mask=mask, **settings)
    return sequences


# --- The two ends -----------------------------------------------------------------------------


@BOTH
@STAGES
@ALL_FAMILIES
def test_where_everybody_leaves_it_is_the_base(
    family: str, stages: int, propagation: Propagation
) -> None:
    stack = a_stack(family)
    cascade = ends(stack, [-INF] * stages, propagation=propagation)
    for mask in (None, MASK):
        expected = own_logits(stack, TEXT, mask)
        valid = torch.ones_like(TEXT).bool() if mask is None else mask.bool()
        score = cascade.score(TEXT, mask, keep_logits=True)
        assert difference(logits_of(score)[valid], expected[valid]) == 0.0
        assert bool((score.exit_layers[valid] == LAYERS).all())


@BOTH
@STAGES
@ALL_FAMILIES
def test_where_nobody_leaves_it_is_the_base_with_all_stages_appended(
    family: str, stages: int, propagation: Propagation
) -> None:
    stack = a_stack(family)
    cascade = ends(stack, [INF] * stages, propagation=propagation)
    expected = own_logits(cascade.stack, TEXT)
    score = cascade.score(TEXT, keep_logits=True)
    assert cascade.stack.num_layers == LAYERS + (2, 3)[stages - 1]
    assert difference(logits_of(score), expected) == 0.0
    assert difference(own_logits(stack, TEXT), expected) > 0.1, "the stages do nothing"
    for fewer in range(stages):
        alone = cascade.score(TEXT, stages=fewer, keep_logits=True)
        assert torch.equal(logits_of(alone), own_logits(cascade.stack_below(fewer), TEXT))


@ALL_FAMILIES
def test_a_first_stage_that_everybody_enters_and_a_second_that_nobody_does(family: str) -> None:
    cascade = ends(a_stack(family), [INF, -INF])
    score = cascade.score(TEXT, keep_logits=True)
    assert torch.equal(logits_of(score), own_logits(cascade.stack_below(1), TEXT))
    assert bool((score.exit_layers == LAYERS + 2).all())


@ALL_FAMILIES
def test_an_untrained_stage_changes_no_token_whoever_enters(family: str) -> None:
    stack = a_stack(family)
    cascade = Cascade(stack)
    cascade.add_stage(new_stage(stack, 2), Entry(3, share_of(stack, TEXT, 3)))
    score = cascade.score(TEXT, keep_logits=True)
    assert set(score.exit_layers.flatten().tolist()) == {LAYERS, LAYERS + 2}
    assert difference(logits_of(score), own_logits(stack, TEXT)) <= CLOSE


# --- In between -------------------------------------------------------------------------------


@BOTH
@STAGES
@ALL_FAMILIES
def test_a_mixture_is_the_mixed_pass_by_hand(
    family: str, stages: int, propagation: Propagation
) -> None:
    cascade = a_cascade(family, propagation, stages=stages)
    exits = cascade.early_exit().exits
    for mask in (None, MASK):
        score = cascade.score(TEXT, mask, keep_logits=True)
        expected = by_hand(cascade.stack, TEXT, exits, mask, propagation=propagation)
        valid = torch.ones_like(TEXT).bool() if mask is None else mask.bool()
        places = [LAYERS, LAYERS + 2, LAYERS + 3][: stages + 1]
        assert set(score.exit_layers[valid].tolist()) == {*places}
        assert torch.equal(score.exit_layers, expected.exit_layers)
        assert apart(logits_of(score), expected.logits * valid[..., None]) <= CLOSE


@BOTH
@ALL_FAMILIES
def test_a_left_padded_row_is_the_row_alone(family: str, propagation: Propagation) -> None:
    cascade = a_cascade(family, propagation)
    together = cascade.score(TEXT, some_mask(3, 20, left=5), keep_logits=True)
    alone = cascade.score(TEXT[:1, 5:], keep_logits=True)
    assert torch.equal(together.exit_layers[:1, 5:], alone.exit_layers)
    assert apart(logits_of(together)[:1, 5:], logits_of(alone)) <= CLOSE


@ALL_FAMILIES
def test_exact_hard_tokens_are_the_extended_models(family: str) -> None:
    cascade = a_cascade(family, "exact")
    score = cascade.score(TEXT, keep_logits=True)
    hard = score.exit_layers == cascade.stack.num_layers
    assert 0 < int(hard.sum()) < hard.numel()
    expected = own_logits(cascade.stack, TEXT)
    assert difference(logits_of(score)[hard], expected[hard]) == 0.0


@ALL_FAMILIES
def test_an_easy_tokens_logits_are_the_bases_and_no_stage_moves_them(family: str) -> None:
    cascade = a_cascade(family)
    score = cascade.score(TEXT, keep_logits=True)
    easy = score.exit_layers == LAYERS
    assert difference(logits_of(score)[easy], own_logits(a_stack(family), TEXT)[easy]) <= CLOSE


def test_a_cascade_leaves_the_base_as_it_was() -> None:
    stack = DecoderStack(tiny_model("llama"))
    before, weights = state_of(stack), stack.weights_in_memory()
    cascade = ends(stack, [0.5, 0.5])
    cascade.score(TEXT)
    generated(cascade, PROMPT, PROMPT_MASK)
    assert state_of(stack) == before
    assert stack.weights_in_memory() == weights


def test_a_bf16_base_has_bf16_stages() -> None:
    stack = a_bf16_stack("llama")
    cascade = ends(stack, [INF])
    assert {value.dtype for value in cascade.stages[0].parameters()} == {torch.bfloat16}
    expected = own_logits(cascade.stack, TEXT).float()
    assert torch.equal(logits_of(cascade.score(TEXT, keep_logits=True)), expected)


# --- Who enters -------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neo", "bloom"])
def test_a_lower_layers_similarity_decides_who_enters(family: str, layer: int) -> None:
    stack = a_stack(family)
    threshold = share_of(stack, TEXT, layer)
    cascade = Cascade(stack)
    cascade.add_stage(a_moved_stage(stack), Entry(layer, threshold))
    history = visited(stack, TEXT)
    similarity = torch.cosine_similarity(history[layer - 1], history[layer], dim=-1)
    hard = similarity.double() < threshold
    # A similarity at the threshold itself may fall on either side.
    sure = (similarity.double() - threshold).abs() > 1e-6
    got = cascade.score(TEXT).exit_layers == LAYERS + 2
    assert torch.equal(got[sure], hard[sure])
    assert 0 < int(got.sum()) < got.numel()


def test_a_stage_can_be_entered_by_the_gap_of_the_bases_own_answer() -> None:
    stack = a_stack("llama")
    probabilities = own_logits(stack, TEXT).softmax(dim=-1).topk(2, dim=-1).values
    gap = (probabilities[..., 0] - probabilities[..., 1]).double()
    threshold = gap.quantile(0.5).item()
    cascade = Cascade(stack)
    cascade.add_stage(a_moved_stage(stack), Entry(LAYERS, threshold, "top2_gap"))
    got = cascade.score(TEXT).exit_layers == LAYERS + 2
    assert torch.equal(got, gap < threshold)


def test_a_stage_can_be_entered_at_random() -> None:
    stack = a_stack("llama")
    cascade = Cascade(stack)
    cascade.add_stage(a_moved_stage(stack), Entry(LAYERS, 0.3, "random"))
    ids = random_ids(20, 20, seed=5)
    entered = (cascade.score(ids).exit_layers > LAYERS).double().mean()
    assert 0.2 < entered < 0.4
    with pytest.raises(UsageError, match="the rule random decides where tokens leave, layer 4"):
        Cascade(stack).add_stage(a_moved_stage(stack), Entry(3, 0.3, "random"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_fitted_heads_easy_tokens_leave_at_the_layer_itself(family: str) -> None:
    stack, heads = a_stack(family), some_heads(family)
    cascade = Cascade(stack)
    entry = Entry(2, share_of(stack, TEXT, 2), heads=heads)
    cascade.add_stage(a_moved_stage(stack), entry)
    score = cascade.score(TEXT, keep_logits=True)
    easy = score.exit_layers == 2
    assert set(score.exit_layers.flatten().tolist()) == {2, LAYERS + 2}
    ridge = heads.head(stack, 2).logits(visited(stack, TEXT)[2][easy])
    assert apart(logits_of(score)[easy], ridge.float()) <= CLOSE
    if cascade.early_exit().fallback_reason is None:
        hard = int((~easy).sum())
        assert score.counts.layer_rows == [60, 60, *[hard] * 4]


def test_a_second_stage_is_entered_above_the_first() -> None:
    cascade = ends(a_stack("llama"), [0.5])
    heads = fit_heads(cascade.stack, random_blocks(), [2])
    with pytest.raises(UsageError, match=r"at layer 2, expected one above .* layer 4") as caught:
        cascade.add_stage(a_moved_stage(cascade.stack), Entry(2, 0.5, heads=heads))
    one_line(caught)
    assert len(cascade.stages) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry(0, 0.5), "expected an exit layer in 1..4, got 0"),
        (Entry(5, 0.5), "expected an exit layer in 1..4, got 5"),
        (Entry(3, 2.0), "expected a threshold in there"),
        (Entry(3, math.nan), "expected a threshold in there"),
        (Entry(3, 0.5, "nearness"), "expected a rule among"),
        (Entry(3, 0.5, "top2_gap"), "expected cosine or mean_cosine to decide by layer 3"),
    ],
)
def test_an_entry_that_cannot_be_is_refused(entry: Entry, message: str) -> None:
    cascade = Cascade(a_stack("llama"))
    with pytest.raises(UsageError, match=message) as caught:
        cascade.add_stage(a_moved_stage(a_stack("llama")), entry)
    one_line(caught)
    assert (cascade.stages, cascade.stack) == ([], cascade.base)


def test_ridge_propagation_is_refused() -> None:
    with pytest.raises(UsageError, match="among frozen, exact") as caught:
        Cascade(a_stack("llama"), propagation="ridge")
    one_line(caught)


@pytest.mark.parametrize("stages", [-1, 3])
def test_no_more_stages_than_there_are(stages: int) -> None:
    with pytest.raises(UsageError, match=f"expected 0 to 2 stages, got {stages}"):
        a_cascade("llama").score(TEXT, stages=stages)


# --- Generating is scoring --------------------------------------------------------------------

#: By cosine most tiny models let all or none of what they write go on; by random some always do.
RULES = pytest.mark.parametrize("rule", ["cosine", "random"])


@RULES
@BOTH
@ALL_FAMILIES
def test_generating_is_scoring_the_generated_text(
    family: str, propagation: Propagation, rule: str
) -> None:
    cascade = a_cascade(family, propagation, rule=rule)
    result = generated(cascade, PROMPT, PROMPT_MASK)
    start = PROMPT.shape[1]
    new = PROMPT_MASK.new_ones((3, NEW))
    score = cascade.score(result.sequences, torch.cat([PROMPT_MASK, new], dim=1))
    assert result.sequences.shape == (3, start + NEW)
    assert torch.equal(score.predictions[:, start - 1 : -1], result.sequences[:, start:])
    assert torch.equal(score.exit_layers[:, start - 1 : -1], result.exit_layers)
    if rule == "random":
        assert len(set(result.exit_layers.flatten().tolist())) == 3, "too few exits to prove it"


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3_text"])
def test_each_row_of_a_batch_is_generated_as_alone(family: str) -> None:
    cascade = a_cascade(family, rule="random")
    together = generated(cascade, PROMPT, PROMPT_MASK)
    for row, first in enumerate((3, 0, 0)):
        alone = generated(cascade, PROMPT[row : row + 1, first:])
        assert torch.equal(together.sequences[row, first:], alone.sequences[0])
        assert torch.equal(together.exit_layers[row], alone.exit_layers[0])


@pytest.mark.parametrize("rule", ["cosine", "random"])
@ALL_FAMILIES
def test_verified_it_is_what_transformers_generates_with_the_extended_model(
    family: str, rule: str
) -> None:
    cascade = a_cascade(family, "exact", rule=rule)
    result = generated(cascade, PROMPT, PROMPT_MASK, verify=True)
    assert torch.equal(result.sequences, own_generate(cascade.stack, PROMPT, PROMPT_MASK))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_generating_without_stages_is_the_base(family: str) -> None:
    cascade = a_cascade(family)
    ids = cascade.generate(PROMPT, PROMPT_MASK, stages=0, max_new_tokens=NEW, eos_token_id=None)
    assert isinstance(ids, Tensor)
    assert torch.equal(ids, own_generate(a_stack(family), PROMPT, PROMPT_MASK))


# --- What is computed -------------------------------------------------------------------------


@STAGES
@SKIPPING_FAMILIES
def test_a_stage_computes_its_own_tokens_and_no_others(family: str, stages: int) -> None:
    cascade = a_cascade(family, stages=stages)
    assert cascade.early_exit().fallback_reason is None
    score = cascade.score(TEXT)
    hard = [int((score.exit_layers > place).sum()) for place in (LAYERS, LAYERS + 2)][:stages]
    assert 0 < hard[-1] <= hard[0] < TEXT.numel()
    expected = [
        {"layer_rows": rows * layers, "key_value_rows": (TEXT.numel() - rows) * layers}
        for rows, layers in zip(hard, (2, 1), strict=False)
    ]
    assert cascade.stage_rows(score.counts) == expected
    shares = cascade.exit_shares(score)
    gone = [TEXT.numel(), *hard, 0]
    assert shares == [(a - b) / TEXT.numel() for a, b in itertools.pairwise(gone)]
    assert sum(shares) == pytest.approx(1.0)


def test_where_nothing_can_be_skipped_every_row_is_counted() -> None:
    cascade = a_cascade("gpt2")
    score = cascade.score(TEXT)
    assert cascade.stage_rows(score.counts) == [
        {"layer_rows": 120, "key_value_rows": 0},
        {"layer_rows": 60, "key_value_rows": 0},
    ]


@BOTH
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_routed_states_are_those_of_the_mixed_pass(family: str, propagation: Propagation) -> None:
    cascade = a_cascade(family, propagation)
    states = visited(cascade.routed(), TEXT)
    exits = cascade.early_exit().exits
    expected = by_hand(cascade.stack, TEXT, exits, propagation="frozen").states
    assert len(states) == cascade.stack.num_layers + 1
    for got, wanted in zip(states, expected, strict=True):
        assert apart(got, wanted) <= CLOSE


def test_entries_can_be_those_of_another_cascade() -> None:
    one, other = a_cascade("llama"), a_cascade("llama", rule="random")
    same = one.entered_like(other)
    assert same.entrances == other.entrances
    assert same.stages == one.stages
    assert torch.equal(same.score(TEXT).exit_layers, other.score(TEXT).exit_layers)
    with pytest.raises(UsageError, match="expected a cascade of 2 stages, got 1"):
        one.entered_like(a_cascade("llama", stages=1))


# --- Saved and read ---------------------------------------------------------------------------


def a_saved_one(stack: DecoderStack, folder: Path, **about: Any) -> Cascade:
    cascade = Cascade(stack, propagation="exact", provenance={"made": "by hand"})
    first = a_moved_stage(stack, 2)
    first.provenance = {"steps": 7}
    heads = some_heads("llama")
    cascade.add_stage(first, Entry(2, share_of(stack, TEXT, 2), heads=heads))
    second = a_moved_stage(cascade.stack, 1, start="fresh", own_head=True)
    cascade.add_stage(second, Entry(5, 0.0))
    cascade.save_pretrained(folder, **about)
    return cascade


def check_same(one: Cascade, other: Cascade) -> None:
    assert other.propagation == one.propagation
    assert other.provenance == one.provenance
    pairs = list(zip(one.stages, other.stages, strict=True))
    for a, b in pairs:
        assert (a.fingerprint(), a.start, a.sources) == (b.fingerprint(), b.start, b.sources)
        assert (a.provenance, a.head is None) == (b.provenance, b.head is None)
    for mine, read in zip(one.entrances, other.entrances, strict=True):
        assert (mine.layer, mine.rule, mine.threshold) == (read.layer, read.rule, read.threshold)
        assert (mine.heads is None) == (read.heads is None)
    scores = [cascade.score(TEXT, keep_logits=True) for cascade in (one, other)]
    assert torch.equal(scores[0].exit_layers, scores[1].exit_layers)
    assert torch.equal(logits_of(scores[0]), logits_of(scores[1]))


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    cascade = a_saved_one(a_stack("llama"), tmp_path / "c")
    names = {"cascade_config.json", "heads-1.safetensors"}
    assert {*contents(tmp_path / "c")} == names | {f"stage-{n}.safetensors" for n in (1, 2)}
    check_same(cascade, Cascade.from_pretrained(tmp_path / "c", a_stack("llama")))


@ALL_FAMILIES
def test_every_family_comes_back(family: str, tmp_path: Path) -> None:
    a_cascade(family).save_pretrained(tmp_path / "c")
    check_same(a_cascade(family), Cascade.from_pretrained(tmp_path / "c", a_stack(family)))


@pytest.mark.parametrize("threshold", [INF, -INF, 0.0, -0.25, 0.9517])
def test_thresholds_come_back_as_they_were(threshold: float, tmp_path: Path) -> None:
    ends(a_stack("llama"), [threshold]).save_pretrained(tmp_path / "c")
    text = (tmp_path / "c" / CONFIG).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (entry,) = Cascade.from_pretrained(tmp_path / "c", a_stack("llama")).entrances
    assert (entry.threshold, entry.rule) == (threshold, "cosine")


def test_heads_fitted_behind_a_stage_come_back(tmp_path: Path) -> None:
    stack = a_stack("llama")
    cascade = ends(stack, [0.5])
    heads = fit_heads(cascade.stack, random_blocks(), [5])
    entry = Entry(5, share_of(cascade.stack, TEXT, 5), heads=heads)
    cascade.add_stage(a_moved_stage(cascade.stack), entry)
    cascade.save_pretrained(tmp_path / "c")
    check_same(cascade, Cascade.from_pretrained(tmp_path / "c", stack))


def test_a_bf16_cascade_comes_back(tmp_path: Path) -> None:
    cascade = ends(a_bf16_stack("llama"), [0.5])
    cascade.save_pretrained(tmp_path / "c")
    check_same(cascade, Cascade.from_pretrained(tmp_path / "c", a_bf16_stack("llama")))


def test_a_base_alone_comes_back(tmp_path: Path) -> None:
    Cascade(a_stack("llama")).save_pretrained(tmp_path / "c")
    read = Cascade.from_pretrained(tmp_path / "c", a_stack("llama"))
    assert torch.equal(
        logits_of(read.score(TEXT, keep_logits=True)), own_logits(a_stack("llama"), TEXT)
    )


def test_the_base_is_loaded_by_its_name(models: Path, tmp_path: Path) -> None:
    from cascade.models.loading import load

    cascade = ends(load(str(models / "tiny")), [0.5])
    cascade.save_pretrained(tmp_path / "c")
    read = Cascade.from_pretrained(str(tmp_path / "c"))
    check_same(cascade, read)
    half = Cascade.from_pretrained(tmp_path / "c", dtype="bfloat16")
    assert half.stack.dtype == torch.bfloat16
    assert {value.dtype for value in half.stages[0].parameters()} == {torch.bfloat16}


def test_a_second_save_is_refused_and_the_first_stays(tmp_path: Path) -> None:
    cascade = a_saved_one(a_stack("llama"), tmp_path / "c")
    before = contents(tmp_path / "c")
    with pytest.raises(OutputError, match="holds another run") as caught:
        a_cascade("llama").save_pretrained(tmp_path / "c")
    one_line(caught)
    assert contents(tmp_path / "c") == before
    a_cascade("llama").save_pretrained(tmp_path / "c", overwrite=True)
    check_same(a_cascade("llama"), Cascade.from_pretrained(tmp_path / "c", cascade.base))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_half_written(overwrite: bool, tmp_path: Path) -> None:
    if overwrite:
        ends(a_stack("llama"), [0.5]).save_pretrained(tmp_path / "c")
    before = contents(tmp_path)
    with largest_file(20_000), pytest.raises(OutputError) as caught:
        a_cascade("llama").save_pretrained(tmp_path / "c", overwrite=overwrite)
    one_line(caught)
    assert contents(tmp_path) == before


def test_a_fault_in_between_leaves_the_earlier_cascade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends(a_stack("llama"), [0.5]).save_pretrained(tmp_path / "c")
    before = contents(tmp_path)

    def stopped(path: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(cascades, "file_hash", stopped)
    with pytest.raises(KeyboardInterrupt):
        a_cascade("llama").save_pretrained(tmp_path / "c", overwrite=True)
    assert contents(tmp_path) == before


def test_a_cascade_goes_to_a_hub_and_comes_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"

    @dataclass
    class Made:
        repo_id: str

    class Api:
        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Made:
            assert exist_ok
            assert private
            return Made(f"someone/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
            shutil.copytree(folder_path, hub / repo_id)
            return f"{repo_id}: {commit_message}"

    def snapshot(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (revision, CONFIG in allow_patterns) == ("v2", True)
        if not (hub / repo_id).is_dir():
            raise ConnectionError(f"no {repo_id} at all\nnor anything like it")
        return str(hub / repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    cascade = a_cascade("llama")
    done = cascade.push_to_hub("mine", private=True, commit_message="one more")
    assert done == "someone/mine: one more"
    read = Cascade.from_pretrained("someone/mine", a_stack("llama"), revision="v2")
    check_same(cascade, read)
    with pytest.raises(RecordError, match="no cascade someone/else: no someone/else") as caught:
        Cascade.from_pretrained("someone/else", a_stack("llama"), revision="v2")
    assert "a hub id where the hub can be reached" in one_line(caught)


def test_saving_changes_nothing_that_transformers_reads(tmp_path: Path) -> None:
    stack = DecoderStack(tiny_model("llama"))
    ends(stack, [0.5])
    stack.model.save_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(own_logits(DecoderStack(model), TEXT), own_logits(stack, TEXT))


# --- Bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("tokenizer_hash", "another tokenizer"),
        ("vocab_size", "another vocabulary"),
        ("weights_hash", "another base model"),
    ],
)
def test_a_stage_trained_for_another_base_is_refused(name: str, what: str) -> None:
    stack = DecoderStack(tiny_model("llama"), provenance={"tokenizer_hash": "sha256:own"})
    base = {
        "tokenizer_hash": "sha256:own",
        "vocab_size": 97,
        "weights_hash": stack.weights_in_memory(),
    }
    stage = a_moved_stage(stack)
    stage.provenance = {"base": base}
    Cascade(stack).add_stage(stage, Entry(3, 0.5))
    stage.provenance = {"base": base | {name: "another"}}
    with pytest.raises(ModelError, match=f"{what} \\(another, here") as caught:
        Cascade(stack).add_stage(stage, Entry(3, 0.5))
    one_line(caught)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / CONFIG).read_text())
    change(record)
    (folder / CONFIG).write_text(json.dumps(record))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no record"),
    "config cut": (lambda f: cut(f / CONFIG), "is torn or edited"),
    "config of something else": (
        lambda f: edit(f, lambda r: r.update(kind="evaluation")),
        "expected a record of kind cascade, got evaluation",
    ),
    "newer": (lambda f: edit(f, lambda r: r.update(schema=9)), "has schema 9, this release reads"),
    "no base": (lambda f: edit(f, lambda r: r.pop("base")), "torn or edited"),
    "no hash": (lambda f: edit(f, lambda r: r["stages"][0].pop("sha256")), "torn or edited"),
    "NaN": (
        lambda f: edit(f, lambda r: r["stages"][1]["entry"].update(threshold=math.nan)),
        "torn or edited",
    ),
    "threshold in words": (
        lambda f: edit(f, lambda r: r["stages"][1]["entry"].update(threshold="much")),
        "torn or edited",
    ),
    "another start": (
        lambda f: edit(f, lambda r: r["stages"][0].update(start="zeros")),
        "torn or edited",
    ),
    "ridge": (lambda f: edit(f, lambda r: r.update(propagation="ridge")), "torn or edited"),
    "other rule": (
        lambda f: edit(f, lambda r: r["stages"][1]["entry"].update(rule="nearness")),
        "expected a rule among",
    ),
    "other layer": (
        lambda f: edit(f, lambda r: r["stages"][1]["entry"].update(layer=9)),
        "expected an exit layer in 1..6, got 9",
    ),
    "more layers": (
        lambda f: edit(f, lambda r: r["stages"][0].update(num_layers=3)),
        "expected \\[",
    ),
    "too many layers": (
        lambda f: edit(f, lambda r: r["stages"][0].update(num_layers=30)),
        "expected 1 to 4 layers",
    ),
    "stage missing": (lambda f: (f / "stage-2.safetensors").unlink(), "is missing"),
    "stage cut": (lambda f: cut(f / "stage-1.safetensors"), "cut short or changed"),
    "stage edited": (lambda f: flipped(f / "stage-2.safetensors"), "cut short or changed"),
    "stages swapped": (
        lambda f: (f / "stage-1.safetensors").replace(f / "stage-2.safetensors"),
        "is missing|cut short or changed",
    ),
    "heads missing": (lambda f: (f / "heads-1.safetensors").unlink(), "no exit heads at"),
    "heads cut": (lambda f: cut(f / "heads-1.safetensors"), "no readable safetensors file"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_is_one_line(name: str, tmp_path: Path) -> None:
    a_saved_one(a_stack("llama"), tmp_path / "c")
    breaks, message = BREAKS[name]
    breaks(tmp_path / "c")
    with pytest.raises(CascadeError, match=message) as caught:
        Cascade.from_pretrained(tmp_path / "c", a_stack("llama"))
    one_line(caught)


def test_a_stage_file_that_is_no_safetensors_is_one_line(tmp_path: Path) -> None:
    from cascade.models.weights import file_hash

    a_saved_one(a_stack("llama"), tmp_path / "c")
    path = tmp_path / "c" / "stage-1.safetensors"
    path.write_bytes(b"something else")
    edit(tmp_path / "c", lambda r: r["stages"][0].update(sha256=file_hash(path)))
    with pytest.raises(RecordError, match="no readable safetensors file") as caught:
        Cascade.from_pretrained(tmp_path / "c", a_stack("llama"))
    one_line(caught)


def test_nothing_there_is_one_line(tmp_path: Path) -> None:
    for source in (tmp_path / "nothing", str(tmp_path / "nothing")):
        with pytest.raises(RecordError, match="no record") as caught:
            Cascade.from_pretrained(source, a_stack("llama"))
        one_line(caught)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: DecoderStack(tiny_model("llama", seed=1)), "with weights_hash in-memory"),
        (lambda: DecoderStack(tiny_model("llama", hidden_size=64)), "with hidden_size 32"),
        (lambda: DecoderStack(tiny_model("llama", num_layers=5)), "with num_layers 4"),
        (lambda: DecoderStack(tiny_model("llama", vocab_size=99)), "with vocab_size 97"),
    ],
)
def test_another_base_is_refused(
    base: Callable[[], DecoderStack], message: str, tmp_path: Path
) -> None:
    a_saved_one(a_stack("llama"), tmp_path / "c")
    with pytest.raises(ModelError, match=message) as caught:
        Cascade.from_pretrained(tmp_path / "c", base())
    assert "load that base, or train stages for this one" in one_line(caught)


def test_a_base_without_a_name_has_to_be_given(tmp_path: Path) -> None:
    a_saved_one(a_stack("llama"), tmp_path / "c")
    with pytest.raises(UsageError, match="made for a model without a name; give it") as caught:
        Cascade.from_pretrained(tmp_path / "c")
    one_line(caught)

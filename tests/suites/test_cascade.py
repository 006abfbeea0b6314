"""`pytest -m cascade`: a stage trained on the real model, against stored budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.paths import BASELINES

from cascade import load_blocks
from cascade.core.provenance import SPLITS
from cascade.core.schema import from_plain
from cascade.stages.cascades import Cascade
from cascade.stages.entries import Entry
from cascade.stages.evaluation import evaluate_cascade
from cascade.stages.hard_tokens.collecting import collect_hard
from cascade.stages.hard_tokens.plan import CollectingConfig
from cascade.stages.records import CascadeEvaluationRecord, StageWork
from cascade.stages.training import Training, train_stage
from cascade.stages.training_config import TrainingConfig

if TYPE_CHECKING:
    from cascade import DecoderStack

BUDGETS = BASELINES / "smollm2-135m-instruct-q4_1" / "embedded.cascade.json"

pytestmark = pytest.mark.cascade


#: What the default run changes in the stored budgets: a third of the training tokens. Measured:
#: 0.744 on all text, 0.545 on its hard tokens; 0.999 on response text, which needs all tokens.
SHORT_TOKENS = {"train": 12288, "held-out": 4096}
SHORT_LIMITS = {"all": 0.8, "hard": 0.6, "response": 1.01}


@pytest.fixture(scope="module", params=["short", pytest.param("whole", marks=pytest.mark.whole)])
def stored(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The stored budgets, or those of a shorter training."""
    record: dict[str, Any] = json.loads(BUDGETS.read_text(encoding="utf-8"))
    if request.param == "short":
        record["made"]["tokens"], record["limits"] = SHORT_TOKENS, SHORT_LIMITS
    return record


@pytest.fixture(scope="module")
def trained(
    reference_model: DecoderStack, stored: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Training, Cascade, str, str]:
    """Train the stage of the stored record; with the hashes of the base before and after."""
    folder = tmp_path_factory.mktemp("cascade")
    made = stored["made"]
    splits = {
        split: load_blocks(
            "embedded",
            reference_model.tokenizer,
            max_tokens=made["tokens"][split],
            record_split=split,
            marks=True,
        )
        for split in SPLITS
    }
    before = reference_model.weights_in_memory()
    collecting = CollectingConfig(layer=made["layer"], hard_ratio=made["hard_ratio"])
    tokens = collect_hard(reference_model, splits, folder / "hard", collecting)
    config = from_plain(made["recipe"], TrainingConfig)
    training = train_stage(reference_model, tokens, config, folder / "checkpoints")
    cascade = Cascade(reference_model)
    cascade.add_stage(training.stage, Entry(tokens.layer, tokens.threshold))
    return training, cascade, before, reference_model.weights_in_memory()


@pytest.fixture(scope="module")
def evaluation(
    reference_model: DecoderStack,
    stored: dict[str, Any],
    trained: tuple[Training, Cascade, str, str],
) -> CascadeEvaluationRecord:
    blocks = load_blocks(
        "embedded",
        reference_model.tokenizer,
        max_tokens=stored["made"]["tokens"]["held-out"],
        record_split="held-out",
        marks=True,
    )
    return evaluate_cascade(trained[1], blocks)


def test_the_trained_cascade_keeps_its_budgets(
    evaluation: CascadeEvaluationRecord, stored: dict[str, Any]
) -> None:
    base, cascade = evaluation.rows
    assert base.name == "base"
    reached = {scope: cascade.scopes[scope].ratio for scope in stored["limits"]}
    beyond = {
        scope: (ratio, limit)
        for scope, limit in stored["limits"].items()
        if not (ratio := reached[scope]) <= limit
    }
    assert not beyond, f"held-out perplexity, relative to the base's: (reached, limit) {beyond}"
    if stored["made"]["tokens"] != SHORT_TOKENS:
        assert evaluation.verdict.helps


def test_easy_tokens_are_the_bases_to_the_last_bit(evaluation: CascadeEvaluationRecord) -> None:
    for scope in ("easy", "easy_response"):
        assert evaluation.rows[1].scopes[scope].ratio == 1.0


def test_what_was_chosen_by_stored_states_is_what_the_cascade_does(
    evaluation: CascadeEvaluationRecord, trained: tuple[Training, Cascade, str, str]
) -> None:
    # States are stored in float16: they part in the fourth digit.
    for scope, ratio in trained[0].chosen.ratios.items():
        assert evaluation.rows[1].scopes[scope].ratio == pytest.approx(ratio, rel=2e-3)


def test_training_never_touches_the_base(trained: tuple[Training, Cascade, str, str]) -> None:
    assert trained[2] == trained[3]


def test_only_hard_tokens_cost_a_stages_work(evaluation: CascadeEvaluationRecord) -> None:
    row = evaluation.rows[1]
    layers = evaluation.cascade.stages[0].num_layers
    tokens = evaluation.provenance.corpus.tokens
    hard = round(row.exits[-1].share * tokens)
    assert row.stage_rows == [
        StageWork(layer_rows=layers * hard, key_value_rows=layers * (tokens - hard))
    ]


def test_the_saved_cascade_generates_what_it_scores(
    reference_model: DecoderStack, trained: tuple[Training, Cascade, str, str], tmp_path: Path
) -> None:
    trained[1].save_pretrained(tmp_path / "saved")
    cascade = Cascade.from_pretrained(tmp_path / "saved", reference_model)
    assert reference_model.tokenizer is not None
    ids = torch.tensor([reference_model.tokenizer("### Instruction:\nName a river.\n\n").input_ids])
    made = cascade.generate(
        ids, torch.ones_like(ids), max_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    scored = cascade.score(made.sequences[:, :-1], torch.ones_like(made.sequences[:, :-1]))
    first = ids.shape[1] - 1
    assert torch.equal(scored.predictions[:, first:], made.sequences[:, first + 1 :])
    assert torch.equal(scored.exit_layers[:, first:], made.exit_layers)
    assert {reference_model.num_layers, cascade.stack.num_layers} == set(
        made.exit_layers[0].tolist()
    )

"""Calibrations: fitting, certificates, transfer to another corpus, files, and running with them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from support.reference_early_exit import (
    LAYERS,
    a_settled_stack,
    a_stack,
    one_line,
    own_logits,
    random_blocks,
    visited,
)
from support.reference_points import (
    FAMILIES,
    blocks_of,
    losses_by_hand,
    score_by_hand,
    settled_heads,
)
from support.tiny_models import tiny_model

from cascade.core.errors import CascadeError, CorpusError, ModelError, RecordError, UsageError
from cascade.core.records import read_plain, sealed, to_json, write_record
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.decoding.early_exit import EarlyExit
from cascade.evaluation.calibration import (
    CalibrationConfig,
    calibrate,
    confidences,
    early_exit_of,
    read_calibration,
    threshold_of,
    tokens_to_read,
)
from cascade.evaluation.calibration_record import (
    CalibrationRecord,
    HardRatioThreshold,
)
from cascade.evaluation.operating_points import Evaluator, OperatingPoint
from cascade.exits.fitted_heads import FittedHeads
from cascade.exits.head_fitting import fit_heads
from cascade.models.stack import DecoderStack
from cascade.stats.certificates import certify, sequences_needed
from cascade.stats.thresholds import fit_threshold, transfer

Plain = dict[str, Any]

BLOCKS = blocks_of(24, seed=3)
OTHER = blocks_of(10, seed=4)

#: The exit shares that are tested, the safest first (the same as in the module).
SHARES = [0.01, 0.02, 0.03, 0.05, 0.07, *(share / 100 for share in range(10, 100, 5)), 1.0]


def ids_of(blocks: TokenBlocks) -> torch.Tensor:
    return torch.from_numpy(blocks.ids).long()


def a_config(**changes: Any) -> CalibrationConfig:
    usual = CalibrationConfig(2, "top2_gap", hard_ratios=(0.3, 0.7))
    return dataclasses.replace(usual, **changes)


def a_certifying_config(propagation: str = "exact", **changes: Any) -> CalibrationConfig:
    return a_config(**{"risk": 0.5, "propagation": propagation} | changes)


@functools.cache
def calibrated(family: str = "gemma2") -> CalibrationRecord:
    """Return a calibration with thresholds, certificate and transfer, on ridge heads."""
    return calibrate(
        a_settled_stack(family),
        BLOCKS,
        a_certifying_config("ridge", batch_size=5, seed=1),
        heads=settled_heads(family),
        onto=OTHER,
    )


def refusal(kind: type[CascadeError], work: Callable[[], Any]) -> str:
    with pytest.raises(kind) as error:
        work()
    return one_line(error)


# --- Confidences -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [1, 3, LAYERS])
def test_cosine_confidences_match_hidden_history(family: str, layer: int) -> None:
    stack = a_settled_stack(family)
    history = visited(stack, ids_of(BLOCKS))
    expected = torch.cosine_similarity(history[layer - 1].double(), history[layer].double(), dim=-1)
    got = confidences(stack, BLOCKS, layer, "cosine", batch_size=7)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_top2_gap_confidences_at_last_layer_match_model_logits(
    family: str,
) -> None:
    stack = a_settled_stack(family)
    ids = ids_of(BLOCKS)
    best = own_logits(stack, ids).double().softmax(dim=-1).sort(dim=-1, descending=True).values
    expected = best[..., 0] - best[..., 1]
    got = confidences(stack, BLOCKS, LAYERS, "top2_gap", batch_size=5)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_top2_gap_confidences_below_last_layer_match_exit_head(family: str) -> None:
    stack, heads = a_settled_stack(family), settled_heads(family)
    weight, bias = heads.weights[2]
    state = visited(stack, ids_of(BLOCKS))[2]
    size = state.float().pow(2).mean(dim=-1, keepdim=True).sqrt()
    logits = stack.decode_normed((state / size) @ weight + bias)
    best = logits.double().softmax(dim=-1).sort(dim=-1, descending=True).values
    got = confidences(stack, BLOCKS, 2, "top2_gap", heads=heads, batch_size=24)
    np.testing.assert_allclose(got, (best[..., 0] - best[..., 1]).numpy(), atol=1e-6, rtol=0)


def test_tokens_exit_if_confidence_reaches_threshold() -> None:
    stack, heads = a_settled_stack("gemma2"), settled_heads("gemma2")
    for rule in ("cosine", "top2_gap", "entropy", "random"):
        values = confidences(stack, BLOCKS, 2, rule, heads=heads, batch_size=24, seed=9)
        middle = float(np.quantile(values, 0.5))
        early = EarlyExit(stack, layer=2, rule=rule, threshold=middle, heads=heads, seed=9)
        exited = early.score(ids_of(BLOCKS)).exit_layers == 2
        assert np.array_equal(exited.numpy(), values >= middle), rule


def test_confidences_do_not_depend_on_layers_above_exit() -> None:
    stack = DecoderStack(tiny_model("llama"))
    before = confidences(stack, BLOCKS, 2, "cosine")
    for layer in stack.layers[2:]:
        layer.mlp.down_proj.weight.data.fill_(math.nan)
    assert np.array_equal(confidences(stack, BLOCKS, 2, "cosine"), before)


@pytest.mark.parametrize("rule", ["cosine", "top2_gap"])
def test_non_finite_confidence_error_names_layer(rule: str) -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.layers[1].mlp.down_proj.weight.data.fill_(math.nan)
    for work in (
        lambda: confidences(stack, BLOCKS, 2, rule),
        lambda: calibrate(stack, BLOCKS, a_config(rule=rule)),
    ):
        assert f"{rule} is not finite at exit layer 2" in refusal(ModelError, work)


# --- Thresholds ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["cosine", "top2_gap"])
def test_thresholds_are_quantiles_of_confidences(family: str, rule: str) -> None:
    stack = a_settled_stack(family)
    ratios = (0.0, 0.3, 0.5, 0.7)
    record = calibrate(stack, BLOCKS, a_config(rule=rule, hard_ratios=ratios, batch_size=7))
    values = confidences(stack, BLOCKS, 2, rule, batch_size=24)
    assert [row.hard_ratio for row in record.by_hard_ratio] == list(ratios)
    for row in record.by_hard_ratio:
        quantile = np.quantile(values, row.hard_ratio)
        assert row.threshold == pytest.approx(quantile, abs=1e-6)
        assert row.reached == pytest.approx((values < row.threshold).mean(), abs=0.01)
        low, high = row.threshold_interval
        assert low <= row.threshold <= high


def test_running_with_threshold_reaches_fitted_hard_ratio() -> None:
    stack, heads = a_settled_stack("gemma2"), settled_heads("gemma2")
    record = calibrate(stack, BLOCKS, a_config(batch_size=24), heads=heads)
    for row in record.by_hard_ratio:
        early = early_exit_of(record, stack, heads=heads, hard_ratio=row.hard_ratio)
        hard = early.score(ids_of(BLOCKS)).exit_layers == LAYERS
        assert hard.double().mean().item() == pytest.approx(row.reached, abs=1e-12)
        assert abs(row.reached - row.hard_ratio) <= 1 / BLOCKS.tokens


def test_random_rule_uses_seed_of_calibration() -> None:
    stack = a_stack("llama")
    record = calibrate(stack, BLOCKS, a_config(rule="random", hard_ratios=(0.3,), seed=5))
    values = confidences(stack, BLOCKS, 2, "random", seed=5)
    exited = early_exit_of(record, stack).score(ids_of(BLOCKS)).exit_layers == 2
    assert np.array_equal(exited.numpy(), values >= threshold_of(record))
    other = calibrate(stack, BLOCKS, a_config(rule="random", hard_ratios=(0.3,), seed=6))
    others = early_exit_of(other, stack).score(ids_of(BLOCKS)).exit_layers == 2
    assert not torch.equal(others, exited)


def test_record_names_model_corpus_and_exit() -> None:
    record = calibrate(a_stack("llama"), BLOCKS, CalibrationConfig(3), command="cascade calibrate")
    assert (record.kind, record.schema) == ("calibration", 1)
    assert (record.exit_layer, record.rule, record.head) == (3, "cosine", "logit_lens")
    assert record.propagation == "frozen"
    assert record.certificate is None
    assert record.transfer is None
    assert to_plain(record.provenance.corpus) == to_plain(BLOCKS.provenance())
    assert record.provenance.command == "cascade calibrate"
    assert record.provenance.heads is None
    assert record.provenance.heads_fingerprint is None
    assert [row.hard_ratio for row in record.by_hard_ratio] == [0.3, 0.5, 0.7]


@pytest.mark.parametrize("family", FAMILIES)
def test_record_survives_round_trip(family: str, tmp_path: Path) -> None:
    record, path = calibrated(family), tmp_path / "calibration.json"
    write_record(path, record)
    plain = json.loads(to_json(to_plain(record)))
    assert read_plain(path, CalibrationRecord) == sealed(plain)
    assert json.loads(to_json(to_plain(read_calibration(path)))) == plain
    assert plain["certificate"]["threshold"] is not None
    assert len(plain["transfer"]["rows"]) == 3


# --- The certificate -------------------------------------------------------------------------


@pytest.mark.parametrize("propagation", ["frozen", "ridge", "exact"])
def test_one_half_proposes_thresholds_and_other_half_tests_them(propagation: Any) -> None:
    stack, heads = a_settled_stack("gemma2"), settled_heads("gemma2")
    record = calibrate(stack, BLOCKS, a_certifying_config(propagation, batch_size=24), heads=heads)
    proposing, testing = BLOCKS.ids[0::2], BLOCKS.ids[1::2]
    prints = [
        set(TokenBlocks(ids, "", "", 0).sequence_fingerprints().tolist())
        for ids in (proposing, testing)
    ]
    assert len(prints[0]) == len(prints[1]) == 12
    assert not prints[0] & prints[1]
    values = confidences(stack, BLOCKS, 2, "top2_gap", heads=heads, batch_size=24)[0::2]
    proposed = np.unique(np.quantile(values, [1 - share for share in SHARES]).astype(np.float32))
    blocks = dataclasses.replace(BLOCKS, ids=testing)
    losses = [
        losses_by_hand(
            score_by_hand(
                stack,
                blocks,
                OperatingPoint(2, "top2_gap", float(threshold), ""),
                heads=heads,
                propagation=propagation,
                batch_size=8,
            )
        )
        for threshold in proposed[::-1]
    ]
    expected = certify(proposed[::-1], np.array(losses), risk=0.5, confidence=0.95)
    assert record.certificate.sequences == 12
    for name, value in dataclasses.asdict(expected).items():
        if name == "reason":
            assert getattr(record.certificate, name) == value
        else:
            assert getattr(record.certificate, name) == pytest.approx(value, abs=1e-6), name


def test_losses_are_measured_only_on_tested_half() -> None:
    stack = a_settled_stack("gemma2")
    seen: list[Any] = []

    class Spy(Evaluator):
        def losses(self, blocks: TokenBlocks, *args: Any, **kwargs: Any) -> Any:
            seen.append(blocks)
            return super().losses(blocks, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("cascade.evaluation.calibration.Evaluator", Spy)
        calibrate(stack, BLOCKS, a_certifying_config())
    (tested,) = seen
    assert np.array_equal(tested.ids, BLOCKS.ids[1::2])


def test_certified_threshold_keeps_risk_on_600_other_sequences() -> None:
    # The heads of this unsettled model agree on about a third of the tokens, so the risk matters.
    stack, heads = a_stack("llama"), fit_heads(a_stack("llama"), random_blocks(), [2])
    record = calibrate(
        stack, blocks_of(60, seed=8), a_certifying_config(risk=0.35, hard_ratios=()), heads=heads
    )
    found = record.certificate
    assert 0 < found.certified < len(found.p_values)  # some, but not all
    early = early_exit_of(record, stack, heads=heads)
    assert early.exits[0].threshold == found.threshold
    many = blocks_of(600, seed=9)
    point = OperatingPoint(2, "top2_gap", found.threshold, "")
    scored = score_by_hand(stack, many, point, heads=heads, propagation="exact", batch_size=200)
    losses = losses_by_hand(scored)
    assert losses.mean() + 3 * losses.std() / math.sqrt(600) < 0.35
    assert losses.mean() > 0.05  # tokens do exit, so the certificate is not trivial
    boldest = losses_by_hand(
        score_by_hand(
            stack,
            many,
            dataclasses.replace(point, threshold=0.0),
            heads=heads,
            propagation="exact",
            batch_size=200,
        )
    )
    assert boldest.mean() > 0.35  # other thresholds exceed the risk


def test_failure_rate_of_certificates_is_within_confidence() -> None:
    # 40 calibrations of 24 sequences. The true risk of each is measured on 300 other sequences.
    stack, heads = a_stack("llama"), fit_heads(a_stack("llama"), random_blocks(), [2])
    many = blocks_of(300, seed=10)
    values = confidences(stack, many, 2, "top2_gap", heads=heads, batch_size=100)
    evaluator = Evaluator(stack, {2: ["top2_gap"]}, heads=heads, propagation="exact")
    wrong = ~evaluator.table(many, batch_size=100).agrees[2]
    broken, bold = 0, 0
    for seed in range(40):
        asked = a_certifying_config(risk=0.4, confidence=0.8, hard_ratios=())
        record = calibrate(stack, blocks_of(24, seed=100 + seed), asked, heads=heads)
        threshold = threshold_of(record)
        broken += bool((wrong & (values >= threshold)).mean() > 0.4)
        bold += threshold < math.inf
    assert broken <= 0.2 * 40
    assert bold >= 30


@pytest.mark.parametrize("risk", [0.05, 0.5])
@pytest.mark.parametrize("onto", [None, OTHER])
def test_progress_adds_up_to_tokens_to_read(risk: float, onto: TokenBlocks | None) -> None:
    asked, done = a_certifying_config(risk=risk), list[int]()
    calibrate(a_stack("llama"), BLOCKS, asked, onto=onto, progress=done.append)
    assert sum(done) == tokens_to_read(BLOCKS, asked, onto=onto)
    # No threshold is tested if there are too few sequences to certify any.
    tested = BLOCKS.tokens // 2 if risk == 0.5 else 0
    assert sum(done) == BLOCKS.tokens + tested + (2 * OTHER.tokens if onto else 0)


def test_too_few_sequences_run_full_model() -> None:
    stack = a_settled_stack("gemma2")
    asked = a_certifying_config(risk=0.05, confidence=0.9)
    record = calibrate(stack, BLOCKS, asked, onto=OTHER)
    found, needed = record.certificate, sequences_needed(0.05, 0.9)
    assert found.threshold is None
    assert found.certified == 0
    assert found.p_values == []
    assert found.sequences == 12
    assert found.sequences_needed == needed == math.ceil(math.log(10) / (2 * 0.05**2))
    assert str(needed) in found.reason
    assert "use the full model" in found.reason
    assert threshold_of(record) == math.inf
    early = early_exit_of(record, stack)
    assert (early.score(ids_of(OTHER)).exit_layers == LAYERS).all()
    # The hard ratio's threshold is fitted nevertheless.
    assert [row.source for row in record.transfer.rows] == [
        "hard ratio 0.3",
        "hard ratio 0.7",
    ]
    assert threshold_of(record, 0.3) < math.inf
    to_json(to_plain(record))


def test_transfer_without_thresholds_has_no_rows() -> None:
    asked = a_certifying_config(risk=0.05, hard_ratios=())
    record = calibrate(a_settled_stack("llama"), BLOCKS, asked, onto=OTHER)
    assert record.by_hard_ratio == []
    assert to_plain(record.transfer) == {"corpus": to_plain(OTHER.provenance()), "rows": []}
    words = refusal(UsageError, lambda: threshold_of(record, 0.3))
    assert "expected a hard ratio of this calibration (none), got" in words


# --- Transfer --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_transfer_rows_match_thresholds_on_other_corpus(family: str) -> None:
    stack, heads, record = a_settled_stack(family), settled_heads(family), calibrated(family)
    rows = record.transfer.rows
    assert to_plain(record.transfer.corpus) == to_plain(OTHER.provenance())
    assert [row.source for row in rows] == ["hard ratio 0.3", "hard ratio 0.7", "risk 0.5"]
    thresholds = [row.threshold for row in record.by_hard_ratio]
    thresholds.append(record.certificate.threshold)
    for row, threshold in zip(rows, thresholds, strict=True):
        assert row.threshold == threshold
        scored = score_by_hand(
            stack,
            OTHER,
            OperatingPoint(2, "top2_gap", threshold, ""),
            heads=heads,
            propagation="ridge",
            batch_size=8,
        )
        losses = losses_by_hand(scored)
        hard = ~scored.leaves.numpy()
        assert row.hard_ratio == pytest.approx(hard.mean(), abs=1e-12)
        assert row.loss == pytest.approx(losses.mean(), abs=1e-12)
        assert row.sequences == 10
        # The intervals depend only on which side of the threshold the confidences are.
        sides = np.where(hard, threshold - 1, threshold + 1)
        expected = transfer(threshold, sides, losses, seed=1)
        assert row.hard_ratio_interval == pytest.approx(expected.hard_ratio_interval)
        assert row.loss_interval == pytest.approx(expected.loss_interval)
    assert rows[0].loss > 0


def test_progress_counts_every_forward_pass() -> None:
    done: list[int] = []
    calibrate(a_stack("llama"), BLOCKS, a_certifying_config(), onto=OTHER, progress=done.append)
    assert sum(done) == BLOCKS.tokens + BLOCKS.tokens // 2 + 2 * OTHER.tokens


# --- Choosing a threshold --------------------------------------------------------------------


def fitted_to(hard_ratio: float, threshold: float) -> HardRatioThreshold:
    return HardRatioThreshold(
        hard_ratio=hard_ratio,
        threshold=threshold,
        reached=hard_ratio,
        threshold_interval=(threshold, threshold),
        reached_interval=(hard_ratio, hard_ratio),
        ties=0,
    )


def with_thresholds(
    thresholds: dict[float, float], *, certified: float | EllipsisType | None = ...
) -> CalibrationRecord:
    """Return a calibration with a threshold for each hard ratio and a certificate.

    With None, no threshold could be certified. Without the argument, there is no certificate.
    """
    certificate = calibrated().certificate
    assert certificate is not None
    return replace(
        calibrated(),
        by_hard_ratio=[fitted_to(*pair) for pair in thresholds.items()],
        certificate=None if certified is ... else replace(certificate, threshold=certified),
    )


def test_only_threshold_is_default() -> None:
    record = with_thresholds({0.3: 0.9})
    assert threshold_of(record) == 0.9
    assert threshold_of(record, 0.3) == 0.9


def test_threshold_is_chosen_by_hard_ratio() -> None:
    record = with_thresholds({0.3: 0.9, 0.7: 0.95})
    assert threshold_of(record, 0.7) == 0.95
    words = refusal(UsageError, lambda: threshold_of(record))
    assert "expected a hard ratio of this calibration (0.3, 0.7), got " in words
    words = refusal(UsageError, lambda: threshold_of(record, 0.5))
    assert words.endswith("got 0.5; choose one with --hard-ratio")


def test_certified_threshold_is_default_without_hard_ratio() -> None:
    record = with_thresholds({0.3: 0.9}, certified=0.8)
    assert threshold_of(record) == 0.8
    assert threshold_of(record, 0.3) == 0.9
    record = with_thresholds({0.3: 0.9}, certified=None)
    assert threshold_of(record) == math.inf


def test_threshold_above_one_exits_no_token() -> None:
    stack = DecoderStack(tiny_model("llama"))
    stack.lm_head.weight.data.mul_(100)  # probabilities of exactly 1
    record = calibrate(stack, BLOCKS, a_config(rule="max_probability", hard_ratios=(1.0,)))
    early = early_exit_of(record, stack)
    assert (early.score(ids_of(OTHER)).exit_layers == LAYERS).all()


# --- Reading a calibration -------------------------------------------------------------------


def a_named_stack(**provenance: Any) -> DecoderStack:
    known = {"name": "tiny", "revision": "r1", "weights_hash": "sha256:1"}
    return DecoderStack(tiny_model("llama"), provenance=known | provenance)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"weights_hash": "sha256:2"}, "weights_hash"),
        ({"revision": "r2"}, "revision"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_calibration_of_other_weights_revision_or_dtype_error_names_both(
    other: dict[str, str], named: str, tmp_path: Path
) -> None:
    stack = a_named_stack()
    write_record(tmp_path / "calibration.json", calibrate(stack, BLOCKS, a_config()))
    assert read_calibration(tmp_path / "calibration.json").exit_layer == 2
    there = a_named_stack(name="huge", **other)
    record = read_calibration(tmp_path / "calibration.json")
    words = refusal(ModelError, lambda: early_exit_of(record, there, hard_ratio=0.3))
    assert f"thresholds belong to tiny ({named} {getattr(stack.provenance, named)})" in words
    assert f"but the model is huge ({named} {getattr(there.provenance, named)})" in words


def test_calibration_of_other_dtype_or_family_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_record(path, calibrate(a_stack("llama"), BLOCKS, a_config()))
    half = DecoderStack(tiny_model("llama").to(torch.bfloat16))
    record = read_calibration(path)
    words = refusal(ModelError, lambda: early_exit_of(record, half, hard_ratio=0.3))
    assert "dtype bfloat16" in words
    words = refusal(ModelError, lambda: early_exit_of(record, a_stack("qwen2"), hard_ratio=0.3))
    assert "family qwen2" in words


def test_calibration_of_unnamed_model_requires_equal_weights(
    tmp_path: Path,
) -> None:
    path = tmp_path / "calibration.json"
    write_record(path, calibrate(a_stack("llama"), BLOCKS, a_config()))
    record = read_calibration(path)
    early_exit_of(record, DecoderStack(tiny_model("llama")), hard_ratio=0.3)
    other = DecoderStack(tiny_model("llama", seed=1))
    words = refusal(ModelError, lambda: early_exit_of(record, other, hard_ratio=0.3))
    assert f"but the model is llama (weights_hash {other.weights_hash()})" in words


def broken(change: Callable[[Plain], Any]) -> Callable[[Plain], str]:
    def text(record: Plain) -> str:
        copied = json.loads(json.dumps(record))
        change(copied)
        return json.dumps(copied)

    return text


BROKEN: dict[str, tuple[Callable[[Plain], str], str]] = {
    "torn": (lambda record: json.dumps(record)[:-40], "torn or edited"),
    "empty": (lambda record: "", "torn or edited"),
    "a list": (lambda record: "[]", "expected a record of kind calibration, got list"),
    "foreign": (broken(lambda r: r.update(kind="evaluation")), "got evaluation"),
    "newer": (broken(lambda r: r.update(schema=99)), "schema 99"),
    "no layer": (
        broken(lambda r: r.pop("exit_layer")),
        "number from 1 on at exit_layer, got nothing",
    ),
    "no certificate": (broken(lambda r: r.pop("certificate")), "at certificate, got nothing"),
    "no provenance": (
        broken(lambda r: r.pop("provenance")),
        "expected an object at provenance, got nothing",
    ),
    "no seed": (broken(lambda r: r.pop("seed")), "number from 0 on at seed, got nothing"),
    "a seed out of range": (broken(lambda r: r.update(seed=2**63)), f"got {2**63}"),
    "a seed in words": (broken(lambda r: r.update(seed="1")), 'at seed, got "1"'),
    "a layer in words": (broken(lambda r: r.update(exit_layer="2")), 'at exit_layer, got "2"'),
    "a layer that is a flag": (broken(lambda r: r.update(exit_layer=True)), "got true"),
    "a layer between two": (broken(lambda r: r.update(exit_layer=2.5)), "at exit_layer, got 2.5"),
    "a layer beyond the last": (
        broken(lambda r: r.update(exit_layer=9)),
        "in 1..4 at exit_layer, got 9",
    ),
    "a list of rules": (broken(lambda r: r.update(rule=["cosine"])), 'at rule, got ["cosine"]'),
    "a rule there is not": (broken(lambda r: r.update(rule="cosin")), "expected a rule among"),
    "another propagation": (broken(lambda r: r.update(propagation="melted")), "at propagation"),
    "a list of propagations": (broken(lambda r: r.update(propagation=["frozen"])), "propagation"),
    "a head that is none": (broken(lambda r: r.update(head=None)), "at head, got null"),
    "a threshold out of range": (
        broken(lambda r: r["by_hard_ratio"][0].update(threshold=7)),
        "the rule top2_gap gives confidences from 0 to 1",
    ),
    "a certified threshold out of range": (
        broken(lambda r: r["certificate"].update(threshold=-3)),
        "the rule top2_gap gives confidences from 0 to 1",
    ),
    "a fingerprint that is none": (
        broken(lambda r: r["provenance"].update(heads_fingerprint=[1])),
        "at provenance.heads_fingerprint, got [1]",
    ),
    **{
        f"{name} is {value}": (
            broken(lambda r, name=name, value=value: r["by_hard_ratio"][0].update({name: value})),
            f"at by_hard_ratio[0].{name}, got ",
        )
        for name in ("hard_ratio", "threshold")
        for value in (True, math.nan, math.inf, 10**400, None)
    },
    "no model": (broken(lambda r: r["provenance"].pop("model")), "torn or edited"),
    "a model in words": (broken(lambda r: r["provenance"].update(model="x")), "torn or edited"),
    "no rows": (broken(lambda r: r.update(by_hard_ratio=None)), "torn or edited"),
    "rows in words": (broken(lambda r: r.update(by_hard_ratio=["0.3"])), "torn or edited"),
    "no threshold": (broken(lambda r: r["by_hard_ratio"][0].pop("threshold")), "torn or edited"),
    "words for a threshold": (
        broken(lambda r: r["by_hard_ratio"][0].update(threshold="high")),
        "torn or edited",
    ),
    "words for a certificate": (broken(lambda r: r.update(certificate="yes")), "torn or edited"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_corrupt_calibration_gives_one_line_error(name: str, tmp_path: Path) -> None:
    text, words = BROKEN[name]
    path = tmp_path / "calibration.json"
    path.write_text(text(to_plain(calibrated())), encoding="utf-8")
    message = refusal(RecordError, lambda: read_calibration(path))
    assert words in message
    assert str(path) in message


def test_missing_calibration_error_names_command(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    words = refusal(RecordError, lambda: read_calibration(path))
    assert "cascade calibrate" in words
    assert "cascade analyze" not in words


# --- Running with a calibration --------------------------------------------------------------


def test_early_exit_of_calibration_has_its_settings() -> None:
    stack, heads = a_settled_stack("gemma2"), settled_heads("gemma2")
    early = early_exit_of(calibrated(), stack, heads=heads, hard_ratio=0.7)
    (at,) = early.exits
    assert (at.layer, at.rule.name, at.head.name) == (2, "top2_gap", "ridge")
    assert at.threshold == threshold_of(calibrated(), 0.7)
    assert early.propagation == "ridge"
    assert at.propagation is not None


def test_heads_that_differ_from_calibration_are_rejected() -> None:
    stack, heads = a_settled_stack("gemma2"), settled_heads("gemma2")
    words = refusal(UsageError, lambda: early_exit_of(calibrated(), stack))
    assert "expected the ridge head of this calibration, got logit_lens" in words
    lens = calibrate(stack, BLOCKS, a_config(hard_ratios=(0.3,)))
    words = refusal(UsageError, lambda: early_exit_of(lens, stack, heads=heads))
    assert "expected the logit_lens head of this calibration, got ridge" in words
    # Heads of the same model fitted on other text, and heads that differ in the last digit.
    others: FittedHeads = fit_heads(stack, blocks_of(40, 16, seed=5), heads.layers)
    weight, bias = heads.weights[2]
    nudged = dataclasses.replace(
        heads,
        weights=heads.weights | {2: (weight, bias.nextafter(torch.full_like(bias, 9.0)))},
    )
    for foreign in (others, nudged):
        words = refusal(
            UsageError,
            lambda foreign=foreign: early_exit_of(calibrated(), stack, heads=foreign),
        )
        assert "other heads of the same model" in words


def test_loaded_heads_match_calibration(tmp_path: Path) -> None:
    from cascade.exits.fitted_heads import load_heads

    stack, heads = a_settled_stack("gemma2"), settled_heads("gemma2")
    heads.save(tmp_path / "heads.safetensors")
    loaded = load_heads(tmp_path / "heads.safetensors", stack)
    early_exit_of(calibrated(), stack, heads=loaded)


# --- Invalid input ---------------------------------------------------------------------------

WRONG = {
    "rule": ({"rule": "cosin"}, "expected a rule among cosine"),
    "oracle": ({"rule": "oracle"}, "needs the full model's prediction and cannot be calibrated"),
    "fixed": ({"rule": "fixed"}, "the rule fixed lets every token exit and has no threshold"),
    "a risk too small": ({"risk": 1e-155}, "expected a risk of at least 1e-06, got 1e-155"),
    "patience": ({"rule": "patience"}, "needs earlier exit layers"),
    "propagation": ({"propagation": "melted"}, "got 'melted'"),
    "ridge without heads": ({"propagation": "ridge"}, "needs fitted heads"),
    "ratio": ({"hard_ratios": (0.3, 1.2)}, "expected a hard ratio in 0..1, got 1.2"),
    "ratio NaN": ({"hard_ratios": (math.nan,)}, "got nan"),
    "risk 0": ({"risk": 0.0}, "expected a risk between 0 and 1, got 0"),
    "risk 1": ({"risk": 1.0}, "expected a risk between 0 and 1, got 1"),
    "risk NaN": ({"risk": math.nan}, "got nan"),
    "confidence": ({"risk": 0.1, "confidence": 1.0}, "expected a confidence between 0 and 1"),
    "nothing": ({"hard_ratios": ()}, "expected a hard ratio or a risk"),
    "layer 0": ({"layer": 0}, "in 1..4, got 0"),
    "layer 5": ({"layer": 5}, "in 1..4, got 5"),
    "too wide": ({"layer": 1, "rule": "mean_cosine"}, "in 2..4, got 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_config_is_rejected_before_any_forward_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cascade.evaluation.calibration.ForwardPass", lambda *_, **__: pytest.fail("a pass")
    )
    changes, words = WRONG[name]
    assert words in refusal(
        UsageError, lambda: calibrate(a_stack("llama"), BLOCKS, a_config(**changes))
    )


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range_is_rejected_before_any_forward_pass(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cascade.evaluation.calibration.ForwardPass", lambda *_, **__: pytest.fail("a pass")
    )
    words = refusal(UsageError, lambda: calibrate(a_stack("llama"), BLOCKS, a_config(seed=seed)))
    assert words == f"expected a seed in 0..{2**63 - 1}, got {seed}"


def test_repeated_hard_ratio_is_fitted_once() -> None:
    record = calibrate(a_stack("llama"), BLOCKS, a_config(hard_ratios=(0.5, 0.3, 0.5)), onto=OTHER)
    assert [row.hard_ratio for row in record.by_hard_ratio] == [0.5, 0.3]
    rows = record.transfer.rows
    assert [row.source for row in rows] == ["hard ratio 0.5", "hard ratio 0.3"]


def test_heads_of_another_model_are_rejected() -> None:
    heads = settled_heads("gemma2")
    words = refusal(
        ModelError, lambda: calibrate(a_stack("llama"), BLOCKS, a_config(), heads=heads)
    )
    assert "family gemma2" in words
    assert "family llama" in words


def test_invalid_corpus_is_rejected_before_any_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "cascade.evaluation.calibration.ForwardPass", lambda *_, **__: pytest.fail("a pass")
    )
    stack = a_stack("llama")
    for onto in (None, blocks_of(1)):
        blocks = BLOCKS if onto else blocks_of(1)
        words = refusal(
            CorpusError,
            lambda blocks=blocks, onto=onto: calibrate(stack, blocks, a_config(), onto=onto),
        )
        assert "expected at least 2 sequences to calibrate on, got 1 in random-0" in words
    words = refusal(
        CorpusError, lambda: calibrate(stack, BLOCKS, a_config(), onto=blocks_of(2, 65))
    )
    assert "exceed the model's 64 positions" in words


def test_two_sequences_suffice_for_threshold_but_not_for_certificate() -> None:
    record = calibrate(a_settled_stack("llama"), blocks_of(2), a_certifying_config(risk=0.1))
    assert record.certificate.sequences == 1
    assert record.certificate.threshold is None
    values = confidences(a_settled_stack("llama"), blocks_of(2), 2, "top2_gap")
    expected = fit_threshold(values, 0.3)
    assert record.by_hard_ratio[0].threshold == expected.threshold

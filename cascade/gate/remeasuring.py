"""Measure baselines and budgets again, and store them.

A baseline is measured on the whole corpus, together with its noise floor. Budgets are measured at
the stored operating points, on the corpus and with the exit heads that the budget file names.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec.structs

from cascade.core.defaults import HARD_RATIOS
from cascade.core.errors import ModelError, RecordError
from cascade.core.files import write_text
from cascade.core.records import to_file
from cascade.core.schema import UNSET, UnsetType, known
from cascade.corpora.blocks import TokenBlocks
from cascade.corpora.long_sequences import LongSequences
from cascade.decoding.early_exit import EarlyExit
from cascade.evaluation.exit_evaluation import EvaluationConfig, evaluate, split
from cascade.evaluation.operating_points import OperatingPoint
from cascade.evaluation.records import EvaluationRecord
from cascade.exits.fitted_heads import FittedHeads, load_heads
from cascade.exits.history import exit_entries
from cascade.gate.baseline_corpus import GivenCorpus, baseline_blocks
from cascade.gate.baselines import StoredProfile
from cascade.gate.budgets import Evaluated, accept_budgets, point_overrun, read_budgets
from cascade.gate.decoding_check import DECODED_SEQUENCES
from cascade.gate.drift import compare
from cascade.gate.generation_check import check_generation
from cascade.gate.noise import measure_noise
from cascade.gate.quick_gate import quick_ids
from cascade.gate.records import BudgetGroup, LosslessBudget, Overrun
from cascade.models.stack import DecoderStack
from cascade.saturation.long_context import LongChoice, choose_long, measure_long
from cascade.saturation.model_parts import parts_of
from cascade.saturation.profile import SaturationProfile, analyze
from cascade.saturation.records import SAME_CONTENT

# --- Baselines -------------------------------------------------------------------------------


def measure_whole(
    stack: DecoderStack,
    blocks: TokenBlocks,
    *,
    long_context: int | None = None,
    batch_size: int = 32,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> SaturationProfile:
    """Return the profile of a whole corpus as a baseline needs it.

    It includes a few long sequences and the noise floor.

    Args:
        stack: The model.
        blocks: The whole corpus.
        long_context: The number of tokens of a long sequence, 0 for none; None for the default.
        batch_size: Sequences per forward pass.
        command: The user's command line, for the provenance.
        progress: Called with the number of tokens done since the last call.

    Raises:
        CorpusError: A sequence is longer than the model's context, or the corpus is too short for
            the long sequences that were asked for.
        ModelError: A layer's output is NaN (names the layer).
    """
    chosen = choose_long(stack, blocks, long_context)
    profile = analyze(stack, blocks, batch_size=batch_size, command=command, progress=progress)
    return with_noise(with_long(profile, stack, chosen), stack, blocks, chosen.sequences)


def with_long(
    profile: SaturationProfile, stack: DecoderStack, chosen: LongChoice
) -> SaturationProfile:
    """Return a profile together with the statistics of long sequences.

    Args:
        profile: The profile of the whole corpus.
        stack: The model.
        chosen: The long sequences, or why there are none.

    Raises:
        ModelError: A hidden state is NaN or infinite, or the model raises an error for so many
            tokens.
    """
    if chosen.sequences is None:
        return replace(profile, long=None, no_long=chosen.reason)
    return replace(profile, long=measure_long(stack, chosen.sequences), no_long=None)


def with_noise(
    profile: SaturationProfile,
    stack: DecoderStack,
    blocks: TokenBlocks,
    long: LongSequences | None = None,
) -> SaturationProfile:
    """Return a profile together with the noise floor on this machine and the model's parts.

    Args:
        profile: The profile of the whole corpus.
        stack: The model.
        blocks: The corpus; the noise floor is measured on a few of its sequences.
        long: The long sequences; None for none.
    """
    return replace(
        profile, noise=measure_noise(stack, quick_ids(blocks), long), parts=parts_of(stack)
    )


def still_holds(profile: SaturationProfile | StoredProfile, before: StoredProfile) -> bool:
    """Return whether a stored baseline is still valid: same schema and sequences, and no drift.

    A baseline without the long sequences that the new profile has is not.

    Args:
        profile: The new profile of the whole corpus.
        before: The stored baseline.
    """
    seen = [sorted(side.arrays()["sequence_fingerprint"]) for side in (profile, before)]
    current = before.record().schema >= SAME_CONTENT
    new, old = (known(side.record().long_context) for side in (profile, before))
    current = current and (new is None or not new.sequences or new == old)
    return current and seen[0] == seen[1] and compare(profile, before).verdict == "PASS"


# --- Budgets ---------------------------------------------------------------------------------


def replace_budgets(path: Path, evaluations: Sequence[Evaluated]) -> None:
    """Replace all budgets of a file by the given operating points of some evaluations.

    The budget of lossless decoding stays as it is if no evaluation measured lossless decoding.

    Args:
        path: The budget file.
        evaluations: Evaluations of one model and corpus.

    Raises:
        RecordError: An evaluation is torn, has no given operating point, or has another model than
            the first one.
        OutputError: The file cannot be written; the previous one is unharmed.
    """
    lossless: LosslessBudget | UnsetType = UNSET
    with contextlib.suppress(RecordError):  # there are none yet, or they are damaged
        lossless = read_budgets(path).lossless
    with tempfile.TemporaryDirectory() as folder:
        for evaluation in evaluations:
            made = accept_budgets(Path(folder), evaluation).path
        budgets = read_budgets(made)
    if budgets.lossless is UNSET:
        budgets = msgspec.structs.replace(budgets, lossless=lossless)
    write_text(path, to_file(budgets))


def group_blocks(stack: DecoderStack, group: BudgetGroup, given: GivenCorpus) -> TokenBlocks:
    """Read the part of a corpus that a group of budgets was measured on.

    Args:
        stack: The model.
        group: The budgets.
        given: The corpus options that the user gave; the record of the budgets has the others.

    Raises:
        CorpusError: The corpus is missing, malformed or too small.
    """
    about = group.provenance.corpus
    # Budgets are measured on every second sequence.
    most = 2 * about.tokens if given.max_tokens is None else given.max_tokens
    return baseline_blocks(about, stack.tokenizer, replace(given, max_tokens=most))


@dataclass(frozen=True)
class PointsConfig:
    """How operating points are evaluated.

    Attributes:
        propagation: How upper layers get keys and values of exited tokens: "frozen", "ridge" or
            "exact".
        batch_size: Sequences per forward pass.
        seed: The seed of the intervals.
        command: The user's command line, for the provenance.
    """

    propagation: str = "frozen"
    batch_size: int = 8
    seed: int = 0
    command: str | None = None


def rerun(
    stack: DecoderStack,
    group: BudgetGroup,
    blocks: TokenBlocks,
    *,
    heads: FittedHeads | None = None,
) -> EvaluationRecord:
    """Evaluate the operating points of a group of budgets again, with the stored settings.

    Args:
        stack: The model.
        group: The budgets.
        blocks: The corpus; half of its sequences are the confirmation split.
        heads: The exit heads that the group names; None for the logit lens.

    Raises:
        CorpusError: Too few sequences.
        ModelError: The heads belong to another model, or a hidden state is not finite.
    """
    points = [
        OperatingPoint(point.exit_layer, point.rule, point.threshold, "given")
        for point in group.points
    ]
    config = PointsConfig(
        propagation=group.settings.propagation,
        batch_size=group.settings.batch_size,
        seed=group.settings.seed,
        command=group.provenance.command,
    )
    return evaluate_points(stack, points, blocks, heads=heads, config=config)


def generating_differs(
    stack: DecoderStack,
    group: BudgetGroup,
    blocks: TokenBlocks,
    *,
    heads: FittedHeads | None = None,
) -> list[Overrun]:
    """Return the operating points of a group of budgets at which generating differs from scoring.

    Args:
        stack: The model.
        group: The budgets.
        blocks: The corpus; two of its sequences are generated.
        heads: The exit heads that the group names; None for the logit lens.

    Raises:
        ModelError: The heads belong to another model, or a hidden state is not finite.
    """
    ids = quick_ids(blocks, DECODED_SEQUENCES)
    found = []
    for point in group.points:
        early = EarlyExit(
            stack,
            layer=point.exit_layer,
            rule=point.rule,
            threshold=point.threshold,
            heads=heads,
            propagation=group.settings.propagation,  # type: ignore[arg-type]  # as it was evaluated
        )
        if any(at.rule.needs_full for at in early.exits):
            continue  # such a rule can score, but not generate
        difference = check_generation(early, ids)
        if difference is not None:
            found.append(point_overrun(group, point, "generation", difference))
    return found


def evaluate_points(
    stack: DecoderStack,
    points: list[OperatingPoint],
    blocks: TokenBlocks,
    *,
    heads: FittedHeads | None = None,
    config: PointsConfig | None = None,
) -> EvaluationRecord:
    """Evaluate only the given operating points, without fitting, searching or controls.

    Args:
        stack: The model.
        points: The operating points.
        blocks: The corpus; half of its sequences are the confirmation split.
        heads: The exit heads; None for the logit lens.
        config: How they are evaluated.

    Raises:
        CorpusError: Too few sequences.
        ModelError: The heads belong to another model, or a hidden state is not finite.
        UsageError: An invalid operating point.
    """
    config = config or PointsConfig()
    fit, confirm = split(blocks)
    return evaluate(
        stack,
        fit,
        confirm,
        EvaluationConfig(layers=(), rules=(), thresholds=tuple(points), only_given=True),
        heads=heads,
        propagation=config.propagation,  # type: ignore[arg-type]  # checked by the evaluator
        batch_size=config.batch_size,
        seed=config.seed,
        command=config.command,
    )


def first_points(
    stack: DecoderStack, blocks: TokenBlocks, layer: int | None
) -> list[OperatingPoint]:
    """Return the default operating points to budget: the cosine rule at each hard ratio.

    Args:
        stack: The model.
        blocks: The corpus; thresholds come from the half that is not the confirmation split.
        layer: The exit layer; None for the one that the profile suggests.

    Raises:
        CorpusError: Too few sequences.
        UsageError: The model has no such layer.
    """
    profile = analyze(stack, split(blocks)[0])
    if layer is None:
        layer = int(profile.record().thresholds.exit_layer)
    exit_entries(layer, stack.num_layers)
    row = profile.statistics.layers.index(str(layer))
    # Rounded as a user types them, so that a command can name a stored operating point.
    thresholds = [round(float(profile.statistics.quantile(q)[row]), 4) for q in HARD_RATIOS]
    return [OperatingPoint(layer, "cosine", value, "given") for value in dict.fromkeys(thresholds)]


def find_heads(folder: Path, fingerprint: str | None, stack: DecoderStack) -> FittedHeads | None:
    """Return the stored exit heads with a fingerprint; None for the logit lens.

    Args:
        folder: The folder with the heads of this model.
        fingerprint: The fingerprint of the heads; None for the logit lens.
        stack: The model.

    Raises:
        RecordError: No file in the folder has this fingerprint.
        ModelError: The heads belong to another model.
    """
    if fingerprint is None:
        return None
    found = []
    foreign: ModelError | None = None
    for path in sorted(folder.glob("*.heads.safetensors")):
        found.append(path.name)
        try:
            heads = load_heads(path, stack)
        except ModelError as error:
            foreign = error
            continue
        if heads.fingerprint() == fingerprint:
            return heads
    if foreign is not None:
        raise foreign
    raise RecordError(
        f"no exit heads {fingerprint[:19]}... in {folder} (found: {', '.join(found) or 'none'}); "
        "restore the .heads.safetensors file that the budgets were measured with"
    )

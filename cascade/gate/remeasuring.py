"""Budgets measured again: the stored points, on the corpus and with the heads that they name."""

from __future__ import annotations

from pathlib import Path

from cascade.core.errors import ModelError, RecordError
from cascade.core.records import Record, read_record
from cascade.core.schema import to_plain
from cascade.core.shapes import COUNT, NUMBER, TEXT, WHOLE, Shape, flaw
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.evaluation.exit_evaluation import EvaluationConfig, evaluate, split
from cascade.evaluation.operating_points import OperatingPoint
from cascade.exits.fitted_heads import FittedHeads, load_heads
from cascade.exits.history import exit_entries
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import HARD_RATIOS, analyze

#: What a stored group needs to be measured again; the rest is held to by the check.
_GROUPS: Shape = {
    "groups": [
        {
            "provenance": {"corpus": {"seq_len": COUNT, "tokens": COUNT}},
            "settings": {"propagation": TEXT, "batch_size": COUNT, "seed": WHOLE},
            "points": [{"exit_layer": COUNT, "rule": TEXT, "threshold": NUMBER}],
        }
    ]
}


def read_groups(path: Path) -> list[Record]:
    """Read the groups of a file of budgets.

    Args:
        path: Its `.budgets.json`.

    Raises:
        RecordError: It is missing, torn, of a newer schema, or lacks something.
    """
    record = read_record(path, kind="budgets")
    found = flaw(record, _GROUPS)
    if found is not None:
        raise RecordError(
            f"{path} is torn or edited ({found}); restore it, or remove it to start anew"
        )
    groups: list[Record] = record["groups"]
    return groups


def group_blocks(
    stack: DecoderStack,
    group: Record,
    source: str,
    *,
    part: str | None = None,
    text_column: str | None = None,
) -> TokenBlocks:
    """Read as much of a corpus as half of it is what a group of budgets was measured on.

    Args:
        stack: The model.
        group: Of a record of kind `budgets`.
        source: The corpus.
        part: The split of a hub dataset, or of the embedded corpus.
        text_column: The column to read, for records that are not in Alpaca form.

    Raises:
        CorpusError: The corpus is missing, malformed or too small.
    """
    confirmed = group["provenance"]["corpus"]
    return load_blocks(
        source,
        stack.tokenizer,
        seq_len=confirmed["seq_len"],
        num_samples=None,
        # Every second sequence confirms.
        max_tokens=2 * confirmed["tokens"],
        split=part,
        text_column=text_column,
    )


def rerun(
    stack: DecoderStack, group: Record, blocks: TokenBlocks, *, heads: FittedHeads | None = None
) -> Record:
    """Evaluate the points of a group of budgets again, as its own settings say.

    Args:
        stack: The model.
        group: Of a record of kind `budgets`.
        blocks: The corpus; half of its sequences confirm.
        heads: Those that the group names; None for the logit lens.

    Returns:
        A record of kind `evaluation`.

    Raises:
        CorpusError: Too few sequences.
        ModelError: The heads belong to another model, or a state is not finite.
    """
    settings = group["settings"]
    points = [
        OperatingPoint(point["exit_layer"], point["rule"], point["threshold"], "given")
        for point in group["points"]
    ]
    return evaluate_points(
        stack,
        points,
        blocks,
        heads=heads,
        propagation=settings["propagation"],
        batch_size=settings["batch_size"],
        seed=settings["seed"],
        command=group["provenance"].get("command"),
    )


def evaluate_points(
    stack: DecoderStack,
    points: list[OperatingPoint],
    blocks: TokenBlocks,
    *,
    heads: FittedHeads | None = None,
    propagation: str = "frozen",
    batch_size: int = 8,
    seed: int = 0,
    command: str | None = None,
) -> Record:
    """Evaluate given points alone, without fitting, searching or controls.

    Args:
        stack: The model.
        points: What to measure.
        blocks: The corpus; half of its sequences confirm.
        heads: The logit lens where None.
        propagation: What upper layers see of tokens that left.
        batch_size: Sequences per forward pass.
        seed: Of the intervals.
        command: What the user would run, for the provenance.

    Raises:
        CorpusError: Too few sequences.
        ModelError: The heads belong to another model, or a state is not finite.
        UsageError: A point that cannot be meant.
    """
    fit, confirm = split(blocks)
    record = evaluate(
        stack,
        fit,
        confirm,
        EvaluationConfig(layers=(), rules=(), thresholds=tuple(points), only_given=True),
        heads=heads,
        propagation=propagation,  # type: ignore[arg-type]  # checked by the evaluator
        batch_size=batch_size,
        seed=seed,
        command=command,
    )
    plain: Record = to_plain(record)
    return plain


def first_points(
    stack: DecoderStack, blocks: TokenBlocks, layer: int | None
) -> list[OperatingPoint]:
    """Return points to budget where none are stored: the study's way, at one exit layer.

    Args:
        stack: The model.
        blocks: The corpus; the half that is not confirmed on gives the thresholds.
        layer: The exit layer; the one that the profile suggests where None.

    Returns:
        One point per hard ratio, by the cosine.

    Raises:
        CorpusError: Too few sequences.
        UsageError: No such layer.
    """
    profile = analyze(stack, split(blocks)[0])
    if layer is None:
        layer = int(profile.record().thresholds.exit_layer)
    exit_entries(layer, stack.num_layers)
    row = profile.statistics.layers.index(str(layer))
    # As they are typed: a stored point can be asked for again.
    thresholds = [round(float(profile.statistics.quantile(q)[row]), 4) for q in HARD_RATIOS]
    return [OperatingPoint(layer, "cosine", value, "given") for value in dict.fromkeys(thresholds)]


def find_heads(folder: Path, fingerprint: str | None, stack: DecoderStack) -> FittedHeads | None:
    """Return the exit heads of a fingerprint; None for the logit lens, which has none.

    Args:
        folder: Where the heads of this model are stored.
        fingerprint: Of the heads.
        stack: The model.

    Raises:
        RecordError: None of the files holds them.
        ModelError: They belong to another model.
    """
    if fingerprint is None:
        return None
    found = []
    strange: ModelError | None = None
    for path in sorted(folder.glob("*.heads.safetensors")):
        found.append(path.name)
        try:
            heads = load_heads(path, stack)
        except ModelError as error:
            strange = error
            continue
        if heads.fingerprint() == fingerprint:
            return heads
    if strange is not None:
        raise strange
    raise RecordError(
        f"no exit heads {fingerprint[:19]}... in {folder} (found: {', '.join(found) or 'none'}); "
        "restore the .heads.safetensors that the budgets were made with"
    )

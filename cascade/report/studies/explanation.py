"""The report of an explained layer: the supported causes and their evidence."""

from __future__ import annotations

from collections.abc import Sequence

from cascade.core.formatting import ratio_words
from cascade.core.schema import known, to_plain
from cascade.report.common.records import bos_words
from cascade.report.common.sections import Block, Lead, Picture, Report, Section, table_of
from cascade.report.common.words import listed, whole, whole_percent
from cascade.report.studies.explanation_figures import causes_svg
from cascade.report.studies.explanation_tables import (
    ablation_blocks,
    depth_blocks,
    sides_table,
    token_blocks,
)
from cascade.report.studies.explanation_wording import (
    ClosingCause,
    cause_words,
    closing_causes,
    tested_causes,
    verdict_words,
)
from cascade.studies.explanations.records import AblationRow, CauseEffect, LayerExplanation

#: The pictures that an explanation may have.
PICTURES = (
    "explanation-causes.svg",
    "explanation-depth.svg",
    "explanation-tokens.svg",
    "explanation-ablations.svg",
)


def explanation_report(record: LayerExplanation) -> Report:
    """Return the report of an explained layer.

    Args:
        record: The explanation.
    """
    settings = record.settings
    model, corpus = record.provenance.model, record.provenance.corpus
    name = known(model.name) or model.family
    return Report(
        kicker="CASCADE explanation",
        title=f"Layer {settings.layer} of {name}, against layer {settings.contrast}",
        about=(
            f"{corpus.name}: {settings.sequences:,} sequences x {corpus.seq_len:,} tokens"
            f"{bos_words(corpus.bos)} measured, {settings.pilot_sequences:,} others to estimate "
            f"the traits of the update; "
            f"{model.dtype} on {model.device}"
        ),
        sections=(
            Section("", (Lead(_verdict(record), _mark(record)), *_worth(record))),
            Section("Causes", tuple(_causes(record))),
            Section("Update of the layer", (sides_table(record),)),
            Section("Effect on perplexity", ablation_blocks(record)),
            Section("Similarity by token", token_blocks(record)),
            Section("Residual stream over depth", depth_blocks(record)),
            Section("What could not be measured", tuple(map(_sentence, record.missing))),
        ),
        provenance=to_plain(record.provenance),
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _mark(record: LayerExplanation) -> str:
    return "pass" if record.verdict.carried_by else "open"


def _named(record: LayerExplanation, causes: Sequence[ClosingCause]) -> str:
    return listed(
        [f"{cause_words(record, one.row)} ({whole_percent(one.closed)})" for one in causes]
    )


def _verdict(record: LayerExplanation) -> str:
    """Return which causes are supported, with the deciding numbers."""
    gap, (target, other) = record.gap, record.sides
    turns = (
        f"Layer {target.layer} turns the residual stream by {target.degrees:.1f} degrees on "
        f"average (mean similarity {target.similarity:.3f}), its neighbour, layer {other.layer}, "
        f"by {other.degrees:.1f} ({other.similarity:.3f})."
    )
    if not gap.asks_for_a_cause:
        return (
            f"{turns} The gap is {gap.degrees:.1f} degrees ({gap.interval[0]:.1f} to "
            f"{gap.interval[1]:.1f}), so there is no dip to explain."
        )
    supported = [
        one for one in closing_causes(record) if one.row.cause in record.verdict.carried_by
    ]
    if not supported:
        remaining = whole_percent(1 - record.settings.supported_share)
        return (
            f"{turns} No single cause explains the gap of {gap.degrees:.1f} degrees. Without any "
            f"one of them, at least {remaining} of the gap remains, or this is undecided."
        )
    supported.sort(key=lambda one: -one.closed)
    return (
        f"{turns} Most of the gap of {gap.degrees:.1f} degrees closes if one of these causes is "
        f"removed (in brackets: the share that closes): {_named(record, supported)}."
    )


def _worth(record: LayerExplanation) -> tuple[str, ...]:
    """Return which causes are not supported, and the layer's importance to the model."""
    lines = []
    if record.gap.asks_for_a_cause:
        for verdict, words in (
            ("not supported", "Not supported, because less than half of the gap closes"),
            ("undecided", "Undecided, because the interval of the share includes half of the gap"),
        ):
            causes = [one for one in closing_causes(record) if one.row.verdict == verdict]
            if causes:
                lines.append(f"{words}: {_named(record, causes)}.")
    layer, contrast = record.settings.layer, record.settings.contrast
    skipped = [_ablation(record, side, "layer_skipped") for side in (layer, contrast)]
    common = _ablation(record, layer, "common_left_out")
    if skipped[0] and skipped[1]:
        text = (
            f"Without layer {layer}, the perplexity is {_relative(skipped[0])} that of "
            f"the unchanged model, without layer {contrast} {_relative(skipped[1])}."
        )
        if common is not None:
            text += (
                f" Without only the common part of layer {layer}'s update it is "
                f"{_relative(common)}."
            )
        lines.append(text)
    return tuple(lines)


def _relative(row: AblationRow) -> str:
    return ratio_words(row.perplexity_ratio, known(row.nats_difference), 2)


def _ablation(record: LayerExplanation, layer: str, ablation: str) -> AblationRow | None:
    return next(
        (row for row in record.ablations if (row.layer, row.ablation) == (layer, ablation)), None
    )


def _causes(record: LayerExplanation) -> list[Block]:
    layer, contrast = record.settings.layer, record.settings.contrast
    rows = [
        [
            f"{tested.effect.degrees:.1f}",
            f"{tested.effect.contrast_degrees:.1f}",
            f"{tested.effect.similarity:.3f}",
            *_gone(tested.effect),
            verdict_words(record, tested.row),
            cause_words(record, tested.row),
        ]
        for tested in tested_causes(record)
    ]
    blocks: list[Block] = [
        table_of(
            f"Without each cause: the mean angles of layers {layer} and {contrast} in degrees, the "
            f"similarity of layer {layer}, and the share of the gap that closes, with its 95 % "
            f"interval in percent. Above 100 %, layer {layer} turns the stream less than layer "
            f"{contrast}; below 0 %, the gap grows. Of the token classes, the one that closes most "
            "is shown.",
            (layer, contrast, "similarity", "closed", "95 %", "supported", "without"),
            rows,
            text_columns=2,
        )
    ]
    reasons = [
        f"{cause_words(record, row)} ({row.reason})" for row in record.causes if row.effect is None
    ]
    if reasons:
        blocks.append(f"Not tried: {listed(reasons)}.")
    if closing_causes(record):
        blocks.append(
            Picture(
                "explanation-causes.svg",
                causes_svg(record),
                f"Share of the gap between layer {layer} and layer {contrast} that closes without "
                "each cause; lines are 95 % intervals. Outputs and the common part are subtracted "
                "from the update. First tokens and delimiters are hidden from attention. "
                "Dimensions are left out of input and output; token classes and positions are left "
                f"out of the mean. Size, direction and norm are set to layer {contrast}'s.",
            )
        )
    return blocks


def _gone(effect: CauseEffect) -> tuple[str, str]:
    if effect.closed is None or effect.interval is None:
        return "-", "-"
    low, high = effect.interval
    return whole_percent(effect.closed), f"{whole(low)} to {whole(high)}"

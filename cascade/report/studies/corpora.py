"""The report of a comparison of corpora: layers that move, and thresholds that transfer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cascade.core.schema import to_plain
from cascade.report.common.exit_wording import between, corpus_words, few_pairs, share
from cascade.report.common.records import NORM_SUFFIX, is_normed, rule_sentence, show
from cascade.report.common.sections import (
    Block,
    Lead,
    Pairs,
    Picture,
    Report,
    Section,
    Table,
    table_of,
)
from cascade.report.common.words import listed
from cascade.report.studies.corpora_figures import corpora_profiles_svg, corpora_thresholds_svg
from cascade.studies.comparisons.corpus_records import (
    CorpusComparison,
    CorpusDifferences,
    LayerDifference,
    LayerVerdict,
    ThresholdTransfer,
)

#: The number of corpora that fit side by side into 80 columns.
_MOST_COLUMNS = 4
#: The maximum number of layers named in a sentence; the others are only counted.
_MAX_NAMED = 8
#: Verdict -> its text in a table; all others are shown as they are.
_VERDICTS = {"cannot tell": "undecided"}
#: Estimates above this number of tokens are shown as "more than", being too close to call.
_MOST_TOKENS = 9_900_000


def corpora_report(record: CorpusComparison) -> Report:
    """Return the report of a comparison of corpora.

    Args:
        record: The comparison.
    """
    model, count = record.provenance.model, len(record.corpora)
    return Report(
        kicker="CASCADE corpora",
        title=f"{count} corpora on {model.name}",
        about=(
            f"{model.num_layers} decoder layers, {model.dtype} on {model.device}; exit "
            f"layer {record.settings.layer}"
        ),
        sections=(
            Section("", (Lead(_lead(record), "open"), Pairs(tuple(_corpora(record))))),
            Section("Which layers move", tuple(_moves(record))),
            Section("Special layers", tuple(_roles(record))),
            Section("Whether thresholds transfer", tuple(_transfers(record))),
        ),
        provenance=to_plain(record.provenance),
    )


def _lead(record: CorpusComparison) -> str:
    margin, rows = record.settings.margin, len(record.layers)
    moved = [
        f"{len(pair.layers['moves']) or 'none'} in {pair.corpus}" for pair in record.differences
    ]
    counts = record.thresholds.counts
    total = sum(counts.values())
    roles = _role_words(record) if record.special.same else "Not every layer keeps its role."
    return (
        f"{roles} Of {rows} mean similarities, these differ from A by significantly more than "
        f"{margin:g}: {listed(moved)}. Of {total} thresholds that were fitted on one corpus and "
        f"used on another, {counts['transfers'] or 'none'} transfer (the hard ratio stays within "
        f"{record.settings.tolerance:g} of its target), "
        f"{counts['does not'] or 'none'} do not"
        + (f", and {counts['cannot tell']} are undecided." if counts["cannot tell"] else ".")
    )


def _corpora(record: CorpusComparison) -> Iterator[tuple[str, str]]:
    for corpus in record.corpora:
        spread = f", spread {corpus.spread}" if corpus.spread else ""
        yield corpus.label, corpus_words(corpus) + spread
        yield from few_pairs(corpus)
    for pair in record.shared:
        yield (
            "Warning",
            f"{listed(pair.corpora)} have {pair.sequences:,} sequences in common: they are "
            "not independent, and their intervals are too wide or too narrow",
        )


# --- Which layers move -----------------------------------------------------------------------


def _moves(record: CorpusComparison) -> Iterator[Block]:
    margin, confidence = record.settings.margin, record.settings.confidence
    sure = f"{100 * confidence:g} %"
    yield (
        "The interval of a difference comes from resampled whole sequences. The intervals of all "
        f"layers of a corpus hold simultaneously with {sure} confidence. A layer "
        f"moves if its interval lies outside the margin of {margin:g}, and stays if it lies "
        "inside. Otherwise it is undecided, and the table says how many tokens of each corpus "
        "would decide if the difference stays the same."
    )
    for pair in record.differences:
        yield _pair_words(record, pair)
    yield Picture(
        "corpora-profiles.svg",
        corpora_profiles_svg(record),
        f"Above: mean similarity per layer and corpus, with {sure} intervals. Below: differences "
        "from A, with simultaneous intervals. If some are far beyond the margin, the axis is "
        "logarithmic outside it. Filled: the layer moves. Open: it stays or is undecided.",
    )
    for start in range(0, len(record.corpora), _MOST_COLUMNS):
        yield _means(record, range(start, min(start + _MOST_COLUMNS, len(record.corpora))))
    for pair in record.differences:
        table = _differences(record, pair)
        if table.rows:
            yield table


def _pair_words(record: CorpusComparison, pair: CorpusDifferences) -> str:
    """Return which layers of one corpus move, how far, and which are undecided."""
    rows = {row.layer: row for row in pair.rows}
    by: dict[LayerVerdict, list[str]] = {
        verdict: [f"{layer} ({rows[layer].difference:+.4f})" for layer in layers]
        for verdict, layers in pair.layers.items()
    }
    count = len(by["moves"])
    parts = [
        f"{count or 'none'} of {len(rows)} layer means {'moves' if count == 1 else 'move'}"
        + (f": {_few(by['moves'])}" if by["moves"] else ""),
        f"{len(by['stays']) or 'none'} stay{'s' * (len(by['stays']) == 1)}",
    ]
    if by["cannot tell"]:
        parts.append(f"{len(by['cannot tell'])} undecided: {_few(by['cannot tell'])}")
    name = _name(record, pair.corpus)
    return f"{name} against {pair.against}: {'; '.join(parts)}.{_norm_words(rows)}"


def _few(names: Sequence[str]) -> str:
    if len(names) <= _MAX_NAMED:
        return listed(names)
    return f"{', '.join(names[:_MAX_NAMED])} and {len(names) - _MAX_NAMED} more"


def _name(record: CorpusComparison, label: str) -> str:
    name = next(corpus.name for corpus in record.corpora if corpus.label == label)
    return f"{label} ({name})"


def _norm_words(rows: dict[str, LayerDifference]) -> str:
    """Return the difference of the last layer with and without the final norm."""
    normed = next((row for row in rows.values() if is_normed(row)), None)
    if normed is None:
        return ""
    last = rows[normed.layer.removesuffix(NORM_SUFFIX)]
    return (
        f" Layer {last.layer} itself differs by {last.difference:+.4f}; after the "
        f"final norm (row {normed.layer}) by {normed.difference:+.4f}."
    )


def _means(record: CorpusComparison, numbers: range) -> Table:
    labels = [record.corpora[number].label for number in numbers]
    rows = [
        [
            row.layer,
            *(
                f"{show(row.means[number].mean)} ±{_half(row.means[number].interval)}"
                for number in numbers
            ),
        ]
        for row in record.layers
    ]
    sure = f"{100 * record.settings.confidence:g} %"
    return table_of(f"Mean similarity, with {sure} intervals.", ["Layer", *labels], rows)


def _half(interval: Sequence[float]) -> str:
    return f"{(interval[1] - interval[0]) / 2:.4f}"


def _differences(record: CorpusComparison, pair: CorpusDifferences) -> Table:
    rows = [
        [
            row.layer,
            f"{row.difference:+.4f}",
            f"±{_half(row.interval)}",
            _VERDICTS.get(row.verdict, row.verdict),
            _tokens_needed(row),
        ]
        for row in pair.rows
        if row.verdict != "stays"
    ]
    name = f"{pair.corpus} - {pair.against}"
    return table_of(
        f"{name}: the layers that do not stay within {record.settings.margin:g}.",
        ["Layer", name, "", "verdict", "tokens needed"],
        rows,
        text_columns=2,
        active=pair.layers["moves"],
    )


def _tokens_needed(row: LayerDifference | ThresholdTransfer) -> str:
    """Return the number of tokens that would decide an undecided row; empty if none would."""
    needed = row.tokens_needed
    if needed is None:
        return ""
    if needed > _MOST_TOKENS:
        return f"> {_MOST_TOKENS:,}"
    # Two significant digits, because it is an estimate.
    unit = 10 ** max(0, len(str(needed)) - 2)
    return f"{-(-needed // unit) * unit:,}"


# --- Special layers --------------------------------------------------------------------------


def _roles(record: CorpusComparison) -> Iterator[Block]:
    yield _role_words(record)
    header = ["", "input transform", "dips", "output transform", "stable bands", "exit layer"]
    rows = [
        [
            corpus.label,
            *(
                ", ".join(layers) or "none"
                for layers in (
                    corpus.structure.input_transform,
                    corpus.structure.dips,
                    corpus.structure.output_transform,
                )
            ),
            ", ".join(
                first if first == last else f"{first}-{last}"
                for first, last in corpus.structure.stable_bands
            )
            or "none",
            str(corpus.suggested_exit_layer),
        ]
        for corpus in record.corpora
    ]
    yield table_of(
        "Found by the rule of `cascade analyze` in each corpus.", header, rows, text_columns=5
    )


def _role_words(record: CorpusComparison) -> str:
    special = record.special
    if special.same:
        return "Every layer has the same role in all corpora."
    if not special.differ:
        return "The same layers are special in all corpora, but not in the same role."
    parts = []
    for row in special.differ:
        shares = ", ".join(f"{label} {share(value)}" for label, value in row.shares.items())
        how = "significantly" if row.sure else "not significantly"
        parts.append(
            f"Layer {row.layer} is special only in {listed(row.special_in)}, {how} so "
            f"(share of resamples in which it is: {shares})."
        )
    return " ".join(parts)


# --- Whether thresholds transfer -------------------------------------------------------------


def _transfers(record: CorpusComparison) -> Iterator[Block]:
    settings = record.settings
    yield rule_sentence(str(settings.layer))
    yield (
        "A threshold is fitted on one corpus for a target hard ratio and realizes another ratio on "
        f"another corpus. It transfers if the 95 % interval of that ratio is within "
        f"{settings.tolerance:g} of the target, and does not if the interval is outside. Otherwise "
        "it is undecided, and the table says how many tokens of that corpus would decide."
    )
    yield Picture(
        "corpora-thresholds.svg",
        corpora_thresholds_svg(record),
        "On each corpus, the hard ratio under the thresholds of the other corpora minus the "
        "target, with 95 % intervals. Filled: the threshold does not transfer. Open: it transfers "
        "or is undecided.",
    )
    rows = [
        [
            f"{row.fitted_on} to {row.applied_to}",
            share(row.hard_ratio),
            f"{row.threshold:.4f}",
            share(row.realized),
            between(row.interval, share, " to "),
            _VERDICTS.get(row.verdict, row.verdict),
            _tokens_needed(row),
        ]
        for row in record.thresholds.rows
    ]
    header = [
        "threshold of",
        "target",
        "threshold",
        "realized",
        "95 % interval",
        "verdict",
        "tokens needed",
    ]
    yield table_of("Target and realized hard ratios.", header, rows, text_columns=2)

"""The report of a final norm: its effect on the last layer's similarity, and its weights."""

from __future__ import annotations

from collections.abc import Sequence

from cascade.core.schema import known, to_plain
from cascade.report.common.records import bos_words
from cascade.report.common.sections import Block, Lead, Picture, Report, Section, Table, table_of
from cascade.report.common.svg import LIGHT, as_svg, new_figure, plain_style, title_of
from cascade.report.common.words import whole_percent
from cascade.studies.explanations.records import FinalNormExplanation, LevelledWeights

#: The pictures that the report may have.
PICTURES = ("final-norm.svg",)

_WORDS = {
    "residual": "both on the residual stream",
    "behind": "output after the norm, input before it (the usual mistake)",
    "both_behind": "both after the norm",
    "equal_weights": "output after a norm with equal weights and no bias",
    "without_bias": "output after the norm without its bias",
}


def final_norm_report(record: FinalNormExplanation) -> Report:
    """Return the report of a final norm.

    Args:
        record: The explanation.
    """
    settings = record.settings
    model, corpus = record.provenance.model, record.provenance.corpus
    layer = settings.layer
    return Report(
        kicker="CASCADE final norm",
        title=f"Layer {layer} of {known(model.name) or model.family} and its final norm",
        about=(
            f"{corpus.name}: {settings.sequences:,} sequences x {corpus.seq_len:,} tokens"
            f"{bos_words(corpus.bos)} measured, {settings.pilot_sequences:,} others to order the "
            f"weights; "
            f"{model.dtype} on {model.device}"
        ),
        sections=(
            Section("", (Lead(_verdict(record), "pass"),)),
            Section("Similarity of the last layer", (_similarities(record),)),
            Section("Weights that change it", _weights(record)),
        ),
        provenance=to_plain(record.provenance),
    )


def _means(record: FinalNormExplanation) -> dict[str, float]:
    return {row.between: row.mean for row in record.similarities}


def _verdict(record: FinalNormExplanation) -> str:
    means, layer = _means(record), record.settings.layer
    text = (
        f"The mean similarity of layer {layer} is {means['residual']:.3f} on the residual stream. "
        f"It is {means['behind']:.3f} if only the output is taken after the final norm, and "
        f"{means['both_behind']:.3f} if input and output both are."
    )
    enough, explained = _enough(record)
    if enough is None:
        return f"{text} No small number of weights explains the difference."
    dims = [row.dimension for row in record.dimensions[: enough.weights]]
    if enough.weights == 1:
        first = record.dimensions[0]
        sign = "negative " if first.weight < 0 else ""
        which = f"The {sign}weight of dimension {first.dimension}, {first.weight:.2f}, alone"
        verb, them = "explains", "it is"
    elif len(dims) <= 5:
        which = f"The weights of the dimensions {', '.join(map(str, dims))}"
        verb, them = "explain", "they are"
    else:
        which, verb, them = f"{enough.weights} weights", "explain", "they are"
    return (
        f"{text} {which} {verb} {100 * explained:.0f} % of the difference between the first two. "
        f"If {them} set to the median weight of {record.weights.median:.2f}, the similarity is "
        f"{enough.similarity:.3f}."
    )


def _enough(record: FinalNormExplanation) -> tuple[LevelledWeights | None, float]:
    """Return the fewest weights that explain most of the difference, and their share of it."""
    for row in record.levelled:
        if row.explained is not None and row.explained >= 0.8:
            return row, row.explained
    return None, 0.0


def _interval(interval: Sequence[float]) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def _similarities(record: FinalNormExplanation) -> Table:
    shown = [
        row for row in record.similarities if row.between != "without_bias" or record.norm.has_bias
    ]
    centred = record.norm.subtracts_mean
    # A norm that only divides by the size changes no angle.
    shown = [row for row in shown if row.between != "equal_weights" or centred]
    return table_of(
        f"Mean similarity of layer {record.settings.layer}'s input and output, by where they are "
        "taken.",
        ("mean", "95 % interval", "input and output"),
        [[f"{row.mean:.3f}", _interval(row.interval), _WORDS[row.between]] for row in shown],
        text_columns=1,
    )


def _weights(record: FinalNormExplanation) -> tuple[Block, ...]:
    spread = record.weights
    words = (
        f"The norm has {spread.dimensions:,} weights between {spread.smallest:.2f} and "
        f"{spread.largest:.2f}, with a median of {spread.median:.2f}; {spread.negative:,} of them "
        "are negative."
    )
    dims = table_of(
        "The dimensions in which the norm reduces the similarity most: weight, share of the "
        "output's energy (without first tokens), and contribution to the similarity before and "
        "after the norm.",
        ("dimension", "weight", "energy", "before", "after"),
        [
            [
                str(row.dimension),
                f"{row.weight:.3f}",
                f"{100 * row.energy:.1f} %",
                f"{row.before:.4f}",
                f"{row.behind:.4f}",
            ]
            for row in record.dimensions
        ],
    )
    levelled = table_of(
        "The similarity if the first weights of the table above are set to the median, and the "
        "share of the difference that this explains. Last two columns: the reverse, only these "
        "weights are kept and all others are set to the median.",
        ("weights", "similarity", "explained", "only these", "explained"),
        [
            [
                f"{row.weights:,}",
                f"{row.similarity:.3f}",
                whole_percent(row.explained),
                f"{row.alone:.3f}",
                whole_percent(row.explained_alone),
            ]
            for row in record.levelled
        ],
    )
    picture = Picture(
        "final-norm.svg",
        final_norm_svg(record),
        "The similarity of the last layer if the weights with the largest effect, or all others, "
        "are set to the median. Dashed: on the residual stream, and with the output after the "
        "unchanged norm.",
    )
    return (words, dims, levelled, picture)


def final_norm_svg(record: FinalNormExplanation) -> str:
    """Draw the similarity against the number of equalized weights.

    Args:
        record: The explanation.
    """
    means = _means(record)
    with plain_style():
        figure = new_figure((10, 4.2))
        axes = figure.add_subplot()
        title = title_of(record, f"layer {record.settings.layer} and the final norm")
        axes.set_title(title, loc="left", pad=14, fontsize=11, parse_math=False)
        rows = record.levelled
        places = range(1, len(rows) + 1)
        axes.plot(
            [0, *places],
            [means["behind"], *(row.similarity for row in rows)],
            color=LIGHT["active"],
            marker="o",
            markersize=4,
            label="these weights set to the median",
        )
        axes.plot(
            [0, *places],
            [means["residual"], *(row.alone for row in rows)],
            color=LIGHT["mean"],
            marker="s",
            markersize=4,
            label="all others set to the median",
        )
        for name, words in (("residual", "residual stream"), ("behind", "after the norm")):
            axes.axhline(means[name], color=LIGHT["muted"], linestyle=(0, (4, 3)), linewidth=1)
            axes.annotate(
                f"{words}: {means[name]:.3f}",
                (len(rows), means[name]),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                color=LIGHT["muted"],
                fontsize=8.5,
            )
        axes.set_xticks([0, *places], ["none", *(f"{row.weights:,}" for row in rows)])
        axes.set_xlabel("number of weights, largest effect first")
        axes.set_ylabel("mean similarity")
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=2)
        return as_svg(
            figure,
            "final-norm",
            "Line chart: similarity against the number of weights set to the median.",
        )

"""The report of a saturation profile, for terminal and HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from cascade.core.schema import to_plain
from cascade.report.common.records import (
    NORM_SUFFIX,
    ROLES,
    Arrays,
    headline,
    is_normed,
    percent,
    rule_sentence,
    show,
)
from cascade.report.common.sections import Bars, Block, Lead, Pairs, Picture, Report, Section, Table
from cascade.saturation.records import SAME_CONTENT, ProfileRecord

_STATISTICS = ("mean", "std", "min", "p10", "p50", "p90", "max")


def profile_report(record: ProfileRecord, pictures: tuple[str, str] | None = None) -> Report:
    """Return the report of a profile.

    Args:
        record: The profile's record.
        pictures: The results of `layer_profile_svg` and `density_svg`, which only a page shows.

    Returns:
        Five sections: special layers, mean similarity, statistics, outliers, thresholds.

    Raises:
        ValueError: The record has another schema or no layers.
    """
    check_profile(record)
    about = headline(record)
    return Report(
        kicker="CASCADE saturation profile",
        title=str(record.provenance.model.name),
        about=" · ".join(text for _, text in about[1:]),
        sections=(
            Section(
                "Special layers", (Lead(summary(record)), Pairs(tuple(_special_layers(record))))
            ),
            Section("Mean similarity", (_bars(record), *_pictures(record, pictures))),
            Section("Similarity of input and output, per layer", (_statistics(record),)),
            Section("Outliers: share of tokens", (_outliers(record),)),
            Section("Suggested thresholds", tuple(_thresholds(record))),
        ),
        provenance=to_plain(record.provenance),
        labels=tuple(about),
    )


def check_profile(record: ProfileRecord) -> None:
    """Raise if a record cannot be shown.

    Raises:
        ValueError: The record has another schema or no layers.
    """
    if not SAME_CONTENT <= record.schema <= record.SCHEMA:
        raise ValueError(f"expected schema {record.SCHEMA}, got {record.schema}")
    if not record.layers:
        raise ValueError("expected at least one layer, got none")


def check_histogram(record: ProfileRecord, arrays: Arrays) -> None:
    """Refuse arrays that belong to another record."""
    missing = [name for name in ("layers", "histogram") if name not in arrays]
    if missing:
        raise ValueError(f"expected the arrays layers and histogram, got none of {missing}")
    names = [row.layer for row in record.layers]
    got = [str(name) for name in arrays["layers"]]
    if got != names:
        raise ValueError(f"expected arrays of the layers {names}, got {got}")
    shape = arrays["histogram"].shape
    if len(shape) != 2 or shape[0] != len(names):
        raise ValueError(f"expected a histogram of shape [{len(names)}, bins], got {list(shape)}")
    if not arrays["histogram"].any():
        raise ValueError("expected a histogram with counted tokens, got only zeros")


def roles_of(record: ProfileRecord) -> dict[str, str]:
    """Return the role of every active layer, by layer name."""
    return {layer: role for key, role in ROLES.items() for layer in layers_of(record, key)}


def layers_of(record: ProfileRecord, key: str) -> list[str]:
    """Return the active layers of one role.

    Args:
        record: The profile's record.
        key: A key of `ROLES`.
    """
    layers: list[str] = getattr(record.structure, key)
    return layers


def summary(record: ProfileRecord) -> str:
    """Return the main finding in two or three sentences."""
    if record.structure.cutoff is None:
        return "There are too few layers to distinguish active from stable ones."
    bands, cutoff = _bands(record), show(record.structure.cutoff)
    if bands == "none":
        stable = f"No run of layers stays at or above a mean similarity of {cutoff}."
    else:
        stable = (
            f"Hidden states are saturated in layers {bands}, where every layer's mean similarity "
            f"is at least {cutoff}."
        )
    active = [
        f"{role} in {_listed(layers_of(record, key))}"
        for key, role in ROLES.items()
        if layers_of(record, key)
    ]
    return f"{stable} Active layers: {'; '.join(active) or 'none'}."


# --- Tables ----------------------------------------------------------------------------------


def _bars(record: ProfileRecord) -> Bars:
    roles = roles_of(record)
    return Bars(tuple((row.layer, row.mean, roles.get(row.layer, "")) for row in record.layers))


def _pictures(record: ProfileRecord, pictures: tuple[str, str] | None) -> list[Picture]:
    if pictures is None:
        return []
    apart = " The row after the final norm is set apart, because it is no decoder layer."
    return [
        Picture(
            "layer-profile.svg",
            pictures[0],
            "Similarity of each layer's input and output. The axis is uniform in angle, which "
            f"spreads the values near 1.{apart if any(map(is_normed, record.layers)) else ''}",
        ),
        Picture(
            "density.svg",
            pictures[1],
            "Distribution of tokens. Each column is one layer, each cell the share of its tokens "
            "at that similarity, on a logarithmic colour scale. Dark cells contain no tokens.",
        ),
    ]


def _statistics(record: ProfileRecord) -> Table:
    roles = roles_of(record)
    return Table(
        "Similarity per layer: statistics over all tokens. Shaded rows are active layers.",
        ("Layer", *_STATISTICS, "role"),
        tuple(
            (
                row.layer,
                *(show(getattr(row, name)) for name in _STATISTICS),
                roles.get(row.layer, ""),
            )
            for row in record.layers
        ),
        text_columns=1,
        active=tuple(roles),
        gap=0,
        page_caption=True,
    )


def _outliers(record: ProfileRecord) -> Block:
    rows = [
        (row.layer, percent(row.frac_negative), percent(row.frac_below_half))
        for row in record.layers
        if row.frac_negative > 0 or row.frac_below_half > 0
    ]
    if not rows:
        return "No token lies below 0.5 in any layer."
    return Table(
        "Share of tokens below 0 and below 0.5, for the layers that have any. 0.00% means none.",
        ("Layer", "below 0", "below 0.5"),
        tuple(rows),
        gap=2,
        page_caption=True,
    )


def _thresholds(record: ProfileRecord) -> list[Block]:
    rows = [
        (
            f"{100 * entry.hard_ratio:g}%",
            f"{entry.threshold:.6f}",
            f"{100 * entry.hard_ratio:g}% continue, {100 - 100 * entry.hard_ratio:g}% exit",
        )
        for entry in record.thresholds.by_hard_ratio
    ]
    if not rows:
        return ["none"]
    table = Table(
        "Thresholds by target hard ratio.",
        ("hard ratio", "threshold", "meaning"),
        tuple(rows),
        text_columns=1,
        gap=2,
        page_caption=True,
    )
    return [rule_sentence(record.thresholds.exit_layer), table]


# --- Special layers --------------------------------------------------------------------------


def _special_layers(record: ProfileRecord) -> list[tuple[str, str]]:
    """Return the special layers, as (label, text)."""
    pairs = [
        ("Stable bands", _bands(record)),
        ("Input transform", _active_layers(record, "input_transform")),
        ("Dips", _active_layers(record, "dips")),
        ("Output transform", _active_layers(record, "output_transform")),
    ]
    norm = _final_norm(record)
    if norm is not None:
        pairs.append(("Final norm", norm))
    return [
        *pairs,
        ("Cutoff", _cutoff(record)),
        ("Rule", record.structure.rule),
        ("Source", record.structure.source),
    ]


def _cutoff(record: ProfileRecord) -> str:
    cutoff = record.structure.cutoff
    if cutoff is None:
        return "too few layers to distinguish active from stable ones"
    return f"a layer with a mean similarity below {show(cutoff)} is active"


def _final_norm(record: ProfileRecord) -> str | None:
    """Return how the last layer compares with the final norm; None without a `+norm` row."""
    rows = {row.layer: row for row in record.layers}
    normed = next((row for row in record.layers if is_normed(row)), None)
    if normed is None:
        return None
    last = normed.layer.removesuffix(NORM_SUFFIX)
    return (
        f"layer {last} itself has a mean similarity of {show(rows[last].mean)}; after the final "
        f"norm (row {normed.layer}) it is {show(normed.mean)}. The difference comes from the norm, "
        "not from the layer."
    )


def _active_layers(record: ProfileRecord, key: str) -> str:
    """Return the layers of one role with their means, or `none`."""
    means = {row.layer: row.mean for row in record.layers}
    layers = layers_of(record, key)
    return _listed([f"{layer} (mean {show(means[layer])})" for layer in layers])


def _bands(record: ProfileRecord) -> str:
    """Return the stable bands, such as `3 to 24 and 26 to 29`, or `none`."""
    bands = record.structure.stable_bands
    return _listed([first if first == last else f"{first} to {last}" for first, last in bands])


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names) or "none"
    return f"{', '.join(names[:-1])} and {names[-1]}"

"""What a record says, as rows and words: shared by the terminal, the figures and the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from cascade.core.schema import Part

Record = Mapping[str, Any]
Arrays = Mapping[str, npt.NDArray[Any]]

_KIND = "saturation"
SCHEMA = 1
#: Schemas of the kinds that are beyond the first.
_SCHEMAS = {_KIND: 2}
_SECTIONS = ("provenance", "layers", "structure", "thresholds")
STATISTICS = ("mean", "std", "min", "p10", "p50", "p90", "max")
ROLES = {
    "input_transform": "input transform",
    "dips": "dip",
    "output_transform": "output transform",
}
NORM_SUFFIX = "+norm"
#: What each exit rule calls its confidence, and what that is.
RULE_WORDS = {
    "cosine": ("similarity", "the similarity of the layer's input and output"),
    "mean_cosine": ("mean similarity", "the mean similarity of the layer and the one before it"),
    "top2_gap": ("gap", "the gap between the exit head's two largest probabilities"),
    "max_probability": ("probability", "the exit head's largest probability"),
    "entropy": ("certainty", "one minus the entropy of the exit head, in shares of the largest"),
    "patience": ("streak", "how many exit layers before it predict the same token"),
}


def check_record(record: Record, kind: str, sections: Sequence[str]) -> None:
    """Refuse what is not a whole record of a kind, before anything is shown.

    Raises:
        ValueError: It is of another kind or schema, lacks a section, or holds NaN; in one line.
    """
    for key, expected in (("kind", kind), ("schema", _SCHEMAS.get(kind, SCHEMA))):
        if record.get(key) != expected:
            raise ValueError(f"expected {key} {expected!r}, got {record.get(key)!r}")
    missing = [section for section in sections if section not in record]
    if missing:
        raise ValueError(f"expected the sections {', '.join(sections)}, got none of {missing}")
    place = next(_nan_places(record), None)
    if place is not None:
        raise ValueError(f"expected numbers, got nan at {place}; make the record anew")


def _nan_places(value: Any, place: str = "") -> Iterator[str]:
    if isinstance(value, float) and math.isnan(value):
        yield place
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _nan_places(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _nan_places(item, f"{place}[{index}]")


def check_profile(record: Record) -> None:
    """Refuse what is not a saturation profile, before anything is drawn."""
    check_record(record, _KIND, _SECTIONS)
    if not record["layers"]:
        raise ValueError("expected at least one layer, got none")


def check_histogram(record: Record, arrays: Arrays) -> None:
    """Refuse arrays that belong to another record."""
    missing = [name for name in ("layers", "histogram") if name not in arrays]
    if missing:
        raise ValueError(f"expected the arrays layers and histogram, got none of {missing}")
    names = [row["layer"] for row in record["layers"]]
    got = [str(name) for name in arrays["layers"]]
    if got != names:
        raise ValueError(f"expected arrays of the layers {names}, got {got}")
    shape = arrays["histogram"].shape
    if len(shape) != 2 or shape[0] != len(names):
        raise ValueError(f"expected a histogram of shape [{len(names)}, bins], got {list(shape)}")
    if not arrays["histogram"].any():
        raise ValueError("expected a histogram with counted tokens, got only zeros")


def roles_of(record: Record) -> dict[str, str]:
    """Return the role of every active layer, by layer name."""
    structure = record["structure"]
    return {layer: role for key, role in ROLES.items() for layer in structure[key]}


def is_normed(row: Record | Part) -> bool:
    """Whether a row is that of the state behind the final norm."""
    return str(row["layer"]).endswith(NORM_SUFFIX)


def show(value: float) -> str:
    """Format a similarity."""
    # "z": a mean of -0.00001 reads 0.0000, not -0.0000.
    return f"{value:z.4f}"


def percent(share: float, digits: int = 2) -> str:
    """Format a share so that 0.00% means none and 100.00% means all, never nearly."""
    smallest = 10.0**-digits
    if 0 < share < smallest / 200:
        return f"<{smallest:.{digits}f}%"
    if 1 - smallest / 200 <= share < 1:
        return f">{100 - smallest:.{digits}f}%"
    return f"{100 * share:.{digits}f}%"


def statistics_rows(record: Record) -> list[list[str]]:
    """Return the seed's table: layer, statistics, role."""
    roles = roles_of(record)
    return [
        [
            row["layer"],
            *(show(row[name]) for name in STATISTICS),
            roles.get(row["layer"], ""),
        ]
        for row in record["layers"]
    ]


def outlier_rows(record: Record) -> list[list[str]]:
    """Return layer, share below 0 and below 0.5, for the layers that have any."""
    return [
        [row["layer"], percent(row["frac_negative"]), percent(row["frac_below_half"])]
        for row in record["layers"]
        if row["frac_negative"] > 0 or row["frac_below_half"] > 0
    ]


def threshold_rows(record: Record) -> list[list[str]]:
    """Return hard ratio, threshold and what it means."""
    return [
        [
            f"{100 * entry['hard_ratio']:g}%",
            f"{entry['threshold']:.6f}",
            f"{100 * entry['hard_ratio']:g}% go on, {100 - 100 * entry['hard_ratio']:g}% exit",
        ]
        for entry in record["thresholds"]["by_hard_ratio"]
    ]


def _listed(parts: Sequence[str]) -> str:
    if len(parts) < 2:
        return "".join(parts) or "none"
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _bands(record: Record) -> str:
    """Name the stable bands: `3 to 24 and 26 to 29`, or `none`."""
    bands = record["structure"]["stable_bands"]
    return _listed([first if first == last else f"{first} to {last}" for first, last in bands])


def active_layers(record: Record, key: str) -> str:
    """Name the layers of one role with their means, or `none`."""
    means = {row["layer"]: row["mean"] for row in record["layers"]}
    layers = record["structure"][key]
    return _listed([f"{layer} (mean {show(means[layer])})" for layer in layers])


def final_norm(record: Record) -> str | None:
    """Tell the last layer from the final norm behind it; None without a `+norm` row."""
    rows = {row["layer"]: row for row in record["layers"]}
    normed = next((row for row in record["layers"] if is_normed(row)), None)
    if normed is None:
        return None
    last = normed["layer"].removesuffix(NORM_SUFFIX)
    return (
        f"layer {last} itself has a mean similarity of {show(rows[last]['mean'])}; read behind "
        f"the final norm (row {normed['layer']}) it is {show(normed['mean'])}. The difference "
        "is made by the norm, not by the layer."
    )


def _cutoff(record: Record) -> str:
    cutoff = record["structure"]["cutoff"]
    if cutoff is None:
        return "too few layers to tell active layers from stable ones"
    return f"a layer with a mean similarity below {show(cutoff)} is active"


def findings(record: Record) -> list[tuple[str, str]]:
    """Return the special layers in words, as (label, text)."""
    structure = record["structure"]
    findings = [
        ("Stable bands", _bands(record)),
        ("Input transform", active_layers(record, "input_transform")),
        ("Dips", active_layers(record, "dips")),
        ("Output transform", active_layers(record, "output_transform")),
    ]
    norm = final_norm(record)
    if norm is not None:
        findings.append(("Final norm", norm))
    return [
        *findings,
        ("Cutoff", _cutoff(record)),
        ("Rule", structure["rule"]),
        ("Source", structure["source"]),
    ]


def exit_rule(record: Record) -> str:
    """Say which two states the thresholds compare, and what hard and easy mean."""
    return rule_sentence(str(record["thresholds"]["exit_layer"]))


def rule_sentence(layer: str, rule: str = "cosine") -> str:
    """Say what a rule looks at in an exit layer, and what hard and easy mean."""
    value, what = "confidence", f", rule {rule}"
    if rule in RULE_WORDS:
        value, meaning = RULE_WORDS[rule]
        what = f": {meaning}"
    if rule in ("cosine", "mean_cosine"):
        last = int(layer) if layer.isdigit() else None
        pairs = [] if last is None else [last] if rule == "cosine" else [last - 1, last]
        # Spelled out because the pair one further up is the off-by-one of the first study.
        what = "".join(f", history[{after - 1}] against history[{after}]" for after in pairs)
    return (
        f"Exit layer {layer}{what}. Hard: {value} < threshold, the token goes on. "
        f"Easy: {value} >= threshold, the token exits."
    )


def headline(record: Record) -> list[tuple[str, str]]:
    """Return model, corpus and run in one line each."""
    model, corpus = record["provenance"]["model"], record["provenance"]["corpus"]
    traits = [model["family"], f"{model['num_layers']} decoder layers", model["quantization"]]
    return [
        ("Model", f"{model['name']} ({', '.join(trait for trait in traits if trait)})"),
        (
            "Corpus",
            f"{corpus['name']}, {corpus['tokens']:,} tokens: "
            f"{corpus['sequences']:,} sequences x {corpus['seq_len']:,}",
        ),
        ("Run", f"{model['dtype']} on {model['device']}"),
    ]


def summary(record: Record) -> str:
    """Say in two or three sentences what was found."""
    if record["structure"]["cutoff"] is None:
        return "There are too few layers to tell active ones from stable ones."
    bands, cutoff = _bands(record), show(record["structure"]["cutoff"])
    if bands == "none":
        stable = f"No run of layers stays at or above a mean similarity of {cutoff}."
    else:
        stable = (
            f"Hidden states are saturated in layers {bands}: there, every layer's mean similarity "
            f"is at least {cutoff}."
        )
    active = [
        f"{role} in {_listed(record['structure'][key])}"
        for key, role in ROLES.items()
        if record["structure"][key]
    ]
    return f"{stable} Active layers: {'; '.join(active) or 'none'}."

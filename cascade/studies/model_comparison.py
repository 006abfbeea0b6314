"""Models beside each other: profiles over relative depth, dips matched, exit layers suggested."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from scipy import stats

from cascade.core.arrays import Array
from cascade.core.errors import UsageError
from cascade.core.provenance import library_versions, machine_of
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.models.identity import tokenizer_hash
from cascade.models.stack import DecoderStack, check_config
from cascade.models.weights import resolve
from cascade.saturation.profile import SaturationProfile, analyze
from cascade.studies.altered_models import Copy
from cascade.studies.configurations import (
    Configuration,
    Sizes,
    lacks_weights,
    layer_at,
    read_configuration,
    sizes_of,
)

#: More curves than this cannot be told apart in one picture.
MOST_MODELS = 12


#: A dip of one model matches one of another where their relative depths differ by at most this, or
#: by one layer of the shallower model, whichever is more.
TOLERANCE = Fraction(1, 20)


#: Where nothing was measured: depths to name layers for; the last is the study's, 29 of 30.
REFERENCE_DEPTHS = (
    Fraction(1, 2),
    Fraction(2, 3),
    Fraction(4, 5),
    Fraction(9, 10),
    Fraction(29, 30),
)


_CONFIDENCE = 0.95


RULES = {
    "depth": "the relative depth of a layer is its number divided by the number of decoder layers",
    "dips": (
        "a dip of one model matches the nearest one of another, each at most once, nearest pairs "
        "first, where their relative depths differ by at most 0.05 or by one layer of the "
        "shallower model, whichever is more"
    ),
    "exit": "the last layer of the last stable band; the last layer but one where there is none",
    "spared": (
        "the share of the model's operations (products of matrices, and attention) in the layers "
        "behind the exit layer; a token that leaves spares at most this, because it still owes "
        "the LM head, and keys and values"
    ),
    "paired": (
        "the same tokens through both models: each sequence's mean similarity in a layer, the "
        "first model's subtracted; size: the mean of its size over sequences, whatever its sign; "
        "intervals are Student's over sequences, at 95 %"
    ),
    "apart": (
        "root mean square of the difference in the angle of mean similarities, in degrees, at the "
        "relative depths of the shallower model's layers, the other's interpolated"
    ),
}


@dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
        source: Whatever `cascade.load` takes.
        copy: How its weights are altered after loading.
        measured: Whether it is measured, or described by its configuration alone.
    """

    source: str
    copy: Copy | None = None
    measured: bool = True

    def check(self) -> None:
        """Refuse what could not be compared, before any model is measured.

        Raises:
            CascadeError: As for `cascade.load`.
        """
        where = str(resolve(self.source).folder) if self.measured else self.source
        check_config(read_configuration(where).config)


def candidates(
    models: Sequence[str],
    *,
    copies: Sequence[Copy] = (),
    unmeasured: Sequence[str] = (),
    config_only: bool = False,
) -> list[Candidate]:
    """Return what is compared, in order: models, copies of the first one, unmeasured models.

    A folder that holds a configuration and no weights is described by it.

    Args:
        models: Whatever `cascade.load` takes.
        copies: How to alter copies of the first model.
        unmeasured: Models that are described by their configuration alone.
        config_only: Measure none.

    Raises:
        UsageError: Fewer than two models, or too many; or copies of a model that is not measured.
    """
    found = [
        Candidate(source, measured=not (config_only or lacks_weights(source))) for source in models
    ]
    if copies and not (found and found[0].measured):
        raise UsageError(
            "--copy alters the weights of the first model, which is not measured; leave it out"
        )
    found[1:1] = [replace(found[0], copy=how) for how in copies]
    found += [Candidate(source, measured=False) for source in unmeasured]
    if len(found) < 2:
        raise UsageError(
            f"expected at least two models, got {len(found)}; name another one, or add a copy of "
            "the first with --copy int8"
        )
    if len(found) > MOST_MODELS:
        raise UsageError(f"expected at most {MOST_MODELS} models, got {len(found)}")
    return found


class SameText:
    """Reads the same records of a corpus with each model's own tokenizer.

    The first model's tokens decide where the text ends; another tokenizer, which cuts it into more
    tokens or fewer, reads the same records to their end. One long document is read up to the same
    number of tokens instead.

    Args:
        source: As for `cascade.load_blocks`.
        max_tokens: Of the first model.
        options: What else `cascade.load_blocks` takes.
    """

    def __init__(self, source: str, *, max_tokens: int | None = None, **options: Any) -> None:
        self._source = source
        self._options = options
        self._max_tokens = max_tokens
        self._first: tuple[str | None, TokenBlocks] | None = None

    def blocks(self, stack: DecoderStack) -> TokenBlocks:
        """Return the text in the model's own tokens.

        Raises:
            CorpusError: As for `cascade.load_blocks`.
        """
        known, first = self._first or (None, None)
        own = None if stack.tokenizer is None else tokenizer_hash(stack.tokenizer)
        if first is not None and own == known:
            return first
        options: dict[str, Any] = self._options | {"max_tokens": self._max_tokens}
        if first is not None and first.records > 1:
            options |= {"max_tokens": None, "num_samples": first.records}
        blocks = load_blocks(self._source, stack.tokenizer, **options)
        if self._first is None:
            self._first = (own, blocks)
        return blocks


@dataclass(frozen=True)
class MeasuredModel:
    """A model's profile, and what its configuration says.

    Attributes:
        profile: Over the corpus that all models are compared on.
        sizes: Of the model.
    """

    profile: SaturationProfile
    sizes: Sizes

    @cached_property
    def record(self) -> dict[str, Any]:
        """The profile's record."""
        plain: dict[str, Any] = to_plain(self.profile.record())
        return plain

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.profile.provenance["model"].get("name", "model"))


@dataclass(frozen=True)
class UnmeasuredModel:
    """A model of which only the configuration is known.

    Attributes:
        configuration: Its configuration.
        sizes: What follows of it.
    """

    configuration: Configuration
    sizes: Sizes

    @property
    def name(self) -> str:
        """The model's name."""
        return self.configuration.name


def measure_model(
    stack: DecoderStack, blocks: TokenBlocks, *, batch_size: int = 32, progress: Any = None
) -> MeasuredModel:
    """Measure one of the models to compare; the model itself is not kept.

    Args:
        stack: The model.
        blocks: The corpus, read with the model's own tokenizer.
        batch_size: Sequences per forward pass.
        progress: Called with the number of tokens done since the last call.

    Raises:
        CorpusError: Sequences beyond the model's positions, or tokens beyond its vocabulary.
        ModelError: A layer's output is NaN (names the layer).
    """
    sizes = sizes_of(stack.model.config, int(blocks.ids.shape[1]))
    profile = analyze(stack, blocks, batch_size=batch_size, progress=progress)
    return MeasuredModel(profile, sizes)


def describe_model(source: str, seq_len: int) -> UnmeasuredModel:
    """Describe a model by its configuration.

    Args:
        source: Whatever `cascade.load` takes; a folder needs no more than its config.json.
        seq_len: Tokens per sequence that operations are counted for.

    Raises:
        ModelError: There is no configuration, or it cannot be read.
        UnsupportedModelError: It describes no model that could be measured.
    """
    configuration = read_configuration(source)
    return UnmeasuredModel(configuration, sizes_of(configuration.config, seq_len))


def compare_models(
    models: Iterable[MeasuredModel | UnmeasuredModel], *, command: str | None = None
) -> dict[str, Any]:
    """Compare models over relative depth, each with the first that was measured.

    Args:
        models: From `measure_model` and `describe_model`. An iterator lets each model go before
            the next is loaded.
        command: What the user ran, for the provenance.

    Returns:
        The record, of kind "model-comparison".

    Raises:
        UsageError: Fewer than two models.
    """
    found = list(models)
    if len(found) < 2:
        raise UsageError(f"expected at least two models, got {len(found)}; name another one")
    labels = [chr(ord("A") + number) for number in range(len(found))]
    measured = {
        label: model
        for label, model in zip(labels, found, strict=True)
        if isinstance(model, MeasuredModel)
    }
    entries = [_entry(label, model) for label, model in zip(labels, found, strict=True)]
    return {
        "schema": 1,
        "kind": "model-comparison",
        "provenance": _provenance(entries, command),
        "rules": RULES,
        "models": entries,
        "pairs": list(_pairs(measured)),
        "by_depth": _by_depth(entries, dict(zip(labels, found, strict=True))),
    }


def _provenance(compared: Sequence[dict[str, Any]], command: str | None) -> dict[str, Any]:
    """Return what all models share; each one has its own model and corpus besides."""
    import torch

    origins = (each["provenance"] for each in compared if each["provenance"] is not None)
    first = next(origins, None)
    return {
        "machine": first["machine"] if first else machine_of(torch.device("cpu")),
        "versions": library_versions(),
        "command": command,
    }


def _entry(label: str, model: MeasuredModel | UnmeasuredModel) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "label": label,
        "name": model.name,
        "measured": isinstance(model, MeasuredModel),
        "sizes": model.sizes.record(),
    }
    if isinstance(model, UnmeasuredModel):
        nothing = dict.fromkeys(("provenance", "layers", "structure", "exit"))
        return entry | {"configuration": model.configuration.origin} | nothing
    record = model.record
    num_layers = model.sizes.num_layers
    layer = record["thresholds"]["exit_layer"]
    return entry | {
        "configuration": "the model's own",
        "provenance": {
            name: record["provenance"][name]
            for name in ("model", "tokenizer_hash", "corpus", "machine")
        },
        "layers": [row | {"depth": _depth(row["layer"], num_layers)} for row in record["layers"]],
        "structure": record["structure"],
        "exit": {
            "layer": layer,
            "depth": _depth(layer, num_layers),
            "spared": round(model.sizes.spared(int(layer)), 6),
            "by_hard_ratio": record["thresholds"]["by_hard_ratio"],
        },
    }


def _depth(label: str, num_layers: int) -> float | None:
    """Return a layer's relative depth; None for the state behind the final norm."""
    return round(int(label) / num_layers, 6) if label.isdigit() else None


# --- Each model with the first ---------------------------------------------------------------


def _pairs(measured: dict[str, MeasuredModel]) -> Iterator[dict[str, Any]]:
    """Yield the comparison of every other measured model with the first one."""
    if not measured:
        return
    (first_label, first), *others = measured.items()
    for label, other in others:
        reason = _unpaired(first, other)
        same_depth = first.sizes.num_layers == other.sizes.num_layers
        yield {
            "model": label,
            "against": first_label,
            "same_tokenizer": _same_tokenizer(first, other),
            "dips": _matched_dips(first, other),
            "apart": _apart(first, other),
            "unpaired": reason,
            "paired": _paired(first, other) if reason is None else None,
            "thresholds": _transferred(first, other) if same_depth else None,
        }


def _same_tokenizer(first: MeasuredModel, other: MeasuredModel) -> bool:
    hashes = [model.profile.provenance["tokenizer_hash"] for model in (first, other)]
    return hashes[0] == hashes[1] and hashes[0] is not None


def match_dips(
    first: Sequence[int], first_layers: int, second: Sequence[int], second_layers: int
) -> list[tuple[int, int]]:
    """Match the dips of two models by relative depth, one to one, nearest pairs first.

    Args:
        first: The first model's dips, layers in 1..first_layers.
        first_layers: Its number of decoder layers.
        second: The second model's dips.
        second_layers: Its number of decoder layers.

    Returns:
        Pairs (first, second), in the order of the first. No pair is further apart than 0.05 of
        depth or one layer of the shallower model, whichever is more, and no two dips that are
        left over are that near to each other.
    """
    most = max(TOLERANCE, Fraction(1, min(first_layers, second_layers)))
    near = []
    for one in first:
        for other in second:
            depths = Fraction(one, first_layers), Fraction(other, second_layers)
            distance = abs(depths[0] - depths[1])
            if distance <= most:
                # Whichever model comes first: the same pairs.
                near.append((distance, min(depths), max(depths), one, other))
    matched: dict[int, int] = {}
    for *_, one, other in sorted(near):
        if one not in matched and other not in matched.values():
            matched[one] = other
    return sorted(matched.items())


def _matched_dips(first: MeasuredModel, other: MeasuredModel) -> dict[str, Any]:
    records = [model.record for model in (first, other)]
    depths = [model.sizes.num_layers for model in (first, other)]
    means = [{row["layer"]: row["mean"] for row in record["layers"]} for record in records]
    dips = [[int(layer) for layer in record["structure"]["dips"]] for record in records]
    matched = match_dips(dips[0], depths[0], dips[1], depths[1])
    return {
        # Without a cutoff there was no telling what a dip is.
        "judged": all(record["structure"]["cutoff"] is not None for record in records),
        "tolerance": round(float(max(TOLERANCE, Fraction(1, min(depths)))), 6),
        "matched": [
            {
                "layers": [str(layer) for layer in pair],
                "depths": [_depth(str(pair[side]), depths[side]) for side in (0, 1)],
                "means": [means[side][str(pair[side])] for side in (0, 1)],
            }
            for pair in matched
        ],
        "unmatched": [
            [str(dip) for dip in dips[side] if dip not in {pair[side] for pair in matched}]
            for side in (0, 1)
        ],
    }


def _apart(first: MeasuredModel, other: MeasuredModel) -> dict[str, float]:
    """Return how far two profiles lie apart, in degrees, over the shallower one's depths."""
    shallow, deep = sorted((first, other), key=lambda model: model.sizes.num_layers)
    depths, angles = _angles(shallow)
    difference = np.abs(np.interp(depths, *_angles(deep)) - angles)
    most = int(np.argmax(difference))
    return {
        "degrees": round(float(np.sqrt(np.mean(difference**2))), 4),
        "most_degrees": round(float(difference[most]), 4),
        "most_depth": round(float(depths[most]), 6),
    }


def _angles(model: MeasuredModel) -> tuple[Array, Array]:
    """Return relative depths and the angles of mean similarities, `[N]` each, in degrees."""
    depth = model.sizes.num_layers
    means = np.clip(model.profile.statistics.mean()[:depth], -1, 1)
    return np.arange(1, depth + 1) / depth, np.degrees(np.arccos(means))


def _unpaired(first: MeasuredModel, other: MeasuredModel) -> str | None:
    """Say why two models cannot be compared sequence by sequence, None where they can."""
    if not _same_tokenizer(first, other):
        return "their tokenizers differ: tokens are not the same"
    if not np.array_equal(first.profile.sequence_fingerprints, other.profile.sequence_fingerprints):
        return "they read other sequences"
    if first.profile.statistics.layers != other.profile.statistics.layers:
        counts = [model.sizes.num_layers for model in (first, other)]
        if counts[0] != counts[1]:
            return f"their layers differ in number, {counts[0]} and {counts[1]}"
        return "only one of them has a final norm"
    return None


def _paired(first: MeasuredModel, other: MeasuredModel) -> dict[str, Any]:
    """Return what moved between two models over the same tokens, layer by layer."""
    arrays = [model.profile.statistics.arrays() for model in (first, other)]
    moved = arrays[1]["sequence_mean"] - arrays[0]["sequence_mean"]
    sequences = len(moved)
    rows: list[dict[str, Any]] = []
    for row, label in enumerate(first.profile.statistics.layers):
        values = moved[:, row]
        most = int(np.argmax(np.abs(values)))
        rows.append(
            {
                "layer": label,
                "mean": _digits(float(values.mean())),
                "interval": _interval(values),
                "mean_size": _digits(float(np.abs(values).mean())),
                "largest": _digits(float(values[most])),
                "sequence": most + 1,
            }
        )
    # The final norm magnifies what the layers did: it is no layer, and would always be the answer.
    decoder = rows[: first.sizes.num_layers]
    largest = max(decoder, key=lambda entry: float(entry["mean_size"]))
    return {"sequences": sequences, "layers": rows, "largest_mover": largest["layer"]}


def _interval(values: Array) -> list[float] | None:
    if len(values) < 2:
        return None
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    reach = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)) * error
    mean = float(values.mean())
    return [_digits(mean - reach), _digits(mean + reach)]


def _digits(value: float) -> float:
    """Round to six significant digits: differences can be as small as arithmetic itself."""
    return float(f"{value:.6g}")


def _transferred(first: MeasuredModel, other: MeasuredModel) -> list[dict[str, Any]]:
    """Return the hard ratios that the first model's thresholds reach in the other."""
    thresholds = first.record["thresholds"]
    row = other.profile.statistics.layers.index(thresholds["exit_layer"])
    return [
        {
            "layer": thresholds["exit_layer"],
            "hard_ratio": entry["hard_ratio"],
            "threshold": entry["threshold"],
            "reached": round(
                float(other.profile.statistics.share_below(entry["threshold"])[row]), 6
            ),
        }
        for entry in thresholds["by_hard_ratio"]
    ]


# --- Layers by depth alone -------------------------------------------------------------------


def _by_depth(
    entries: Sequence[dict[str, Any]],
    models: dict[str, MeasuredModel | UnmeasuredModel],
) -> list[dict[str, Any]]:
    """Return which layers of unmeasured models lie where measured ones suggest to exit.

    Where no model was measured, the depths are `REFERENCE_DEPTHS`.
    """
    unmeasured = [entry for entry in entries if not entry["measured"]]
    found: dict[Fraction, list[str]] = {}
    for entry in entries:
        if entry["measured"]:
            depth = Fraction(int(entry["exit"]["layer"]), entry["sizes"]["num_layers"])
            found.setdefault(depth, []).append(entry["label"])
    depths = found or {depth: [] for depth in REFERENCE_DEPTHS}
    return [
        {
            "depth": round(float(depth), 6),
            "from": labels,
            "layers": [
                {
                    "model": entry["label"],
                    "layer": layer,
                    "spared": round(models[entry["label"]].sizes.spared(layer), 6),
                }
                for entry in unmeasured
                for layer in [layer_at(depth, entry["sizes"]["num_layers"])]
            ],
        }
        for depth, labels in sorted(depths.items())
        if unmeasured
    ]

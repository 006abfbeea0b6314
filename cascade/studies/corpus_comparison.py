"""Corpora side by side: which layers move from one to another, and whether thresholds transfer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import CorpusError, UsageError
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.models.stack import DecoderStack
from cascade.saturation.layer_roles import find_structure, suggested_exit_layer
from cascade.saturation.profile import HARD_RATIOS, SaturationProfile, analyze
from cascade.stats.resampling import (
    Place,
    half_widths,
    placed,
    resampled_means,
    simultaneous_half_widths,
    times_more,
)
from cascade.stats.thresholds import FittedThreshold, fit_threshold, transfer

KIND = "corpus-comparison"


#: What corpora are called: a name can be as long as a path, a letter fits above a column.
LABELS = "ABCDEFGH"


#: The smallest difference of a layer's mean similarity that matters: the published table of
#: SmolLM2-135M and ours, of other weights on other text of the same kind, differ by up to 0.009.
MARGIN = 0.01


#: How far the realized hard ratio may lie from the wanted one where a threshold transfers.
TOLERANCE = 0.05


#: Of every interval; those of the differences hold at once for all layers of a corpus.
CONFIDENCE = 0.95


_MOVED: dict[Place, str] = {"within": "stays", "beyond": "moves", "straddles": "cannot tell"}


_TRANSFERRED: dict[Place, str] = {
    "within": "transfers",
    "beyond": "does not",
    "straddles": "cannot tell",
}


_ROLES = ("input_transform", "dips", "output_transform")


#: A layer is surely special where it is in this share of the resamples, surely not where it is in
#: at most the rest.
_SURE = 0.95


@dataclass(frozen=True)
class Question:
    """What is asked of the corpora.

    Attributes:
        layer: The exit layer whose thresholds are tried, from 1; where None, the one that the
            first corpus's structure suggests.
        hard_ratios: The shares of hard tokens that thresholds are fitted to, in (0, 1).
        margin: The smallest difference of a layer's mean similarity that matters.
        tolerance: How far the realized hard ratio may lie from the wanted one.
        seed: Of the resampling.
    """

    layer: int | None = None
    hard_ratios: tuple[float, ...] = HARD_RATIOS
    margin: float = MARGIN
    tolerance: float = TOLERANCE
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be asked.

        Raises:
            UsageError: A number is out of its range.
        """
        if self.layer is not None and self.layer < 1:
            raise UsageError(f"expected --layer of at least 1, got {self.layer}")
        if not self.hard_ratios:
            raise UsageError("expected at least one hard ratio, got none; 0.5 is the usual one")
        for ratio in self.hard_ratios:
            if not 0 < ratio < 1:
                raise UsageError(
                    f"expected a --hard-ratio between 0 and 1, got {ratio:g}; 0.7 sends 70 % on"
                )
        if not 0 < self.margin < 2:
            raise UsageError(
                f"expected a --margin between 0 and 2, got {self.margin:g}; it is a difference of "
                "mean similarities"
            )
        if not 0 < self.tolerance < 1:
            raise UsageError(
                f"expected a --tolerance between 0 and 1, got {self.tolerance:g}; it is a share of "
                "tokens"
            )
        if self.seed < 0:
            raise UsageError(f"expected a --seed of 0 or more, got {self.seed}")


def compare_corpora(
    stack: DecoderStack,
    corpora: Sequence[TokenBlocks],
    question: Question | None = None,
    *,
    batch_size: int = 32,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure several corpora and say in what the model differs between them.

    One pass over each. Means have intervals that resample whole sequences; the differences to the
    first corpus have simultaneous ones over all layers, and are held against a margin. Thresholds
    of the exit layer are fitted on each corpus and applied to each other one.

    Besides one batch, the exit layer's similarities are held in memory (4 bytes per token); of the
    first corpus all layers' are until its structure has named the exit layer, where none is given.

    Args:
        stack: The model.
        corpora: Two or more, each of two sequences or more; differences are to the first.
        question: What is asked; the defaults where not given.
        batch_size: Sequences per forward pass.
        command: What the user ran, for the provenance.
        progress: Called with the number of tokens done since the last call.

    Returns:
        A record of kind `corpus-comparison`.

    Raises:
        UsageError: Fewer than two corpora, more than there are labels for, or a question that
            cannot be asked.
        CorpusError: A corpus is too small, too long for the model, or the same as another.
        ModelError: A state is not finite.
    """
    question = question or Question()
    check_corpora(stack, corpora, question, batch_size)
    layer = question.layer
    measured = []
    for blocks in corpora:
        found = _measure(stack, blocks, layer, batch_size, command, progress)
        layer = found.layer
        measured.append(found)
    assert layer is not None  # the first corpus has named it
    draws = [
        found.resampled(np.random.default_rng([question.seed, number]))
        for number, found in enumerate(measured)
    ]
    provenance = {
        name: value
        for name, value in to_plain(measured[0].profile.provenance).items()
        if name != "corpus"
    }
    labels = stack.layer_labels
    about = [
        found.about(label, draw, labels)
        for label, found, draw in zip(LABELS, measured, draws, strict=False)
    ]
    return {
        "schema": 1,
        "kind": KIND,
        "provenance": provenance
        | {"corpora": dict(zip(LABELS, (b.provenance() for b in corpora), strict=False))},
        "settings": asdict(question)
        | {
            "layer": layer,
            "layer_suggested": question.layer is None,
            "hard_ratios": list(dict.fromkeys(question.hard_ratios)),
            "confidence": CONFIDENCE,
        },
        "corpora": about,
        "shared": _shared(corpora),
        "layers": _layer_rows(labels, measured, draws),
        "differences": _differences(labels, measured, draws, question.margin),
        "special": _special_layers(about, labels),
        "thresholds": _thresholds(measured, question),
    }


def check_corpora(
    stack: DecoderStack,
    corpora: Sequence[TokenBlocks],
    question: Question,
    batch_size: int,
) -> None:
    """Refuse what `compare_corpora` would, before anything is measured.

    Args:
        stack: The model.
        corpora: What would be compared.
        question: What would be asked.
        batch_size: Sequences per forward pass.

    Raises:
        UsageError: See `compare_corpora`.
        CorpusError: See `compare_corpora`.
        ModelError: Tokens beyond the model's vocabulary.
    """
    question.check()
    check_number(len(corpora))
    if question.layer is not None and question.layer > stack.num_layers:
        raise UsageError(f"expected --layer in 1..{stack.num_layers}, got {question.layer}")
    seen: dict[str, str] = {}
    for blocks in corpora:
        check_blocks(stack, blocks, batch_size)
        if len(blocks.ids) < 2:
            raise CorpusError(
                f"expected at least 2 sequences of {blocks.name}, got {len(blocks.ids)}: tokens of "
                "one are correlated and give no interval; take a larger corpus, a larger "
                "--max-tokens or a smaller --seq-len"
            )
        fingerprint = blocks.fingerprint()
        if fingerprint in seen:
            raise CorpusError(
                f"expected different corpora, got the same tokens twice, of {seen[fingerprint]} "
                f"and of {blocks.source}; leave one out"
            )
        seen[fingerprint] = blocks.source


def check_number(corpora: int) -> None:
    """Refuse a number of corpora that cannot be compared.

    Raises:
        UsageError: Fewer than two, or more than there are labels for.
    """
    if corpora < 2:
        raise UsageError(f"expected at least 2 corpora to compare, got {corpora}; name another")
    if corpora > len(LABELS):
        raise UsageError(
            f"expected at most {len(LABELS)} corpora, got {corpora}; compare the others in another "
            "run, with the same first one"
        )


# --- Measuring -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """One corpus, measured.

    Attributes:
        profile: Its statistics.
        layer: The exit layer.
        confidence: `[S, T]`, the similarities of the exit layer.
    """

    profile: SaturationProfile
    layer: int
    confidence: Array

    @cached_property
    def rows(self) -> Array:
        """Each sequence's mean of every layer, `[S, L]`."""
        return np.asarray(self.profile.arrays()["sequence_mean"])

    @cached_property
    def means(self) -> Array:
        """Every layer's mean, `[L]`."""
        return np.asarray(self.rows.mean(axis=0))

    def resampled(self, generator: np.random.Generator) -> Array:
        return resampled_means(self.rows, generator)

    def about(self, label: str, draws: Array, labels: Sequence[str]) -> dict[str, Any]:
        """Return what the record says of the corpus: its structure, and how sure that is."""
        structure = find_structure(labels, [float(mean) for mean in self.means])
        shares = _special_shares(labels, draws)
        roles = _roles(structure)
        provenance = to_plain(self.profile.provenance)
        corpus, num_layers = provenance["corpus"], provenance["model"]["num_layers"]
        return {
            "label": label,
            "name": corpus["name"],
            "tokens": corpus["tokens"],
            "sequences": corpus["sequences"],
            "seq_len": corpus["seq_len"],
            "spread": corpus.get("spread"),
            "structure": structure,
            "suggested_exit_layer": suggested_exit_layer(structure, num_layers),
            "special": [
                {"layer": name, "role": roles.get(name), "share_of_resamples": shares[name]}
                for name in labels
                if name in roles or shares[name] > 0
            ],
        }


def _measure(
    stack: DecoderStack,
    blocks: TokenBlocks,
    layer: int | None,
    batch_size: int,
    command: str | None,
    progress: Callable[[int], None] | None,
) -> _Measured:
    """Measure a corpus in one pass, and keep the exit layer's similarities of every token."""
    kept: list[Array] = []

    def keep(values: Array, _: Array) -> None:
        # A copy: a view would hold the batch's similarities of every layer.
        kept.append(values.copy() if layer is None else values[layer - 1].copy())

    profile = analyze(
        stack, blocks, batch_size=batch_size, command=command, progress=progress, sink=keep
    )
    if layer is not None:
        return _Measured(profile, layer, np.concatenate(kept))
    layer = int(profile.record()["thresholds"]["exit_layer"])
    return _Measured(profile, layer, np.concatenate([values[layer - 1] for values in kept]))


def _roles(structure: dict[str, Any]) -> dict[str, str]:
    """Return the role of every special layer, as the structure names it."""
    return {layer: role for role in _ROLES for layer in structure[role]}


def _special_shares(labels: Sequence[str], draws: Array) -> dict[str, float]:
    """Return in what share of the resamples each layer is special, whatever its role."""
    counts = dict.fromkeys(labels, 0)
    for means in draws:
        for layer in _roles(find_structure(labels, means.tolist())):
            counts[layer] += 1
    return {layer: count / len(draws) for layer, count in counts.items()}


def _shared(corpora: Sequence[TokenBlocks]) -> list[dict[str, Any]]:
    """Return which corpora have sequences in common, and how many: they are not independent."""
    prints = [set(blocks.sequence_fingerprints().tolist()) for blocks in corpora]
    pairs = [(a, b) for b in range(len(corpora)) for a in range(b)]
    return [
        {"corpora": [LABELS[a], LABELS[b]], "sequences": len(prints[a] & prints[b])}
        for a, b in pairs
        if prints[a] & prints[b]
    ]


# --- Which layers move -----------------------------------------------------------------------


def _around(center: float, half: float) -> list[float]:
    return [float(center - half), float(center + half)]


def _layer_rows(
    labels: Sequence[str], measured: Sequence[_Measured], draws: Sequence[Array]
) -> list[dict[str, Any]]:
    """Return every layer's mean in every corpus, each with an interval of its own."""
    halves = [
        half_widths(draw, found.means, CONFIDENCE)
        for found, draw in zip(measured, draws, strict=True)
    ]
    return [
        {
            "layer": layer,
            "means": [
                {
                    "mean": float(found.means[row]),
                    "interval": _around(found.means[row], half[row]),
                }
                for found, half in zip(measured, halves, strict=True)
            ],
        }
        for row, layer in enumerate(labels)
    ]


def _differences(
    labels: Sequence[str], measured: Sequence[_Measured], draws: Sequence[Array], margin: float
) -> list[dict[str, Any]]:
    """Return how far each other corpus's layers lie from the first one's."""
    found = []
    for number in range(1, len(measured)):
        tokens = max(measured[0].confidence.size, measured[number].confidence.size)
        difference = measured[number].means - measured[0].means
        halves = simultaneous_half_widths(draws[number] - draws[0], difference, CONFIDENCE)
        rows = [
            {"layer": layer} | _moved(float(by), float(half), margin, tokens)
            for layer, by, half in zip(labels, difference, halves, strict=True)
        ]
        by_size = sorted(rows, key=lambda row: -abs(row["difference"]))
        found.append(
            {
                "corpus": LABELS[number],
                "against": LABELS[0],
                "rows": rows,
                # By verdict, the layer that moved farthest first.
                "layers": {
                    verdict: [row["layer"] for row in by_size if row["verdict"] == verdict]
                    for verdict in _MOVED.values()
                },
            }
        )
    return found


def _moved(by: float, half: float, margin: float, tokens: int) -> dict[str, Any]:
    """Return how far a layer's mean differs, and whether that is beyond the margin."""
    place = placed((by - half, by + half), margin)
    times = times_more(by, half, margin) if place == "straddles" else None
    return {
        "difference": by,
        "interval": _around(by, half),
        "verdict": _MOVED[place],
        "tokens_needed": None if times is None else math.ceil(times * tokens),
    }


def _special_layers(about: Sequence[dict[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """Return whether all corpora have the same special layers, and which are not in all of them.

    Where a layer is special in one corpus and not in another it is sure only if the resamples of
    every corpus say so, too.
    """
    differ = []
    for layer in labels:
        rows = {
            corpus["label"]: row
            for corpus in about
            for row in corpus["special"]
            if row["layer"] == layer
        }
        special = [label for label, row in rows.items() if row["role"] is not None]
        if not special or len(special) == len(about):
            continue
        shares = {
            corpus["label"]: rows[corpus["label"]]["share_of_resamples"]
            if corpus["label"] in rows
            else 0.0
            for corpus in about
        }
        sure = all(
            share >= _SURE if label in special else share <= 1 - _SURE
            for label, share in shares.items()
        )
        differ.append({"layer": layer, "special_in": special, "shares": shares, "sure": sure})
    roles = [_roles(corpus["structure"]) for corpus in about]
    return {"same": all(found == roles[0] for found in roles), "differ": differ}


# --- Whether thresholds transfer -------------------------------------------------------------


def _thresholds(measured: Sequence[_Measured], question: Question) -> dict[str, Any]:
    """Fit every threshold on every corpus, and apply it to every other one."""
    ratios = list(dict.fromkeys(question.hard_ratios))
    fitted = [
        {ratio: fit_threshold(found.confidence, ratio, seed=question.seed) for ratio in ratios}
        for found in measured
    ]
    rows = [
        {"from": LABELS[a], "to": LABELS[b]}
        | _transferred(fitted[a][ratio], measured[b].confidence, question)
        for a, b in permutations(range(len(measured)), 2)
        for ratio in ratios
    ]
    return {
        "fitted": [
            {"corpus": label} | asdict(row)
            for label, rows_of in zip(LABELS, fitted, strict=False)
            for row in rows_of.values()
        ],
        "rows": rows,
        "counts": {
            verdict: sum(row["verdict"] == verdict for row in rows)
            for verdict in _TRANSFERRED.values()
        },
    }


def _transferred(fitted: FittedThreshold, onto: Array, question: Question) -> dict[str, Any]:
    """Return what a threshold does on another corpus, and whether that is what was wanted."""
    there = transfer(fitted.threshold, onto, seed=question.seed)
    low, high = (end - fitted.hard_ratio for end in there.hard_ratio_interval)
    place, off = placed((low, high), question.tolerance), there.hard_ratio - fitted.hard_ratio
    times = None
    if place == "straddles":
        times = times_more(off, max(off - low, high - off), question.tolerance)
    return {
        "hard_ratio": fitted.hard_ratio,
        "threshold": fitted.threshold,
        "realized": there.hard_ratio,
        "interval": list(there.hard_ratio_interval),
        "off": off,
        "off_interval": [low, high],
        "verdict": _TRANSFERRED[place],
        "tokens_needed": None if times is None else math.ceil(times * onto.size),
    }

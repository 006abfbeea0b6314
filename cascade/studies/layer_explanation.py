"""Explanation: why a layer turns the stream more than its neighbour, and what that is worth."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cascade.core.arrays import Array
from cascade.core.errors import CorpusError, UsageError
from cascade.core.provenance import provenance_of
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.corpora.token_classes import CLASSES, classify, token_texts
from cascade.models.stack import DecoderStack
from cascade.models.sublayers import Parts, Update, find_parts, split
from cascade.saturation.layer_roles import find_structure
from cascade.saturation.profile import similarities
from cascade.stats.perplexity import perplexity, perplexity_ratio_interval
from cascade.stats.resampling import draws, interval, ratio_interval
from cascade.studies.ablations import ABLATIONS, nats, outputs
from cascade.studies.causes import (
    ALIKE,
    MOST_DIMENSIONS,
    REMOVALS,
    Measured,
    Pilot,
    angles_alike,
    angles_without,
    measure,
)
from cascade.studies.residual_stream import StreamStatistics, attention_weights

KIND = "explanation"


#: A cause carries where taking it away closes more than this share of the gap to the neighbour.
CARRIES = 0.5


#: A smaller gap, in degrees, is none that asks for a cause.
LEAST_GAP = 1.0


#: Sequences on which dimensions and common parts are learned.
_LEAST_PILOT, _MOST_PILOT = 2, 64


_INTERVAL = "95 % percentile bootstrap over whole sequences, 999 resamples"


def explain(
    stack: DecoderStack,
    blocks: TokenBlocks,
    layer: int,
    *,
    contrast: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Say why a layer turns the stream more than a neighbour does, and what its update is worth.

    Every possible cause is taken away, from the layer and from the neighbour alike, and is named
    only where more than half of the gap between their angles goes with it. Dimensions and common
    parts are learned on the first quarter of the sequences and tried on the others.

    Args:
        stack: The model.
        blocks: The corpus, at least 4 sequences.
        layer: 1..N.
        contrast: The neighbour; the nearest layer of a stable band where not given.
        batch_size: Sequences per forward pass.
        seed: Of the intervals.
        command: What the user ran, for the provenance.
        progress: Called with the number of tokens done since the last call.

    Returns:
        A record of kind `explanation`: `layers` and `entries` (the stream over depth), `sides`
        (what is known of the layer and of its neighbour), `gap`, `causes`, `classes`, `positions`,
        `ablations`, `missing` (what could not be had, and why) and `verdict`.

    Raises:
        UsageError: No such layer, or a neighbour that is none.
        CorpusError: Too few or too long sequences, or no tokenizer.
        ModelError: Tokens beyond the model's vocabulary.
        UnsupportedModelError: A layer's update is not the sum of attention and MLP.
    """
    _check_layer(stack, layer, "--layer")
    if contrast is not None:
        _check_layer(stack, contrast, "--contrast")
        if contrast == layer:
            raise UsageError(f"expected a neighbour other than layer {layer} itself, got it")
    if stack.num_layers < 2:
        raise UsageError("the model has a single layer: there is no neighbour to compare it with")
    check_blocks(stack, blocks, batch_size)
    pilot, rest = blocks.pilot(least=_LEAST_PILOT, most=_MOST_PILOT)
    if stack.tokenizer is None:
        raise CorpusError("the model has no tokenizer to tell token classes with; load it with one")
    with torch.no_grad(), _eager(stack) as missing:
        if contrast is None:
            contrast = _neighbour(stack, pilot, layer, batch_size)
        run = _Run(stack, rest, (layer, contrast), batch_size, progress or (lambda _: None))
        run.learn(pilot)
        run.measure()
    return {
        "schema": 1,
        "kind": KIND,
        "provenance": to_plain(provenance_of(stack, blocks, command)),
        "settings": {
            "layer": str(layer),
            "contrast": str(contrast),
            "batch_size": batch_size,
            "seed": seed,
            "carries": CARRIES,
            "least_gap": LEAST_GAP,
            "most_dimensions": MOST_DIMENSIONS,
            "pilot_sequences": len(pilot.ids),
            "sequences": len(rest.ids),
            "interval": _INTERVAL,
        },
        "missing": [*missing, *run.missing()],
    } | _Judge(run, seed).sections()


def _check_layer(stack: DecoderStack, layer: int, name: str) -> None:
    if not 1 <= layer <= stack.num_layers:
        raise UsageError(f"expected {name} in 1..{stack.num_layers}, got {layer}")


@contextlib.contextmanager
def _eager(stack: DecoderStack) -> Iterator[list[str]]:
    """Let the model attend in the way that shows its weights; say where it has none."""
    model: Any = stack.model
    before = model.config._attn_implementation
    missing: list[str] = []
    try:
        if before != "eager":
            model.set_attn_implementation("eager")
    except (ValueError, NotImplementedError) as error:
        missing.append(f"attention weights: the model has no eager attention ({error})")
    try:
        yield missing
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


def _neighbour(stack: DecoderStack, pilot: TokenBlocks, layer: int, batch_size: int) -> int:
    """Return the nearest layer of a stable band, the one before rather than the one behind."""
    ids = torch.from_numpy(pilot.ids[:batch_size].astype(np.int64)).to(stack.device)
    means = similarities(stack, ids).double().mean(dim=(1, 2)).tolist()
    structure = find_structure(stack.layer_labels, means)
    active = {int(label) for key in ("input_transform", "dips") for label in structure[key]} | {
        int(label) for label in structure["output_transform"] if label.isdigit()
    }
    others = [number for number in range(1, stack.num_layers + 1) if number != layer]
    return min(others, key=lambda number: (number in active, abs(number - layer), number > layer))


class _Run:
    """One explanation on its way through the corpus: what is measured of the two layers.

    Args:
        stack: The model, with eager attention.
        blocks: What is measured.
        sides: The layer and its neighbour.
        batch_size: Sequences per forward pass.
        progress: Called with tokens done.
    """

    def __init__(
        self,
        stack: DecoderStack,
        blocks: TokenBlocks,
        sides: tuple[int, int],
        batch_size: int,
        progress: Callable[[int], None],
    ) -> None:
        self.stack, self.blocks, self.sides = stack, blocks, sides
        self.batch_size, self.progress = batch_size, progress
        self.parts: dict[int, Parts] = {
            number: find_parts(stack, number) for number in range(1, stack.num_layers + 1)
        }
        assert stack.tokenizer is not None
        self.classes, self.delimiters = classify(blocks.ids, stack.tokenizer)
        #: First tokens cannot be hidden from themselves.
        self.has_delimiters = bool(self.delimiters[:, 1:].any())
        self.pilots: dict[int, Pilot] = {}
        self.stream = StreamStatistics()
        #: side -> removal -> `[2, S, T]`: degrees and similarities.
        self.angles: dict[int, dict[str, Array]] = {number: {} for number in sides}
        #: side -> ablation -> nats of each sequence.
        self.nats: dict[int, dict[str, list[float]]] = {
            number: defaultdict(list) for number in sides
        }
        #: Those of the model as it is.
        self.full: list[float] = []

    def _batches(self, blocks: TokenBlocks) -> Iterator[tuple[Tensor, Array]]:
        """Yield token ids `[B, T]` and sequence numbers `[B]`."""
        for ids, numbers in blocks.batches(self.batch_size):
            yield torch.from_numpy(ids.astype(np.int64)).to(self.stack.device), numbers
            self.progress(ids.size)

    def learn(self, pilot: TokenBlocks) -> None:
        """Fix dimensions, common parts and sizes on a pilot."""
        updates: dict[int, list[Update]] = defaultdict(list)
        for ids, _ in self._batches(pilot):
            plan = self.stack.plan(ids)
            hidden = plan.embedded
            for layer in range(1, max(self.sides) + 1):
                call = plan.calls[layer - 1]
                if layer in self.sides:
                    hidden, update = split(self.stack, self.parts[layer], layer, hidden, call)
                    updates[layer].append(update)
                else:
                    hidden = self.stack.step(layer, hidden, call)
        self.pilots = {layer: Pilot.of(updates[layer]) for layer in self.sides}

    def measure(self) -> None:
        """Go through the sequences."""
        for ids, numbers in self._batches(self.blocks):
            delimiters = torch.from_numpy(self.delimiters[numbers]).to(ids.device)
            plan = self.stack.plan(ids)
            hidden = plan.embedded
            self.stream.add_entry(0, hidden, ids)
            found = {}
            for layer in range(1, self.stack.num_layers + 1):
                call = plan.calls[layer - 1]
                with attention_weights(self.stack.layers[layer - 1]) as weights:
                    hidden, update = split(self.stack, self.parts[layer], layer, hidden, call)
                self.stream.add_layer(layer, update, next(iter(weights), None), delimiters)
                self.stream.add_entry(layer, hidden, ids)
                if layer in self.sides:
                    hides = delimiters if self.has_delimiters else None
                    found[layer] = measure(
                        self.stack, self.parts[layer], layer, update, call, hides
                    )
            self.full += self._nats(plan, self.stack.num_layers, hidden, ids)
            for layer, measured in found.items():
                self._take_away(layer, measured, numbers)
                of_layer = outputs(
                    self.stack,
                    self.parts[layer],
                    layer,
                    measured,
                    self.pilots[layer],
                    plan.calls[layer - 1],
                )
                for name, output in of_layer:
                    self.nats[layer][name] += self._nats(plan, layer, output, ids)

    def _nats(self, plan: Any, layer: int, hidden: Tensor, ids: Tensor) -> list[float]:
        found: list[float] = nats(self.stack, plan, layer, hidden, ids).tolist()
        return found

    def _take_away(self, layer: int, measured: Measured, numbers: Array) -> None:
        own, of = self.pilots[layer], self.pilots[self.sides[0]]
        angles = angles_without(measured, own, of)
        if layer == self.sides[0]:
            angles |= angles_alike(measured.update, own, self.pilots[self.sides[1]])
        for name, pair in angles.items():
            if name not in self.angles[layer]:
                # Made once: what stays must not lie between what batches allocate and free.
                self.angles[layer][name] = np.empty((2, *self.blocks.ids.shape))
            for kind, values in enumerate(pair):
                self.angles[layer][name][kind, numbers] = values.cpu().numpy()

    def missing(self) -> list[str]:
        """Say what could not be measured."""
        found = []
        layer = self.sides[0]
        if not self.stream.has_weights:
            found.append("attention weights: this family's layers do not return them")
        if "first_token" not in self.angles[layer]:
            found.append(
                "hiding tokens from attention: this family's layers take no mask that could be "
                "changed"
            )
        absent = [name for number, name in enumerate(CLASSES) if not (self.classes == number).any()]
        if absent:
            found.append(f"token classes without a token in this corpus: {', '.join(absent)}")
        return found


@dataclass
class _Gap:
    """The angle by which the layer turns the stream more than its neighbour, per sequence.

    Attributes:
        drawn: Which sequences each resample has, `[R, S]`.
        target: `[S]` mean degrees of the layer.
        contrast: `[S]` of the neighbour.
    """

    drawn: Array
    target: Array
    contrast: Array

    def record(self) -> dict[str, Any]:
        """Return the gap in degrees, with its interval, and whether it asks for a cause."""
        whole = self.target - self.contrast
        between = interval(whole[self.drawn].mean(axis=1))
        value = float(whole.mean())
        return {
            "degrees": value,
            "interval": between,
            "asks_for_a_cause": value >= LEAST_GAP and between[0] > 0,
        }

    def closed(self, target: Array, contrast: Array) -> dict[str, Any]:
        """Return which share of the gap goes with a cause, and whether the cause carries.

        It is what the layer turns less without the cause, over the gap, less what the neighbour
        turns less without it too. A neighbour that turns more without it closes nothing.

        Args:
            target: `[S]` mean degrees of the layer without it.
            contrast: `[S]` of the neighbour without it.
        """
        sides = (target, contrast, self.target, self.contrast)
        whole = self.target - self.contrast
        if whole.mean() <= 0 or (whole[self.drawn].mean(axis=1) <= 0).any():
            return {"closed": None, "interval": None, "verdict": "cannot tell"}
        closed = self._closed(*(side.mean(axis=0) for side in sides))
        resampled = self._closed(*(side[self.drawn].mean(axis=1) for side in sides))
        low, high = interval(resampled)
        verdict = "cannot tell"
        if low > CARRIES:
            verdict = "carries"
        elif high < CARRIES:
            verdict = "does not carry"
        return {"closed": float(closed), "interval": [low, high], "verdict": verdict}

    @staticmethod
    def _closed(target: Array, contrast: Array, whole: Array, other: Array) -> Array:
        found: Array = 1 - (target - np.minimum(contrast, other)) / (whole - other)
        return found


class _Judge:
    """Turns what was measured into the record's sections."""

    def __init__(self, run: _Run, seed: int) -> None:
        self.run, self.seed = run, seed
        self.layer, self.contrast = run.sides
        self.plain = {side: run.angles[side]["nothing"] for side in run.sides}
        self.classes = run.classes
        self.gap = _Gap(
            draws(len(self.classes), seed),
            self.plain[self.layer][0].mean(axis=1),
            self.plain[self.contrast][0].mean(axis=1),
        )

    def sections(self) -> dict[str, Any]:
        gap = self.gap.record()
        causes = [*self._removals(), *self._alike(), *self._left_out()]
        carried = [row["cause"] for row in causes if row.get("verdict") == "carries"]
        return {
            "layers": self.run.stream.layer_rows(),
            "entries": self.run.stream.entry_rows(self._texts()),
            "sides": [self._side(side) for side in self.run.sides],
            "gap": gap,
            "causes": causes,
            "classes": self._subsets(
                (name, self.classes == number) for number, name in enumerate(CLASSES)
            ),
            "positions": self._subsets(self._positions()),
            "ablations": [row for side in self.run.sides for row in self._ablations(side)],
            "verdict": {
                "asks_for_a_cause": gap["asks_for_a_cause"],
                "carried_by": carried if gap["asks_for_a_cause"] else [],
            },
        }

    def _texts(self) -> dict[int, str]:
        ids = self.run.blocks.ids
        assert self.run.stack.tokenizer is not None
        texts = token_texts(ids, self.run.stack.tokenizer)
        return dict(zip(np.unique(ids).tolist(), texts, strict=True))

    def _side(self, side: int) -> dict[str, Any]:
        pilot = self.run.pilots[side]
        return {
            "layer": str(side),
            "degrees": float(self.plain[side][0].mean()),
            "similarity": float(self.plain[side][1].mean()),
            "common_share": pilot.common_share,
            "dimensions": [
                {"dimension": dim, "energy": share}
                for dim, share in zip(pilot.dimensions, pilot.energy, strict=True)
            ],
            "dimensions_for_half": pilot.needed,
            "massive": list(pilot.massive),
            "update_size": pilot.size,
            "stream_size": pilot.stream,
            "update_cosine": pilot.cosine,
        }

    def _row(
        self, cause: str, target: Array | None, contrast: Array | None, *, reason: str = ""
    ) -> dict[str, Any]:
        if target is None or contrast is None:
            return {"cause": cause, "verdict": "not tried", "reason": reason}
        return {
            "cause": cause,
            "degrees": float(target[0].mean()),
            "similarity": float(target[1].mean()),
            "contrast_degrees": float(contrast[0].mean()),
            "contrast_similarity": float(contrast[1].mean()),
        } | self.gap.closed(target[0].mean(axis=1), contrast[0].mean(axis=1))

    def _removals(self) -> Iterator[dict[str, Any]]:
        pilot = self.run.pilots[self.layer]
        reasons = {
            "first_token": "no mask that could be changed",
            "delimiters": "no delimiter to hide, or no mask that could be changed",
            "dimensions": (
                f"half of the update's energy lies in {pilot.needed} dimensions, which are not few"
            ),
            "massive": "no activation is massive before or behind the layer",
        }
        for name in REMOVALS:
            yield self._row(
                name,
                self.run.angles[self.layer].get(name),
                self.run.angles[self.contrast].get(name),
                reason=reasons.get(name, ""),
            )

    def _alike(self) -> Iterator[dict[str, Any]]:
        for name in ALIKE:
            yield self._row(name, self.run.angles[self.layer][name], self.plain[self.contrast])

    def _left_out(self) -> Iterator[dict[str, Any]]:
        """Leave out one class of tokens, or the first positions, in both layers."""
        rows = []
        for number, name in enumerate(CLASSES):
            stays = self.classes != number
            if stays.all() or not stays.any(axis=1).all():
                continue
            target, contrast = (self._without(side, stays) for side in self.run.sides)
            rows.append(self._row("one_class", target, contrast) | {"class": name})
        found = [row for row in rows if row.get("closed") is not None]
        if found:
            yield max(found, key=lambda row: row["closed"])
        else:
            yield self._row("one_class", None, None, reason="all tokens are of one class")
        length = self.classes.shape[1]
        early = max(1, length // 8)
        stays = np.broadcast_to(np.arange(length) >= early, self.classes.shape)
        target, contrast = (self._without(side, stays) for side in self.run.sides)
        yield self._row("first_positions", target, contrast) | {"positions": early}

    def _without(self, side: int, stays: Array) -> Array:
        """Return each sequence's mean over the tokens that stay, `[2, S, 1]`."""
        values = np.where(stays, self.plain[side], 0).sum(axis=2, keepdims=True)
        found: Array = values / stays.sum(axis=1)[None, :, None]
        return found

    def _positions(self) -> Iterator[tuple[str, Array]]:
        """Yield bins of positions that double: 0, 1, 2-3, 4-7, ..."""
        length = self.classes.shape[1]
        place = np.broadcast_to(np.arange(length), self.classes.shape)
        start, stop = 0, 1
        while start < length:
            last = min(stop, length) - 1
            yield (
                (str(start) if last == start else f"{start}-{last}"),
                ((place >= start) & (place <= last)),
            )
            start, stop = stop, 2 * stop

    def _subsets(self, subsets: Any) -> list[dict[str, Any]]:
        """Return the similarity of each subset of the tokens in both layers; none of empty ones."""
        rows = []
        for name, there in subsets:
            if not there.any():
                continue
            counts = there.sum(axis=1).astype(float)
            row: dict[str, Any] = {"name": name, "tokens": int(there.sum())}
            for key, side in (("layer", self.layer), ("contrast", self.contrast)):
                sums = np.where(there, self.plain[side][1], 0).sum(axis=1)
                row[key] = {
                    "similarity": float(sums.sum() / counts.sum()),
                    "interval": ratio_interval(sums, counts, self.seed),
                }
            rows.append(row)
        return rows

    def _ablations(self, side: int) -> Iterator[dict[str, Any]]:
        full = np.array(self.run.full)
        scored = len(full) * (self.classes.shape[1] - 1)
        for name in ABLATIONS:
            if name not in self.run.nats[side]:
                continue
            without = np.array(self.run.nats[side][name])
            more = without - full
            yield {
                "layer": str(side),
                "ablation": name,
                "perplexity": perplexity(without.sum() / scored),
                "full_perplexity": perplexity(full.sum() / scored),
                "perplexity_ratio": perplexity(more.sum() / scored),
                "interval": perplexity_ratio_interval(more, scored, self.seed),
            }

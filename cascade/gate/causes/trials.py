"""Causes that the model itself predicts: it is run again with one change undone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cascade.core.arrays import Array
from cascade.gate.causes.bench import (
    Bench,
    Change,
    outputs_scaled,
    rows_of,
    tensors_set,
    values_set,
    with_attention,
)
from cascade.gate.causes.hypotheses import MOST_LEFT, Evidence, Hypothesis
from cascade.gate.causes.part_differences import ChangedSetting, PartDifferences
from cascade.gate.records import CauseKind
from cascade.models.architecture import text_config_of
from cascade.models.sublayers import last_products
from cascade.saturation.model_parts import as_text, from_text, plain_name, setting_places

#: Epsilons of norms that checkpoints of `transformers` use.
_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)
_EPSILON = re.compile(r"(^|_)eps(ilon)?$")


#: Offsets of positions that are tried. OPT adds 2 to every position.
_SHIFTS = (-1, 1, -2, 2)


#: How many times the scale of an output is improved by the secant method.
_SECANTS = 3


#: What each kind of trial says if it succeeds.
_FOUND = "the model gives the baseline's numbers"


@dataclass(frozen=True)
class Trials:
    """What the trials of one model share.

    Attributes:
        bench: Runs the model.
        evidence: What was measured, of the sequences of the bench.
        plain: `[S, L, 2]`, the rows of the model as it is.
        differences: The parts that differ from the baseline's; None if it recorded none.
    """

    bench: Bench
    evidence: Evidence
    plain: Array
    differences: PartDifferences | None

    def all(self) -> Iterator[Hypothesis]:
        """Yield every cause that was tried, the cheapest first."""
        evidence = self.evidence
        from_the_start = evidence.first == 0
        yield from self._settings()
        yield from self._permuted_layers()
        yield from self._scaled_weight()
        if self.differences is not None and self.differences.weights:
            # A trial undoes code or settings. Weights that differ are the nearer explanation.
            return
        if from_the_start:
            yield from self._epsilons()
            yield from self._rotary()
            yield from self._positions()
        elif evidence.first == evidence.normed:
            yield from self._epsilons()
        else:
            yield from self._swapped_layers()
        if evidence.first != evidence.normed:
            yield from self._kernels()
            yield from self._scaled_outputs()

    def undone(
        self, name: str, cause: CauseKind, layer: str | None, text: str, change: Change
    ) -> Iterator[Hypothesis]:
        """Yield a cause: with `change`, the model should give the baseline's rows."""
        rows = self.bench.rows(change)
        if rows is not None:
            left = self.evidence.distance(rows, self.evidence.expected)
            yield Hypothesis(name, cause, layer, text, left)

    # --- Settings ----------------------------------------------------------------------------

    def _settings(self) -> Iterator[Hypothesis]:
        """Yield each setting that differs from the baseline's, set to the baseline's value."""
        if self.differences is None:
            return
        groups: dict[str, list[ChangedSetting]] = {}
        for setting in self.differences.settings:
            groups.setdefault(setting.attribute, []).append(setting)
        for attribute, settings in groups.items():
            changes = [change for setting in settings for change in self._changes_back(setting)]
            if not changes:
                continue
            old, new = settings[0].pair
            text = (
                f"the setting {settings[0].name} is {new}, and the baseline was measured with "
                f"{old}; with {old}, {_FOUND}"
            )
            yield from self.undone(
                f"setting {attribute}", "model", self._first(), text, values_set(*changes)
            )

    def _changes_back(self, setting: ChangedSetting) -> list[tuple[Any, str, object]]:
        """Return owner, attribute and the baseline's value of each place of a setting."""
        places = setting_places(self.bench.stack, setting.name)
        values = setting.old * len(places) if len(setting.old) == 1 else setting.old
        if len(values) != len(places):
            return []
        return [
            (owner, key, from_text(value))
            for (owner, key), value in zip(places, values, strict=True)
        ]

    def _first(self) -> str:
        return self.evidence.layers[self.evidence.first]

    def _epsilons(self) -> Iterator[Hypothesis]:
        """Yield usual epsilons of the norms; a baseline may not have recorded its own."""
        if self.differences is not None:
            return
        places = [
            (module, key)
            for module in self.bench.stack.model.modules()
            for key, value in vars(module).items()
            if isinstance(value, float) and _EPSILON.search(key)
        ]
        present = {as_text(getattr(*place)) for place in places}
        config = text_config_of(self.bench.stack.model.config)
        usual = [value for key, value in vars(config).items() if _EPSILON.search(key)]
        for value in dict.fromkeys(
            [*filter(lambda each: isinstance(each, float), usual), *_EPSILONS]
        ):
            if not places or present == {as_text(value)}:
                continue
            now = ", ".join(sorted(present))
            text = f"the norms' epsilon is {now}; with {value:g}, {_FOUND}"
            change = values_set(*((*place, value) for place in places))
            yield from self.undone(f"setting {places[0][1]}", "model", self._first(), text, change)

    # --- Positions ---------------------------------------------------------------------------

    def _rotary(self) -> Iterator[Hypothesis]:
        """Yield the rotary frequencies that the config gives."""
        modules = [
            module
            for module in self.bench.stack.model.modules()
            if isinstance(getattr(module, "inv_freq", None), Tensor)
        ]
        if len(modules) != 1:
            return
        now: Tensor = modules[0].inv_freq  # type: ignore[assignment]  # a buffer
        for what, values in self._frequencies(modules[0], now):
            if values.shape != now.shape or torch.allclose(values, now, rtol=1e-6):
                continue
            text = f"the rotary frequencies are not those of {what}; with those, {_FOUND}"
            change = tensors_set((now, lambda values=values: values))  # type: ignore[misc]
            yield from self.undone("rotary frequencies", "model", self._first(), text, change)

    def _frequencies(self, module: nn.Module, now: Tensor) -> Iterator[tuple[str, Tensor]]:
        original = getattr(module, "original_inv_freq", None)
        if isinstance(original, Tensor):
            yield "the config", original.to(now.device)
        width = 2 * len(now)
        for setting in [] if self.differences is None else self.differences.settings:
            if setting.attribute == "rope_theta":
                steps = torch.arange(0, width, 2, dtype=torch.float32, device=now.device) / width
                yield f"base {setting.pair[0]}", 1.0 / float(setting.pair[0]) ** steps

    def _positions(self) -> Iterator[Hypothesis]:
        """Yield shifted positions, until one of them moves nothing at all."""
        for shift in _SHIFTS if may_shift(self.bench) else ():
            by = f"{abs(shift)} too {'high' if shift < 0 else 'low'}"
            text = f"the positions are {by}; shifted back, {_FOUND}"
            rows = self.bench.rows(shift=shift)
            if rows is None and shift < 0:
                # A table has no position before the first; a rolled one has it at its end.
                rows = self.bench.rows(self._wrapped(), shift=shift)
            if rows is None:
                continue
            if self.evidence.distance(rows, self.plain) <= MOST_LEFT:
                return
            left = self.evidence.distance(rows, self.evidence.expected)
            yield Hypothesis("positions shifted", "model", self._first(), text, left)

    def _wrapped(self) -> Change:
        tables = learned_positions(self.bench)
        changes = []
        for table in tables:
            count, forward = table.num_embeddings, table.forward
            changes.append((table, "forward", lambda ids, f=forward, n=count: f(ids % n)))
        return values_set(*changes)

    # --- Layers ------------------------------------------------------------------------------

    def _permuted_layers(self) -> Iterator[Hypothesis]:
        """Yield the order of layers in which each has the weights that it had in the baseline."""
        order = None if self.differences is None else self._order(self.differences)
        if order is None:
            return
        layers = self.bench.stack.layers
        changes = [
            (mine, lambda other=other: other)
            for here, there in order.items()
            for mine, other in zip(
                layers[there - 1].parameters(), layers[here - 1].parameters(), strict=True
            )
        ]
        moves = ", ".join(f"layer {here} has those of {there}" for here, there in order.items())
        text = f"layers have the baseline's weights of others: {moves}; put back, {_FOUND}"
        layer = str(min(order))
        yield from self.undone("layers swapped", "layer", layer, text, tensors_set(*changes))

    def _order(self, differences: PartDifferences) -> dict[int, int] | None:
        """Return for each changed layer the layer whose weights it has; None if they are new."""
        weights = differences.weights
        if not weights or any(None in (one.layer, one.old, one.new) for one in weights):
            return None
        old: dict[int, dict[str, str]] = {}
        new: dict[int, dict[str, str]] = {}
        for one in weights:
            assert one.layer is not None
            assert one.old is not None
            assert one.new is not None
            old.setdefault(one.layer, {})[one.kind] = one.old.digest
            new.setdefault(one.layer, {})[one.kind] = one.new.digest
        order = {}
        for layer, digests in new.items():
            match = [other for other, found in old.items() if found == digests]
            if not match:
                return None
            order[layer] = match[0]
        return order if sorted(order.values()) == sorted(order) else None

    def _swapped_layers(self) -> Iterator[Hypothesis]:
        """Yield the first layer that moved, swapped with the next."""
        number, layers = self.evidence.first, self.bench.stack.layers
        if self.differences is not None or number + 1 >= len(layers):
            return
        pairs = list(
            zip(layers[number].parameters(), layers[number + 1].parameters(), strict=False)
        )
        if any(one.shape != other.shape for one, other in pairs):
            return
        changes = [
            change
            for one, other in pairs
            for change in ((one, lambda other=other: other), (other, lambda one=one: one))
        ]
        label = self._first()
        text = f"layers {label} and {number + 2} are swapped; swapped back, {_FOUND}"
        yield from self.undone("layers swapped", "layer", label, text, tensors_set(*changes))

    def _scaled_weight(self) -> Iterator[Hypothesis]:
        """Yield the scale of the only weight that differs, from its root mean square."""
        weights = [] if self.differences is None else self.differences.weights
        if len(weights) != 1 or None in (weights[0].layer, weights[0].old, weights[0].new):
            return
        (found,) = weights
        assert found.old is not None
        assert found.new is not None
        if not found.new.rms:
            return
        scale = found.old.rms / found.new.rms
        tensors = self.bench.stack.model.named_parameters()
        weight = next(value for name, value in tensors if plain_name(name) == found.name)
        name, label = found.kind.removesuffix(".weight"), str(found.layer)
        text = (
            f"layer {label}: the weights of {name} are multiplied by {1 / scale:.5g}; divided by "
            f"that, {_FOUND}"
        )
        change = tensors_set((weight, lambda: weight * scale))
        yield from self.undone(f"scaled {name}", "layer", label, text, change)

    def _kernels(self) -> Iterator[Hypothesis]:
        """Yield the other attention kernel, and the other implementation of experts."""
        model: Any = self.bench.stack.model
        now = model.config._attn_implementation
        other = "eager" if now == "sdpa" else "sdpa"
        text = f"attention differs between the kernels {now} and {other}; with {other}, {_FOUND}"
        yield from self.undone(
            "attention kernel",
            "model" if self.evidence.first == 0 else "layer",
            self._first(),
            text,
            with_attention(self.bench.stack, other),
        )

    def _scaled_outputs(self) -> Iterator[Hypothesis]:
        """Yield a scale of the first layer's attention or MLP output."""
        number = self.evidence.first
        if number not in self.evidence.residual:
            return
        stack, label = self.bench.stack, self._first()
        layer = stack.layers[number]
        products = last_products(layer, lambda: self.bench.states(until=number + 1))
        names = {id(module): name for name, module in layer.named_modules()}
        for module in products:
            scale = self._scale(module, number)
            if scale is None:
                continue
            name = names[id(module)]
            text = (
                f"layer {label}: the output of {name} is multiplied by {1 / scale:.5g}; divided "
                f"by that, {_FOUND}"
            )
            yield from self.undone(
                f"scaled {name}", "layer", label, text, outputs_scaled(module, scale)
            )

    def _scale(self, module: nn.Module, number: int) -> float | None:
        """Return the scale with which the mean of a row is the baseline's; None without one."""
        wanted = float(self.evidence.expected[:, number, 0].mean())
        points = [(1.0, float(self.plain[:, number, 0].mean()) - wanted)]
        scale = 1.01
        for _ in range(_SECANTS + 1):
            found = self.bench.states(outputs_scaled(module, scale), until=number + 1)
            if found is None or not 0.2 < scale < 5:
                return None
            row = rows_of(found[0][-2:], None)
            points.append((scale, float(row[:, 0, 0].mean()) - wanted))
            (before, low), (scale, high) = points[-2:]
            if high == low or not np.isfinite(high):
                return None
            scale -= high * (scale - before) / (high - low)
            if abs(scale - points[-1][0]) < 1e-7:
                break
        return scale if 0.2 < scale < 5 else None


def may_shift(bench: Bench) -> bool:
    """Return whether positions can be shifted without an error that a GPU does not survive."""
    if "position_ids" not in inspect.signature(bench.stack.decoder.forward).parameters:
        return False
    return bench.stack.device.type == "cpu" or not learned_positions(bench)


def learned_positions(bench: Bench) -> Sequence[nn.Embedding]:
    """Return the embeddings of positions: those of the decoder that are not of tokens."""
    tokens = bench.stack.model.get_input_embeddings()
    return [
        module
        for module in bench.stack.decoder.modules()
        if isinstance(module, nn.Embedding) and module is not tokens
    ]

"""Causes that the model itself predicts: it is run again with one change undone."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from cascade.core.float32_products import is_by_autocast, product_precision, products_in
from cascade.gate.causes.bench import (
    outputs_scaled,
    rows_of,
    tensors_set,
    values_set,
    with_attention,
)
from cascade.gate.causes.experts import expert_trials
from cascade.gate.causes.hypotheses import Hypothesis
from cascade.gate.causes.part_differences import ChangedSetting, PartDifferences
from cascade.gate.causes.positions import rotary_trials, shifted_positions
from cascade.gate.causes.trial_runs import FOUND, TrialRuns
from cascade.models.architecture import text_config_of
from cascade.models.sublayers import last_products
from cascade.saturation.model_parts import as_text, from_text, plain_name, setting_places

#: Epsilons of norms that checkpoints of `transformers` use.
_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)
_EPSILON = re.compile(r"(^|_)eps(ilon)?$")


#: How many times the scale of an output is improved by the secant method.
_SECANTS = 3


class Trials(TrialRuns):
    """The trials of one model, which share a bench."""

    def all(self) -> Iterator[Hypothesis]:
        """Yield every cause that was tried, the cheapest first."""
        evidence = self.evidence
        from_the_start = evidence.first == 0
        yield from self.rounded_products()
        yield from self.settings()
        yield from self._permuted_layers()
        yield from self._scaled_weight()
        if self.differences is not None and self.differences.weights:
            # A trial undoes code or settings. Weights that differ are the nearer explanation.
            return
        if from_the_start:
            yield from self._epsilons()
            yield from shifted_positions(self)
        elif evidence.first == evidence.normed:
            yield from self._epsilons()
        else:
            yield from self._swapped_layers()
        if evidence.first != evidence.normed:
            yield from rotary_trials(self)
            yield from expert_trials(self)
            yield from self.kernels()
            yield from self._scaled_outputs()

    # --- Settings ----------------------------------------------------------------------------

    def settings(self) -> Iterator[Hypothesis]:
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
                f"{old}; with {old}, {FOUND}"
            )
            yield from self.undone(
                f"setting {attribute}", "model", self.first, text, values_set(*changes)
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
            text = f"the norms' epsilon is {now}; with {value:g}, {FOUND}"
            change = values_set(*((*place, value) for place in places))
            yield from self.undone(f"setting {places[0][1]}", "model", self.first, text, change)

    # --- Products ----------------------------------------------------------------------------

    def rounded_products(self) -> Iterator[Hypothesis]:
        """Yield products that are rounded as they were in the baseline."""
        device = self.bench.stack.device
        now, then = product_precision(device), self.products
        if now == then or (then is not None and is_by_autocast(then)):
            return
        old, new = (f"rounded to {one}" if one else "computed in full" for one in (then, now))
        text = (
            f"products of float32 are {new}, and in the baseline they are {old} (see"
            f" `torch.set_float32_matmul_precision` and `torch.autocast`); {old}, {FOUND}"
        )
        change = functools.partial(products_in, device, then)
        yield from self.undone("precision of products", "numerics", None, text, change)

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
        text = f"layers have the baseline's weights of others: {moves}; put back, {FOUND}"
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
        label = self.first
        text = f"layers {label} and {number + 2} are swapped; swapped back, {FOUND}"
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
            f"that, {FOUND}"
        )
        change = tensors_set((weight, lambda: weight * scale))
        yield from self.undone(f"scaled {name}", "layer", label, text, change)

    def kernels(self) -> Iterator[Hypothesis]:
        """Yield the other attention kernel, and the other implementation of experts."""
        model: Any = self.bench.stack.model
        if not model._can_set_attn_implementation():
            return
        now = model.config._attn_implementation
        other = "eager" if now == "sdpa" else "sdpa"
        text = f"attention differs between the kernels {now} and {other}; with {other}, {FOUND}"
        yield from self.undone(
            "attention kernel",
            "model" if self.evidence.first == 0 else "layer",
            self.first,
            text,
            with_attention(self.bench.stack, other),
        )

    def _scaled_outputs(self) -> Iterator[Hypothesis]:
        """Yield a scale of the first layer's attention or MLP output."""
        number = self.evidence.first
        if number not in self.evidence.residual:
            return
        stack, label = self.bench.stack, self.first
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
                f"by that, {FOUND}"
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

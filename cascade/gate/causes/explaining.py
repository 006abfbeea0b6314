"""Explaining a drift: every cause that can be computed is tried, and at most one is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec.structs
import numpy as np
import torch
from torch import Tensor, nn

from cascade.core.arrays import Array
from cascade.gate.causes.bench import (
    MOST_SEQUENCES,
    Bench,
    rows_of,
    similarities_of,
    statistics_of,
)
from cascade.gate.causes.hypotheses import (
    MOST_LEFT,
    Evidence,
    Hypothesis,
    best_of,
    growth,
    named,
    tried,
)
from cascade.gate.causes.part_differences import (
    ChangedTensor,
    PartDifferences,
    in_words,
    part_differences,
    settings_in_words,
)
from cascade.gate.causes.positions import may_shift
from cascade.gate.causes.rows import NO_FINAL_NORM, row_hypotheses
from cascade.gate.causes.trials import Trials
from cascade.gate.records import Attribution
from cascade.models.stack import DecoderStack
from cascade.saturation.records import ModelParts

#: Left padding moves positions by the length of the longest text; so many tokens are tried.
_MOST_PADDING = 16


#: How far a state may move, relative to its size, if a later token changes. Rounding: 1e-6.
_LEAK = 1e-3


def explain(
    stack: DecoderStack,
    ids: Array,
    evidence: Evidence,
    known: Attribution,
    parts: ModelParts | None,
    products: str | None = None,
) -> Attribution:
    """Return the cause of a drift, after running the model again.

    Args:
        stack: The model that was measured; every change is undone to the last bit.
        ids: `[S, T]` token ids of the compared sequences.
        evidence: What was measured on them.
        known: What the rows alone say.
        parts: The parts of the baseline's model, if the baseline recorded them.
        products: How products were rounded in the baseline; None if they were not.

    Returns:
        The named cause, or what is known: the first layer, size and growth.
    """
    moved = np.abs(evidence.obtained - evidence.expected) / evidence.tolerance
    order = np.argsort(-moved.max(axis=(1, 2)), kind="stable")
    chosen = np.sort(order[:MOST_SEQUENCES]).tolist()
    few, bench = evidence.of(chosen), Bench(stack, ids[chosen])
    found = bench.states()
    if found is None:
        return known
    case = _Case(bench, evidence, few, known, found[0], found[1])
    plain = rows_of(*found)
    if few.distance(plain, few.expected) <= MOST_LEFT:
        return case.outside()
    if few.distance(plain, few.obtained) > MOST_LEFT:
        return case.not_repeated(plain, products)
    differences = None if parts is None else part_differences(stack, parts)
    return case.inside(plain, differences, products)


@dataclass(frozen=True)
class _Case:
    """A model that was run again as it is: its states, and what was measured before.

    Attributes:
        bench: Runs the model over a few of the sequences.
        evidence: What was measured.
        few: The evidence of the sequences of the bench.
        known: What the rows alone say.
        states: The hidden history, of this run.
        normed: The state after the final norm, of this run.
    """

    bench: Bench
    evidence: Evidence
    few: Evidence
    known: Attribution
    states: list[Tensor]
    normed: Tensor | None

    # --- The model is right --------------------------------------------------------------------

    def outside(self) -> Attribution:
        """Explain the drift of a model that by itself gives the baseline's numbers."""
        hypotheses = [
            _before_the_norm(one) if one.name == NO_FINAL_NORM else one
            for one in row_hypotheses(self.evidence)
            if one.cause == "capture" or one.name == NO_FINAL_NORM
        ]
        hypotheses += [*self._read_otherwise(), *self._padded()]
        best = best_of(hypotheses, self.few.moved_by)
        if best is not None:
            return named(best, hypotheses)
        text = (
            "the model by itself, run again on the same tokens, gives the baseline's numbers; "
            "check how it was run (padding, positions, order of the batch) and how its hidden "
            f"states are read; {growth(self.evidence)}"
        )
        return Attribution(cause="capture", layer=None, text=text, tried=tried(hypotheses))

    def _read_otherwise(self) -> Iterator[Hypothesis]:
        """Yield other ways to turn the states into rows."""
        for dtype in (torch.bfloat16, torch.float16):
            rows = rows_of(self.states, self.normed, dtype)
            name = str(dtype).removeprefix("torch.")
            yield Hypothesis(
                f"similarity in {name}",
                "numerics",
                None,
                f"similarities computed in {name} from the model's states are those measured; "
                "compute them in fp32",
                self.few.distance(rows, self.few.obtained),
            )
        values = similarities_of(self.states, self.normed)
        count = len(values)
        across = statistics_of(
            values.mean(dim=0, keepdim=True)[..., :count].expand_as(values[..., :count])
        )
        yield Hypothesis(
            "mean over sequences",
            "counting",
            None,
            "the means of each sequence are those of its first token; similarities are averaged "
            "over sequences instead of tokens",
            self.few.distance(across, self.few.obtained),
        )

    def _padded(self) -> Iterator[Hypothesis]:
        """Yield positions that begin later, as left padding without position ids gives them."""
        plain = rows_of(self.states, self.normed)
        for shift in range(1, _MOST_PADDING + 1) if may_shift(self.bench) else ():
            rows = self.bench.rows(shift=shift)
            if rows is None or self.few.distance(rows, plain) <= MOST_LEFT:
                return
            left = self.few.distance(rows, self.few.obtained)
            tokens = f"{shift} token{'s' * (shift > 1)}"
            text = (
                f"positions begin at {shift} instead of 0, as left padding of {tokens} without "
                "position ids gives them; with these positions, the model gives the measured "
                "numbers"
            )
            yield Hypothesis("positions shifted", "model", self.evidence.layers[0], text, left)
            if left <= MOST_LEFT:
                return

    # --- The model differs ---------------------------------------------------------------------

    def inside(
        self, plain: Array, differences: PartDifferences | None, products: str | None
    ) -> Attribution:
        """Explain the drift of a model that gives other numbers than the baseline."""
        leak = self._sees_later_tokens()
        if leak is not None:
            return leak
        hypotheses = [
            self._norm_of(one) if one.name == NO_FINAL_NORM else one
            for one in row_hypotheses(self.evidence)
            if one.cause != "capture"
        ]
        hypotheses += Trials(self.bench, self.few, plain, differences, products).all()
        best = best_of(hypotheses, self.few.moved_by)
        if best is not None:
            return named(best, hypotheses)
        found = self._weights(differences)
        text = self.known.text if found is None else found.text
        if found is None and differences is not None and not differences.weights:
            text += "; all weights are the baseline's"
        rest = "; ".join(settings_in_words(differences))
        found = found or self.known
        return msgspec.structs.replace(
            found, text=f"{text}; {rest}" if rest else text, tried=tried(hypotheses)
        )

    def _norm_of(self, hypothesis: Hypothesis) -> Hypothesis:
        """Return the hypothesis of no final norm with what the model's norm says."""
        label = hypothesis.layer
        weight = _final_norm_weight(self.bench.stack)
        if weight is not None and bool((weight == weight[0]).all()):
            text = (
                f"the weights of the final norm are all {float(weight[0]):.4g}, so row {label} "
                f"holds the baseline's values of row {self.evidence.residual[-1] + 1}"
            )
            name = "final norm of equal weights"
        else:
            name = "final norm skipped"
            text = (
                "the state after the final norm has the direction of the state before it, and "
                "the norm's weights are not all equal; the norm is skipped"
            )
        return replace(hypothesis, name=name, text=text)

    def _sees_later_tokens(self) -> Attribution | None:
        """Return the attribution to the mask if a token's state depends on later tokens."""
        ids = self.bench.ids.clone()
        ids[:, -1] = (ids[:, -1] + 1) % self.bench.stack.vocab_size
        if self.evidence.first != 0 or ids.shape[1] < 2:
            return None
        changed = self.bench.states(ids=ids)
        if changed is None:
            return None
        before, after = self.states[-1][:, :-1].float(), changed[0][-1][:, :-1].float()
        moved = torch.linalg.vector_norm(after - before, dim=-1)
        size = torch.linalg.vector_norm(before, dim=-1)
        if not bool((moved > _LEAK * size).any()):
            return None
        return Attribution(
            cause="model",
            layer=self.evidence.layers[0],
            text="states of tokens change with a later token; the mask lets tokens see later ones",
            named="mask",
        )

    def _weights(self, differences: PartDifferences | None) -> Attribution | None:
        """Return the attribution to weights that differ, if they begin where the rows moved."""
        if differences is None:
            return None
        weights = [one for one in differences.weights if self._can_move(one)]
        stack, place = self.bench.stack, self.evidence.first
        if not weights:
            return None
        layers = {weight.layer for weight in weights}
        first = min((layer for layer in layers if layer is not None), default=None)
        label = self.evidence.layers[place]
        is_normed = place == self.evidence.normed
        within = {None} if is_normed else {place + 1}
        if not is_normed and None not in layers and first != place + 1:
            return None  # the row that moved first has the baseline's weights
        where = in_words(weights, stack.num_layers)
        formats = {weight.rounded_to for weight in weights if _is_matrix(weight)}
        rounded = next(iter(formats)) if len(formats) == 1 else None
        one = layers == within
        cause = "layer" if one else ("numerics" if rounded else "model")
        if rounded:
            text = (
                f"the weights of {where} are exactly representable in {rounded}, the baseline's "
                f"are not; they were rounded to {rounded}"
            )
        else:
            text = f"the weights of {where} differ from the baseline's, no others do"
            kinds = {weight.kind for weight in weights}
            if len(layers) > 1 and None not in layers and len(kinds) < 4:
                text += (
                    " (an adapter merged twice, not at all, or with another scale, leaves this "
                    "pattern)"
                )
        name = f"weights in {rounded}" if rounded else "weights changed"
        layer = label if one or cause == "model" else None
        return Attribution(cause=cause, layer=layer, text=text, named=name)  # type: ignore[arg-type]

    def _can_move(self, weight: ChangedTensor) -> bool:
        """Return whether a weight can move a row: the LM head cannot."""
        return not weight.name.startswith("lm_head")

    # --- Neither -------------------------------------------------------------------------------

    def not_repeated(self, plain: Array, products: str | None) -> Attribution:
        """Explain a run that gave neither the measured nor the baseline's numbers."""
        # Rounded products depend on the number of sequences that are computed together.
        trials = Trials(self.bench, self.few, plain, None, products)
        hypotheses = list(trials.rounded_products())
        best = best_of(hypotheses, self.few.moved_by)
        if best is not None:
            return named(best, hypotheses)
        text = (
            "the model, run again on the same tokens, gives neither the measured nor the "
            f"baseline's numbers, so it is not repeatable, or its states are read wrongly; "
            f"{growth(self.evidence)}"
        )
        return msgspec.structs.replace(self.known, text=text)


def _before_the_norm(hypothesis: Hypothesis) -> Hypothesis:
    """Return the hypothesis of no final norm for a model whose norm is right."""
    text = f"row {hypothesis.layer} is read before the final norm, and not after it"
    return replace(
        hypothesis, name="last state read before the final norm", cause="capture", text=text
    )


def _is_matrix(weight: ChangedTensor) -> bool:
    """Return whether a weight is a matrix; norms and biases are often exact in bfloat16."""
    return "norm" not in weight.kind and not weight.kind.endswith("bias")


def _final_norm_weight(stack: DecoderStack) -> Tensor | None:
    """Return the weight of the last norm outside of the decoder layers."""
    inside = {id(module) for layer in stack.layers for module in layer.modules()}
    found: Sequence[nn.Module] = [
        module
        for module in stack.decoder.modules()
        if id(module) not in inside and "norm" in type(module).__name__.lower()
    ]
    weight = getattr(found[-1], "weight", None) if found else None
    return weight.detach() if isinstance(weight, Tensor) and weight.ndim == 1 else None

"""Copies of a model with rounded or perturbed weights, for comparison with the original."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from cascade.core.errors import ModelError, UsageError
from cascade.core.schema import known
from cascade.models.stack import DecoderStack

#: Number of inputs that share one scale in an int4 copy.
INT4_GROUP = 32

#: The effect of each kind of alteration on the matrices of all decoder layers.
KINDS = {
    "int8": "rounded to int8, one scale per output, to nearest",
    "int4": f"rounded to int4, one scale per output and {INT4_GROUP} inputs, to nearest",
    "bf16": "rounded to bfloat16",
    "noise": "multiplied by 1 + a normal deviate",
}


@dataclass(frozen=True)
class Alteration:
    """An alteration of the matrices of a model's decoder layers.

    Embeddings, LM head, norms and biases do not change. Rounded weights are stored and computed in
    the model's dtype.

    Attributes:
        kind: A key of `KINDS`.
        amount: Standard deviation of the noise; 0 for all other kinds.
        seed: Seed of the noise.

    Example:
        >>> Alteration.parse("noise:0.01").amount
        0.01
    """

    kind: str
    amount: float = 0.0
    seed: int = 0

    @classmethod
    def parse(cls, text: str, *, seed: int = 0) -> Alteration:
        """Parse an alteration of the command line: "int8", "int4", "bf16" or "noise:0.01".

        Args:
            text: The alteration.
            seed: Seed of the noise.

        Raises:
            UsageError: The text is not a known alteration.
        """
        kind, colon, amount = text.partition(":")
        if kind not in KINDS or bool(colon) != (kind == "noise"):
            raise UsageError(f"expected a copy such as int8, int4, bf16 or noise:0.01, got {text}")
        if kind != "noise":
            return cls(kind)
        try:
            deviation = float(amount)
        except ValueError:
            deviation = -1.0
        if not 0 < deviation < 1:
            raise UsageError(
                f"expected noise with a standard deviation above 0 and below 1, got {text}; "
                "noise:0.01 is a usual size"
            )
        return cls(kind, deviation, seed)

    @property
    def name(self) -> str:
        """The alteration as written on the command line."""
        return f"{self.kind}:{self.amount:g}" if self.kind == "noise" else self.kind

    def words(self) -> str:
        """Return a description of the alteration."""
        text = f"the matrices of all decoder layers {KINDS[self.kind]}"
        if self.kind == "noise":
            text += f" of standard deviation {self.amount:g}, seed {self.seed}"
        return text


@torch.no_grad()
def alter(stack: DecoderStack, how: Alteration) -> None:
    """Alter a model's weights in place, and note the alteration in its provenance.

    Args:
        stack: The model.
        how: Alteration of the matrices of its decoder layers.

    Raises:
        ModelError: The weights are quantized, so they cannot be rounded or scaled.
    """
    generator = torch.Generator().manual_seed(how.seed)
    for weight, inputs in _matrices(stack):
        if not weight.is_floating_point():
            raise ModelError(
                "expected floating-point weights to make an altered copy of, got "
                f"{str(weight.dtype).removeprefix('torch.')}; load the model before quantization"
            )
        # Convert to fp32 with the inputs in the last dimension.
        wide = weight.detach().float().movedim(inputs, -1)
        weight.copy_(_altered(wide, how, generator).movedim(-1, inputs))
    stack.provenance = replace(
        stack.provenance,
        altered=how.words(),
        name=f"{known(stack.provenance.name) or 'model'}+{how.name}",
        weights_hash=stack.weights_in_memory(),
    )


def copy_of(stack: DecoderStack, how: Alteration) -> DecoderStack:
    """Return an altered copy of a model. The model itself is not changed.

    Args:
        stack: The model.
        how: Alteration of the matrices of the copy's decoder layers.

    Raises:
        ModelError: See `alter`.

    Example:
        >>> from cascade import copy_of, load
        >>> from cascade.studies.comparisons.altered_models import Alteration
        >>> copy_of(load("smollm2-135m"), Alteration.parse("int8")).provenance.name
        'smollm2-135m-instruct-q4_1+int8'
    """
    altered = DecoderStack(
        copy.deepcopy(stack.model),
        tokenizer=stack.tokenizer,
        provenance=stack.provenance,
    )
    alter(altered, how)
    return altered


def _matrices(stack: DecoderStack) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield each matrix of the decoder layers once, with the dimension of its inputs."""
    from transformers.pytorch_utils import Conv1D

    seen: set[int] = set()
    for module in stack.layers.modules():
        # Linear layers of GPT-2 have their inputs first. Stacked experts are [E, out, in].
        inputs = 0 if isinstance(module, Conv1D) else -1
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter, inputs


def _altered(weight: Tensor, how: Alteration, generator: torch.Generator) -> Tensor:
    if how.kind == "bf16":
        return weight.bfloat16().float()
    if how.kind == "int8":
        return rounded(weight, 127)
    if how.kind == "int4":
        inputs = weight.shape[-1]
        group = INT4_GROUP if inputs % INT4_GROUP == 0 else inputs
        grouped = weight.reshape(*weight.shape[:-1], -1, group)
        return rounded(grouped, 7).reshape(weight.shape)
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    return weight * (1 + how.amount * noise)


def rounded(weight: Tensor, largest: int) -> Tensor:
    """Round to the nearest multiple of a scale that is shared along the last dimension.

    Args:
        weight: Weights, `[..., in]`.
        largest: Largest integer level: 127 for int8, 7 for int4.

    Returns:
        The rounded weights, in the same shape. The value of largest magnitude does not change.
    """
    scale = weight.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / largest
    return (weight / scale).round() * scale

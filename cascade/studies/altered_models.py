"""Copies of a model with altered weights: what quantization and perturbation do to a profile."""

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

#: Inputs that share one scale in an int4 copy.
INT4_GROUP = 32

#: What each way of altering does to the matrices of all decoder layers.
WAYS = {
    "int8": "rounded to int8, one scale per output, to nearest",
    "int4": f"rounded to int4, one scale per output and {INT4_GROUP} inputs, to nearest",
    "bf16": "rounded to bfloat16",
    "noise": "multiplied by 1 + a normal deviate",
}


@dataclass(frozen=True)
class Copy:
    """A way to alter a model's weights: the matrices of its decoder layers.

    Embeddings, LM head, norms and biases stay as they are, and so does arithmetic: rounded weights
    are computed with in the model's own dtype.

    Attributes:
        way: A key of `WAYS`.
        amount: Standard deviation of the noise; 0 for all other ways.
        seed: Of the noise.
    """

    way: str
    amount: float = 0.0
    seed: int = 0

    @classmethod
    def parse(cls, text: str, *, seed: int = 0) -> Copy:
        """Read a way as the command line names it: "int8", "int4", "bf16" or "noise:0.01".

        Raises:
            UsageError: It names something else.
        """
        way, colon, amount = text.partition(":")
        if way not in WAYS or bool(colon) != (way == "noise"):
            raise UsageError(f"expected a copy such as int8, int4, bf16 or noise:0.01, got {text}")
        if way != "noise":
            return cls(way)
        try:
            deviation = float(amount)
        except ValueError:
            deviation = -1.0
        if not 0 < deviation < 1:
            raise UsageError(f"expected noise of a size above 0 and below 1, got {text}")
        return cls(way, deviation, seed)

    @property
    def name(self) -> str:
        """The way as the command line names it."""
        return f"{self.way}:{self.amount:g}" if self.way == "noise" else self.way

    def words(self) -> str:
        """Say what it does."""
        text = f"the matrices of all decoder layers {WAYS[self.way]}"
        if self.way == "noise":
            text += f" of standard deviation {self.amount:g}, seed {self.seed}"
        return text


@torch.no_grad()
def alter(stack: DecoderStack, how: Copy) -> None:
    """Alter a model's weights in place; from then on its provenance says so.

    Args:
        stack: The model.
        how: What to do to the matrices of its decoder layers.

    Raises:
        ModelError: Its weights are packed, so that they cannot be rounded or scaled as numbers.
    """
    generator = torch.Generator().manual_seed(how.seed)
    for weight, inputs in _matrices(stack):
        if not weight.is_floating_point():
            raise ModelError(
                f"the weights are stored as {str(weight.dtype).removeprefix('torch.')}, expected "
                "floating-point ones to make a copy of; take the model before quantization"
            )
        # In fp32 with the inputs last, whatever they were stored as.
        wide = weight.detach().float().movedim(inputs, -1)
        weight.copy_(_altered(wide, how, generator).movedim(-1, inputs))
    stack.provenance = replace(
        stack.provenance,
        altered=how.words(),
        name=f"{known(stack.provenance.name) or 'model'}+{how.name}",
        weights_hash=stack.weights_in_memory(),
    )


def copy_of(stack: DecoderStack, how: Copy) -> DecoderStack:
    """Return an altered copy of a model; the model itself stays as it is.

    Args:
        stack: The model.
        how: What to do to the matrices of the copy's decoder layers.

    Raises:
        ModelError: As for `alter`.
    """
    twin = DecoderStack(
        copy.deepcopy(stack.model),
        tokenizer=stack.tokenizer,
        provenance=stack.provenance,
    )
    alter(twin, how)
    return twin


def _matrices(stack: DecoderStack) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield each matrix of the decoder layers once, with the dimension of its inputs."""
    from transformers.pytorch_utils import Conv1D

    seen: set[int] = set()
    for module in stack.layers.modules():
        # GPT-2's linear layers keep their inputs first; stacks of experts are [E, out, in].
        inputs = 0 if isinstance(module, Conv1D) else -1
        for parameter in module.parameters(recurse=False):
            if parameter.ndim >= 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter, inputs


def _altered(weight: Tensor, how: Copy, generator: torch.Generator) -> Tensor:
    if how.way == "bf16":
        return weight.bfloat16().float()
    if how.way == "int8":
        return rounded(weight, 127)
    if how.way == "int4":
        inputs = weight.shape[-1]
        group = INT4_GROUP if inputs % INT4_GROUP == 0 else inputs
        grouped = weight.reshape(*weight.shape[:-1], -1, group)
        return rounded(grouped, 7).reshape(weight.shape)
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    return weight * (1 + how.amount * noise)


def rounded(weight: Tensor, largest: int) -> Tensor:
    """Round to the nearest multiple of a scale that the last dimension shares.

    Args:
        weight: `[..., in]`.
        largest: The largest whole number of the scale: 127 for int8, 7 for int4.

    Returns:
        The same shape; the value of largest magnitude keeps its own.
    """
    scale = weight.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / largest
    return (weight / scale).round() * scale

"""Models with altered weights, rounded or perturbed, to compare with the original."""

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

#: What each kind of alteration does to the matrices of all decoder layers.
KINDS = {
    "int8": "rounded to int8, one scale per output, to nearest",
    "int4": f"rounded to int4, one scale per output and {INT4_GROUP} inputs, to nearest",
    "bf16": "rounded to bfloat16",
    "noise": "multiplied by 1 + a normal deviate",
}


@dataclass(frozen=True)
class Alteration:
    """How to alter a model's weights, namely the matrices of its decoder layers.

    Embeddings, LM head, norms and biases stay as they are. Rounded weights are stored, and computed
    with, in the model's own dtype.

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
        """Read an alteration as the command line names it: "int8", "int4", "bf16" or "noise:0.01".

        Raises:
            UsageError: It names something else.
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
            raise UsageError(f"expected noise of a size above 0 and below 1, got {text}")
        return cls(kind, deviation, seed)

    @property
    def name(self) -> str:
        """The alteration as the command line names it."""
        return f"{self.kind}:{self.amount:g}" if self.kind == "noise" else self.kind

    def words(self) -> str:
        """Return what it does, in words."""
        text = f"the matrices of all decoder layers {KINDS[self.kind]}"
        if self.kind == "noise":
            text += f" of standard deviation {self.amount:g}, seed {self.seed}"
        return text


@torch.no_grad()
def alter(stack: DecoderStack, how: Alteration) -> None:
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


def copy_of(stack: DecoderStack, how: Alteration) -> DecoderStack:
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
    """Round to the nearest multiple of a scale that the last dimension shares.

    Args:
        weight: `[..., in]`.
        largest: The largest whole number of the scale: 127 for int8, 7 for int4.

    Returns:
        The same shape; the value of largest magnitude keeps its own.
    """
    scale = weight.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / largest
    return (weight / scale).round() * scale

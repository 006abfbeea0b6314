"""Rounding a model's hidden states differently, as other kernels would."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cascade.core.float32_products import product_precision, unit_of
from cascade.models.architecture import run_decoder
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import SimilarityVisitor


def other_rounding(stack: DecoderStack, *, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Return a function that moves every component by up to one unit in its last place.

    Passed to `DecoderStack.visiting` as `change`, it shows how far rounding alone moves a result,
    in any dtype, with any kernel and for any family. Where products are rounded, a unit is theirs.

    Args:
        stack: The model.
        seed: The seed of the random moves.

    Example:
        >>> import cascade
        >>> change = other_rounding(cascade.load("smollm2-135m"))
        >>> moved = change(torch.ones(1, 2, 4)) - 1
        >>> bool(moved.abs().max() <= torch.finfo(torch.float32).eps)
        True
    """
    products = product_precision(stack.device)
    generator = torch.Generator(device=stack.device).manual_seed(seed)

    def change(hidden: Tensor) -> Tensor:
        # Models in half precision can have their residual stream in fp32.
        unit = max(torch.finfo(dtype).eps for dtype in (hidden.dtype, stack.dtype))
        if products is not None:
            unit = max(unit, unit_of(products))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        draw = torch.rand(hidden.shape, generator=generator, device=stack.device, dtype=wide)
        moved = hidden.to(wide) * (1 + unit * (2 * draw - 1).to(hidden.device))
        return moved.to(hidden.dtype)

    return change


@torch.no_grad()
def similarities_rounded_differently(stack: DecoderStack, ids: Tensor) -> Tensor:
    """Return every layer's similarity for every token, with every hidden state rounded differently.

    Args:
        stack: The model.
        ids: Token ids, `[B, T]`, on the model's device.

    Returns:
        `[L, B, T]`, as `cascade.saturation.profile.similarities` returns them.
    """
    visitor = SimilarityVisitor()
    with stack.visiting(visitor, change=other_rounding(stack)) as decoder:
        final = run_decoder(decoder, ids)
    return visitor.finish(final if stack.has_final_norm else None)

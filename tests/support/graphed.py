"""Generation by passes of a fixed size, and what the model generates by itself."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.graph_pool import GraphPool
from cascade.decoding.graphed_forward import Capture
from cascade.decoding.growing_text import Generation
from cascade.models.stack import DecoderStack
from support.drafting import FREE
from support.generating import NEW
from support.tiny_models import tiny_model

#: Families whose static cache can go back and gives the model's own results.
SUPPORTED = (
    "llama",
    "qwen2",
    "qwen3",
    "smollm3",
    "gpt2",
    "gpt_neox",
    "opt",
    "gptj",
    "falcon",
    "granite",
    "cohere",
)
#: Of these, one that makes tensors from Python numbers in its forward, which no graph can.
NOT_CAPTURED = "falcon"
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def new_stack(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DecoderStack:
    model: Any = copy.deepcopy(tiny_model(family))
    return DecoderStack(model.to(device, dtype))


def graphed(stack: DecoderStack, capture: Capture | None) -> EarlyExit:
    """Return early exit by graphs with a capture, as on CUDA."""
    pool = GraphPool(stack, capture, rounds_as_static=True)
    stack.engines["passes of graphs"] = pool
    return EarlyExit(stack, engine="graphs")


def generated(
    early: EarlyExit, ids: Tensor, mask: Tensor | None = None, **kwargs: Any
) -> Generation:
    settings = GREEDY | {"verify": True, "pass_costs": FREE, "max_new_tokens": NEW} | kwargs
    made = early.generate(ids, mask, return_dict_in_generate=True, **settings)
    assert isinstance(made, Generation)
    return made


def own_text(stack: DecoderStack, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    model: Any = stack.model
    settings = GREEDY | {"max_new_tokens": NEW} | kwargs
    made: Tensor = model.generate(ids, attention_mask=mask, **settings)
    return made


def columns_of(made: Generation) -> int:
    """Return the columns of the static cache that a generation says it used."""
    assert made.engine is not None
    return int(made.engine.split("static cache of ")[1].split(" columns")[0])

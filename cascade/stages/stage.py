"""Stages: decoder layers that are appended to a model and start as the identity."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from cascade.core.errors import ModelError, UnsupportedModelError, UsageError
from cascade.core.schema import UNSET
from cascade.models.architecture import find_layers
from cascade.models.identity import add_to_digest
from cascade.models.stack import DecoderStack, LayerCall
from cascade.models.sublayers import last_products
from cascade.stages.records import StageProvenance
from cascade.stages.training_config import STARTS, Start


@dataclass
class Stage:
    """Decoder layers that follow a model's last layer and have the same class.

    Attributes:
        layers: The layers, in fp32 during training.
        sources: For each layer, the layer of the model below (from 1) that has the same kind of
            attention. Some families alternate between kinds.
        start: Initial weights: "copies" or "fresh".
        head: Separate LM head; None to use the model's.
        provenance: How the stage was trained, if it was.
    """

    layers: nn.ModuleList
    sources: tuple[int, ...]
    start: Start = "copies"
    head: nn.Module | None = None
    provenance: StageProvenance = field(default_factory=StageProvenance)

    def weights(self) -> dict[str, Tensor]:
        """Return all weights by name, without duplicates."""
        modules = {"layers": self.layers} | ({} if self.head is None else {"head": self.head})
        return {
            f"{prefix}.{name}": value
            for prefix, module in modules.items()
            for name, value in module.state_dict().items()
        }

    def load(self, weights: dict[str, Tensor]) -> None:
        """Copy weights into the stage.

        Args:
            weights: Weights by name, as `weights` returns them.

        Raises:
            ModelError: A name or shape differs from this stage's.
        """
        own = self.weights()
        for name in sorted(own.keys() | weights.keys()):
            expected, got = own.get(name), weights.get(name)
            if expected is None or got is None or expected.shape != got.shape:
                raise ModelError(
                    f"the stage's weight {name}: expected {_shape_words(expected)}, got "
                    f"{_shape_words(got)}; load the weights that were saved with this stage"
                )
        for name, value in own.items():
            value.copy_(weights[name])  # state_dict shares memory with the parameters

    def fingerprint(self) -> str:
        """Return a SHA-256 over all weights. It is equal exactly when all weights are."""
        digest = hashlib.sha256()
        for name, value in self.weights().items():
            digest.update(name.encode())
            add_to_digest(digest, value)
        return f"sha256:{digest.hexdigest()}"

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters."""
        yield from self.layers.parameters()
        if self.head is not None:
            yield from self.head.parameters()


def _shape_words(value: Tensor | None) -> str:
    return "none" if value is None else str(list(value.shape))


def new_stage(
    stack: DecoderStack,
    num_layers: int = 2,
    *,
    start: Start = "copies",
    own_head: bool = False,
    seed: int = 0,
) -> Stage:
    """Return an untrained stage for a model. It is exactly the identity.

    The layers are copies of the model's last layers, or have random weights. In both cases, the
    projections through which attention and MLP write to the residual stream are zero, so the stage
    adds nothing until it is trained (block expansion, Wu et al. 2024, arXiv 2401.02415).

    Args:
        stack: Model that the stage follows: a base, or a base with stages.
        num_layers: Number of layers.
        start: Initial weights: "copies" or "fresh".
        own_head: Give the stage a separate LM head, which starts as a copy of the model's.
        seed: Seed of fresh weights.

    Raises:
        UsageError: `num_layers` exceeds the model's layers, or `start` is unknown.
        UnsupportedModelError: The family's layers with zeroed projections are not the identity
            (post-norm layers, mixtures of experts), or the weights are quantized.
    """
    if start not in STARTS:
        raise UsageError(f"expected a start among {', '.join(STARTS)}, got {start!r}")
    check_depth(stack, num_layers)
    sources = tuple(range(stack.num_layers - num_layers + 1, stack.num_layers + 1))
    layers = [_trainable(stack, copy.deepcopy(stack.layers[source - 1])) for source in sources]
    if start == "fresh":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in layers:
                _draw(stack, layer)
    for source, layer in zip(sources, layers, strict=True):
        zero_outputs(stack, source, layer)
    head = copy.deepcopy(stack.lm_head).float() if own_head else None
    stage = Stage(nn.ModuleList(layers), sources, start, head)
    for parameter in stage.parameters():
        parameter.requires_grad_(True)
    check_identity(stack, stage)
    return stage


def check_depth(stack: DecoderStack, num_layers: int) -> None:
    """Check that the model has enough layers for a stage.

    Raises:
        UsageError: `num_layers` is not in 1..N.
    """
    if not 1 <= num_layers <= stack.num_layers:
        raise UsageError(
            f"expected 1 to {stack.num_layers} layers for a stage, got {num_layers}; a stage has "
            "at most as many layers as its model"
        )


def _trainable(stack: DecoderStack, layer: nn.Module) -> nn.Module:
    if not all(type(value) is nn.Parameter for value in layer.parameters()) or not all(
        value.is_floating_point() for value in layer.state_dict().values()
    ):
        raise UnsupportedModelError(
            f"the layers of this {stack.model.config.model_type} are quantized, and a stage of "
            "quantized layers cannot be trained; load the model with --dtype float32 or bfloat16"
        )
    return layer.float()


def _draw(stack: DecoderStack, layer: nn.Module) -> None:
    """Initialize a layer's weights as its family does, and reset its norms."""
    for module in layer.modules():
        if hasattr(module, "_is_hf_initialized"):
            del module._is_hf_initialized
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, "_is_hf_initialized"):
                del parameter._is_hf_initialized
    with torch.no_grad():
        layer.apply(stack.model._init_weights)


@torch.no_grad()
def zero_outputs(stack: DecoderStack, source: int, layer: nn.Module) -> None:
    """Zero the output projections of a layer's attention and of its MLP."""
    for module in last_products(layer, lambda: _run_once(stack, source, layer)):
        for parameter in module.parameters(recurse=False):
            parameter.zero_()


def _run_once(stack: DecoderStack, source: int, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Run a layer in fp32 on random states, with the call arguments of its source layer."""
    ids = torch.arange(8, device=stack.device).remainder(stack.vocab_size)[None]
    drawn = torch.randn((1, 8, stack.hidden_size), generator=torch.Generator().manual_seed(0))
    hidden = drawn.to(stack.device)
    return hidden, run_in_fp32(layer, hidden, stack.plan(ids).calls[source - 1])


def run_in_fp32(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """Run a layer in fp32. Masks and rotary tables are converted from the model's dtype."""
    kwargs = {name: _in_fp32(value) for name, value in call.kwargs.items()}
    output = layer(hidden, *map(_in_fp32, call.args), **kwargs)
    computed: Tensor = output[0] if isinstance(output, tuple) else output
    return computed


def _in_fp32(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_in_fp32(item) for item in value)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def check_identity(stack: DecoderStack, stage: Stage) -> None:
    """Check that the layers of a stage return their input unchanged.

    Raises:
        UnsupportedModelError: A layer changes its input although its output projections are zero.
    """
    for source, layer in zip(stage.sources, stage.layers, strict=True):
        hidden, output = _run_once(stack, source, layer)
        if not torch.equal(hidden, output):
            raise UnsupportedModelError(
                f"a layer of {stack.model.config.model_type} changes its input even with zeroed "
                "output projections (post-norm layers and mixtures of experts do), so a stage "
                "would not start as the identity; use a model family without such layers"
            )


def run_stage(
    stack: DecoderStack, stage: Stage, input_ids: Tensor, states: Tensor, entering: Tensor
) -> Tensor:
    """Run a stage over stored states, as a cascade with frozen propagation would.

    Gradients flow to the stage's weights if gradients are enabled.

    Args:
        stack: Model that the stage follows. It prepares masks and positions; its layers are not
            computed.
        stage: The stage, in fp32 or in the states' dtype.
        input_ids: Token ids, `[B, T]`.
        states: Output of the model's last layer, `[B, T, D]`.
        entering: True for tokens that enter the stage, `[B, T]`. All other tokens keep their
            states, and entering tokens attend to those states.

    Returns:
        States behind the stage, `[B, T, D]`. Tokens that do not enter keep their input states.
    """
    calls = stack.plan(input_ids).calls
    hidden = states
    for source, layer in zip(stage.sources, stage.layers, strict=True):
        output = run_in_fp32(layer, hidden, calls[source - 1])
        hidden = torch.where(entering[..., None], output, states)
    return hidden


def extended(stack: DecoderStack, stage: Stage) -> DecoderStack:
    """Return the model with a stage's layers appended, as a decoder stack.

    All weights are shared with the model and the stage. Neither is changed, and training the stage
    also changes the returned model.

    Args:
        stack: The model, or a model with stages.
        stage: Stage to append.

    Raises:
        ModelError: The stage has another width or vocabulary, or its weights are not finite.
    """
    check_fits(stack, stage)
    weights = (*stack.model.parameters(), *stack.model.buffers())
    model = copy.deepcopy(stack.model, {id(value): value for value in weights})
    layers = find_layers(model)
    config = model.config.get_text_config()
    _lengthen(config, stage.sources, len(layers))
    for number, layer in enumerate(stage.layers, start=len(layers)):
        _place(layer, number, config)
        layers.append(layer)
    if stage.head is not None:
        model.set_output_embeddings(stage.head)
    # These fields describe the model without the stage.
    provenance = replace(stack.provenance, weights_hash=UNSET, num_layers=UNSET)
    longer = DecoderStack(model, tokenizer=stack.tokenizer, provenance=provenance)
    longer.below = stack
    return longer


def check_fits(stack: DecoderStack, stage: Stage) -> None:
    """Check that a stage was made for this kind of model.

    Raises:
        ModelError: The layers have another class or width, or the head has another vocabulary.
    """
    made = stack.layers[-1]
    for layer in stage.layers:
        if type(layer) is not type(made):
            raise ModelError(
                f"expected a stage of {type(made).__name__}s, got {type(layer).__name__}s; train a "
                "stage for this model"
            )
    like = dict(stack.layers[stage.sources[-1] - 1].named_parameters())
    for name, value in stage.layers[-1].named_parameters():
        if name not in like or like[name].shape != value.shape:
            raise ModelError(
                f"the stage was made for another width ({name}: expected "
                f"{_shape_words(like.get(name))}, got {_shape_words(value)}); train a stage for "
                "this model"
            )
    if stage.head is not None:
        rows = next(iter(stage.head.parameters())).shape[0]
        if rows != stack.vocab_size:
            raise ModelError(
                f"the stage's head was made for another vocabulary (expected {stack.vocab_size} "
                f"tokens, got {rows}); train a stage for this model"
            )


def _lengthen(config: Any, sources: Sequence[int], depth: int) -> None:
    """Extend every per-layer list of a config by the entries of the layers `sources`."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(config, name, [*value, *(value[source - 1] for source in sources)])
    config.num_hidden_layers = depth + len(sources)


def _place(layer: nn.Module, number: int, config: Any) -> None:
    """Set a layer's index (from 0) in its modules. The index selects its KV cache entry."""
    for module in layer.modules():
        for name in ("layer_idx", "layer_id", "layer_number"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, number)
        if type(getattr(module, "config", None)) is type(config):
            vars(module)["config"] = config

"""Stages: decoder layers appended to a model, which start by changing nothing at all."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from cascade.core.errors import ModelError, UnsupportedModelError, UsageError
from cascade.core.schema import UNSET
from cascade.models.architecture import find_layers
from cascade.models.identity import add_to_digest
from cascade.models.stack import DecoderStack, LayerCall
from cascade.models.sublayers import last_products

#: From what a stage's layers start: copies of the layers before them, or random weights.
Start = Literal["copies", "fresh"]
STARTS = ("copies", "fresh")


@dataclass
class Stage:
    """Decoder layers of a model's own class that go on where its last layer ends.

    Attributes:
        layers: The layers, in fp32 while they are trained.
        sources: Per layer, the layer (from 1) of the model below whose kind it is of: some
            families alternate kinds of attention.
        start: What they started from.
        head: An LM head of its own; None: the model's, which stays as it is.
        provenance: How it was trained.
    """

    layers: nn.ModuleList
    sources: tuple[int, ...]
    start: Start = "copies"
    head: nn.Module | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def weights(self) -> dict[str, Tensor]:
        """Return every weight by name, each once."""
        parts = {"layers": self.layers} | ({} if self.head is None else {"head": self.head})
        return {
            f"{part}.{name}": value
            for part, module in parts.items()
            for name, value in module.state_dict().items()
        }

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over weights that `weights` returned, here or in another process.

        Raises:
            ModelError: Other names or shapes than this stage's.
        """
        own = self.weights()
        for name in sorted(own.keys() | weights.keys()):
            expected, got = own.get(name), weights.get(name)
            if expected is None or got is None or expected.shape != got.shape:
                raise ModelError(
                    f"the stage's weight {name}: expected {_shape_words(expected)}, got "
                    f"{_shape_words(got)}; take the stage that was saved with this configuration"
                )
        for name, value in own.items():
            value.copy_(weights[name])  # state_dict shares the weights themselves

    def fingerprint(self) -> str:
        """Return a SHA-256 over every weight: equal exactly when all of them are."""
        digest = hashlib.sha256()
        for name, value in self.weights().items():
            digest.update(name.encode())
            add_to_digest(digest, value)
        return f"sha256:{digest.hexdigest()}"

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what training changes."""
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
    """Return a stage for a model that, untrained, is the identity, exactly.

    Its layers are copies of the model's last ones, or drawn anew; either way the projections by
    which attention and MLP write to the residual stream are zero, so that the stage adds nothing
    until it has learned something (block expansion, Wu et al. 2024, arXiv 2401.02415).

    Args:
        stack: The model that it follows: a base, or a base with stages.
        num_layers: How many layers.
        start: "copies" or "fresh".
        own_head: Train a copy of the LM head too, which starts as the model's.
        seed: Of fresh weights.

    Raises:
        UsageError: More layers than the model has, or an unknown start.
        UnsupportedModelError: The family's layers are no identity with zeroed projections
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
        _zero_outputs(stack, source, layer)
    head = copy.deepcopy(stack.lm_head).float() if own_head else None
    stage = Stage(nn.ModuleList(layers), sources, start, head)
    for parameter in stage.parameters():
        parameter.requires_grad_(True)
    _check_identity(stack, stage)
    return stage


def check_depth(stack: DecoderStack, num_layers: int) -> None:
    """Refuse a stage of more layers than the model has to copy.

    Raises:
        UsageError: Names the range.
    """
    if not 1 <= num_layers <= stack.num_layers:
        raise UsageError(
            f"expected 1 to {stack.num_layers} layers for a stage, as many as the model has, got "
            f"{num_layers}"
        )


def _trainable(stack: DecoderStack, layer: nn.Module) -> nn.Module:
    if not all(type(value) is nn.Parameter for value in layer.parameters()) or not all(
        value.is_floating_point() for value in layer.state_dict().values()
    ):
        raise UnsupportedModelError(
            f"the layers of this {stack.model.config.model_type} are quantized, a stage of them "
            "cannot be trained; load the model in --dtype float32 or bfloat16"
        )
    return layer.float()


def _draw(stack: DecoderStack, layer: nn.Module) -> None:
    """Draw a layer's weights as the family does, and reset its norms."""
    for module in layer.modules():
        if hasattr(module, "_is_hf_initialized"):
            del module._is_hf_initialized
        for parameter in module.parameters(recurse=False):
            if hasattr(parameter, "_is_hf_initialized"):
                del parameter._is_hf_initialized
    with torch.no_grad():
        layer.apply(stack.model._init_weights)


@torch.no_grad()
def _zero_outputs(stack: DecoderStack, source: int, layer: nn.Module) -> None:
    """Zero the last product of the attention and the last product of the rest of a layer."""
    for module in last_products(layer, lambda: _run_once(stack, source, layer)):
        for parameter in module.parameters(recurse=False):
            parameter.zero_()


def _run_once(stack: DecoderStack, source: int, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Run a layer in fp32 on a few random states in the place of the one that it copies."""
    ids = torch.arange(8, device=stack.device).remainder(stack.vocab_size)[None]
    drawn = torch.randn((1, 8, stack.hidden_size), generator=torch.Generator().manual_seed(0))
    hidden = drawn.to(stack.device)
    return hidden, _computed(layer, hidden, stack.plan(ids).calls[source - 1])


def _computed(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """Run a layer in fp32: masks and rotary tables come in the model's dtype."""
    kwargs = {name: _in_fp32(value) for name, value in call.kwargs.items()}
    output = layer(hidden, *map(_in_fp32, call.args), **kwargs)
    computed: Tensor = output[0] if isinstance(output, tuple) else output
    return computed


def _in_fp32(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_in_fp32(part) for part in value)
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def _check_identity(stack: DecoderStack, stage: Stage) -> None:
    for source, layer in zip(stage.sources, stage.layers, strict=True):
        hidden, output = _run_once(stack, source, layer)
        if not torch.equal(hidden, output):
            raise UnsupportedModelError(
                f"a layer of {stack.model.config.model_type} changes its input even with its "
                "output projections zeroed (post-norm layers and mixtures of experts do), so a "
                "stage of such layers would not start as the identity"
            )


def run_stage(
    stack: DecoderStack, stage: Stage, input_ids: Tensor, states: Tensor, goes_on: Tensor
) -> Tensor:
    """Run a stage over stored states, as a cascade with frozen propagation would.

    Gradients pass to the stage's weights where they are enabled.

    Args:
        stack: The model that the stage follows; it prepares masks and positions, none of its
            layers is computed.
        stage: The stage, in fp32 or in the states' dtype.
        input_ids: `[B, T]`.
        states: `[B, T, D]`, what leaves the model's last layer.
        goes_on: `[B, T]`, true for tokens that enter the stage; the others stay at their states,
            to which those that enter attend.

    Returns:
        `[B, T, D]`, the states of the others unchanged.
    """
    calls = stack.plan(input_ids).calls
    hidden = states
    for source, layer in zip(stage.sources, stage.layers, strict=True):
        output = _computed(layer, hidden, calls[source - 1])
        hidden = torch.where(goes_on[..., None], output, states)
    return hidden


def extended(stack: DecoderStack, stage: Stage) -> DecoderStack:
    """Return the model with a stage's layers appended, itself a decoder stack.

    Every weight is shared with the model and the stage; neither is changed, and training the stage
    is seen here at once.

    Args:
        stack: The model, or a model with stages.
        stage: What follows.

    Raises:
        ModelError: The stage is of another width or vocabulary, or its weights are not finite.
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
    # Absent, because they are those of the model alone.
    about = replace(stack.provenance, weights_hash=UNSET, num_layers=UNSET)
    longer = DecoderStack(model, tokenizer=stack.tokenizer, provenance=about)
    longer.below = stack
    return longer


def check_fits(stack: DecoderStack, stage: Stage) -> None:
    """Refuse a stage that was made for another model.

    Raises:
        ModelError: Its layers are of another class or width, or its head of another vocabulary.
    """
    made = stack.layers[-1]
    for layer in stage.layers:
        if type(layer) is not type(made):
            raise ModelError(
                f"a stage of {type(layer).__name__}s cannot follow {type(made).__name__}s; train "
                "one for this model"
            )
    like = dict(stack.layers[stage.sources[-1] - 1].named_parameters())
    for name, value in stage.layers[-1].named_parameters():
        if name not in like or like[name].shape != value.shape:
            raise ModelError(
                f"the stage's {name} is {_shape_words(value)}, this model's "
                f"{_shape_words(like.get(name))}: it was made for another width; train one for "
                "this model"
            )
    if stage.head is not None:
        rows = next(iter(stage.head.parameters())).shape[0]
        if rows != stack.vocab_size:
            raise ModelError(
                f"the stage's head knows {rows} tokens, this model {stack.vocab_size}; train one "
                "for this model"
            )


def _lengthen(config: Any, sources: Sequence[int], depth: int) -> None:
    """Let a config say that layers like `sources` follow: its lists with one entry per layer."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(config, name, [*value, *(value[source - 1] for source in sources)])
    config.num_hidden_layers = depth + len(sources)


def _place(layer: nn.Module, number: int, config: Any) -> None:
    """Tell a layer's parts where it stands, counted from 0: that is its place in the KV cache."""
    for module in layer.modules():
        for name in ("layer_idx", "layer_id", "layer_number"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, number)
        if type(getattr(module, "config", None)) is type(config):
            vars(module)["config"] = config

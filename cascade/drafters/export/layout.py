"""The layout of an EAGLE-3 checkpoint of the library `speculators`: its config and its tensors."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import torch
from torch import Tensor

from cascade.core.provenance import ModelProvenance
from cascade.core.schema import to_plain
from cascade.drafters.network.drafter_network import embeddings_of
from cascade.drafters.network.eagle3_layer import ATTENTION, MLP, LayerConfig, layer_config_of
from cascade.drafters.network.eagle3_network import Eagle3Network
from cascade.drafters.stored import Drafter
from cascade.models.stack import DecoderStack

_DTYPE = torch.bfloat16


class Verifier(msgspec.Struct, frozen=True, kw_only=True):
    """The model that checks the drafts.

    Attributes:
        name_or_path: Its hub id or its folder.
        architectures: The classes that load it.
    """

    name_or_path: str
    architectures: list[str]


class Proposals(msgspec.Struct, frozen=True, kw_only=True):
    """How drafts are proposed: a chain of the likeliest tokens.

    Attributes:
        proposal_type: The kind.
        speculative_tokens: Tokens of a chain.
        verifier_accept_k: A draft is accepted if it is among so many of the model's tokens.
        accept_tolerance: Only above one of them: how far it may lie below the first.
    """

    proposal_type: str = "greedy"
    speculative_tokens: int
    verifier_accept_k: int = 1
    accept_tolerance: float = 0.0


class Speculation(msgspec.Struct, frozen=True, kw_only=True):
    """What a server does with the drafter.

    Attributes:
        algorithm: The algorithm.
        proposal_methods: Ways to propose tokens.
        default_proposal_method: The one to use.
        verifier: The model.
    """

    algorithm: str = "eagle3"
    proposal_methods: list[Proposals]
    default_proposal_method: str = "greedy"
    verifier: Verifier


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where an exported drafter comes from. Loaders ignore it.

    Attributes:
        version: The release of this package.
        command: The command that the user ran; None from Python.
        drafter: SHA-256 of the drafter's weights as they were trained.
        model: The model that the drafter belongs to.
        accepted: Acceptance by position on held-out texts, as in the drafter's record.
    """

    version: str
    command: str | None
    drafter: str
    model: ModelProvenance
    accepted: list[float]


class SpeculatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The content of config.json.

    Attributes:
        draft_vocab_size: Number of tokens that can be proposed.
        norm_before_residual: Whether the state is normed before it is added to what attention
            returns.
        norm_before_fc: Whether the inputs of the three layers are normed together.
        fc_norm: Whether they are normed one by one.
        norm_output: Whether a later step reads the normed state.
        target_hidden_size: The width of the model's states, if it is not that of the drafter's.
        eagle_aux_hidden_state_layer_ids: The states that are read, by the number of decoder layers
            before them: 0 is the embedding, and the input of layer l is l - 1.
        transformer_layer_config: The layer.
        speculators_config: What a server does with the drafter.
        cascade: Where it comes from.
    """

    architectures: list[str] = msgspec.field(default_factory=lambda: ["Eagle3DraftModel"])
    speculators_model_type: str = "eagle3"
    draft_vocab_size: int
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    embed_requires_grad: bool = False
    target_hidden_size: int | None = None
    eagle_aux_hidden_state_layer_ids: list[int]
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    transformer_layer_config: LayerConfig
    speculators_config: Speculation
    cascade: Origin

    def to_json(self) -> str:
        """Return the text of config.json."""
        plain = msgspec.to_builtins(self) | {"cascade": to_plain(self.cascade)}
        return json.dumps(plain, indent=2, allow_nan=False) + "\n"


def config_of(
    drafter: Drafter, stack: DecoderStack, verifier: str, origin: Origin
) -> SpeculatorConfig:
    """Return the config of an exported drafter.

    Args:
        drafter: The drafter, of architecture eagle3.
        stack: The model that it belongs to.
        verifier: The model's name or folder for the server.
        origin: Where the drafter comes from.
    """
    record = drafter.record
    classes = stack.model.config.architectures or [type(stack.model).__name__]
    return SpeculatorConfig(
        draft_vocab_size=len(drafter.tokens),
        eagle_aux_hidden_state_layer_ids=[layer - 1 for layer in record.feature_layers],
        transformer_layer_config=layer_config_of(stack, record.feature_layers),
        speculators_config=Speculation(
            proposal_methods=[Proposals(speculative_tokens=record.config.draft_steps)],
            verifier=Verifier(name_or_path=verifier, architectures=list(classes)),
        ),
        cascade=origin,
    )


def tensors_of(drafter: Drafter, stack: DecoderStack) -> dict[str, Tensor]:
    """Return the tensors of an exported drafter, weights in bfloat16.

    `d2t` and `t2d` are left out if the drafter can propose every token.

    Args:
        drafter: The drafter, of architecture eagle3.
        stack: The model that it belongs to.
    """
    network, tokens = drafter.network, drafter.tokens.cpu()
    assert isinstance(network, Eagle3Network)
    head: Any = stack.lm_head
    width = network.hidden_size
    # Powers of two: the product is exact.
    columns = network.scales.repeat_interleave(width)
    found = {
        "fc.weight": network.fc.weight * columns,
        "norm.weight": network.norm.weight,
        "lm_head.weight": head.weight.detach()[drafter.tokens.to(stack.device)],
        "embed_tokens.weight": embeddings_of(stack),
    }
    layer = _with_all_biases(network.layer.state_dict())
    found |= {f"layers.0.{name}": weight for name, weight in layer.items()}
    made = {name: each.detach().to(_DTYPE).cpu().contiguous() for name, each in found.items()}
    if len(tokens) < stack.vocab_size:
        made["d2t"] = tokens.long() - torch.arange(len(tokens))
        made["t2d"] = torch.zeros(stack.vocab_size, dtype=torch.bool)
        made["t2d"][tokens.long()] = True
    return made


def _with_all_biases(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's tensors, with zeros for the biases that a part of its projections lacks.

    One option of the config says whether there are biases in attention, another one in the MLP.
    """
    made = dict(layer)
    for group in (ATTENTION, MLP):
        if any(f"{name}.bias" in layer for name in group):
            for name in group:
                weight = layer[f"{name}.weight"]
                made.setdefault(f"{name}.bias", weight.new_zeros(len(weight)))
    return made

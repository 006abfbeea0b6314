"""The architectures of drafters."""

from __future__ import annotations

from collections.abc import Sequence

from cascade.drafters.config import Architecture
from cascade.drafters.network.drafter_network import CascadeNetwork, DrafterNetwork
from cascade.drafters.network.eagle3_layer import layer_config_of
from cascade.drafters.network.eagle3_network import Eagle3Network
from cascade.drafters.network.layers import check_can_draft
from cascade.models.stack import DecoderStack

_NETWORKS: dict[Architecture, type[DrafterNetwork]] = {
    "cascade": CascadeNetwork,
    "eagle3": Eagle3Network,
}


def check_architecture(
    architecture: Architecture, stack: DecoderStack, feature_layers: Sequence[int]
) -> None:
    """Check that a model can have a drafter of an architecture.

    Args:
        architecture: The architecture.
        stack: The model.
        feature_layers: The layers whose inputs are read, 1..N; the last one is copied.

    Raises:
        UnsupportedModelError: It cannot; the message says why.
        UsageError: The architecture reads another number of layers.
    """
    check_can_draft(stack)
    if architecture == "eagle3":
        layer_config_of(stack, feature_layers)


def new_network(
    architecture: Architecture, stack: DecoderStack, feature_layers: Sequence[int]
) -> DrafterNetwork:
    """Return an untrained network.

    Args:
        architecture: Its architecture.
        stack: The model.
        feature_layers: As for `DrafterNetwork`.
    """
    return _NETWORKS[architecture](stack, feature_layers)

"""The network of a drafter: one decoder layer of the model's own kind, and its inputs."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.core.errors import UsageError
from cascade.drafters.network.layers import Tables, attend, heads_of, output_of
from cascade.models.stack import DecoderStack
from cascade.stats.ridge import NormalEquations, rms_normalized

#: The penalty of the closed form, in units of the inputs' mean square.
FIT_STRENGTH = 1e-3


def usual_start_layer(num_layers: int) -> int:
    """Return the layer whose copy a drafter is by default: nine tenths up, 28 of 30."""
    return min(num_layers, round(0.9 * num_layers) + 1)


def feature_layers_of(num_layers: int, start: int) -> tuple[int, ...]:
    """Return the layers whose inputs a drafter reads: a low one, a middle one, and its own.

    Args:
        num_layers: The number of layers of the model.
        start: The layer whose copy the drafter is, 1..N.

    Example:
        >>> feature_layers_of(30, 28)
        (3, 16, 28)
    """
    if not 1 <= start <= num_layers:
        raise UsageError(
            f"expected --layer in 1..{num_layers}, the layers of the model, got {start}"
        )
    wanted = {round(num_layers / 15) + 1, round(num_layers / 2) + 1}
    return (*sorted(layer for layer in wanted if layer < start), start)


#: Computes a projection of rows `[R, inputs]`.
Linear = Callable[[nn.Linear, Tensor], Tensor]


def plain_linear(module: nn.Linear, rows: Tensor) -> Tensor:
    """Return the projection of rows `[..., inputs]`."""
    return functional.linear(rows, module.weight, module.bias)


@dataclass(frozen=True)
class FitRows:
    """Rows of a text that a network's input matrices are fitted on.

    Attributes:
        embedded: Embeddings of the tokens that follow the features, `[n, D]`.
        features: The model's states, `[n, F + 1, D]`, as for `first_input`.
        wanted: The input of the copied layer at the next position, `[n, D]`.
    """

    embedded: Tensor
    features: Tensor
    wanted: Tensor


class DrafterNetwork(nn.Module, abc.ABC):
    """One decoder layer that continues a text from the model's states.

    After the model has confirmed token t+1, the first step computes a state from its embedding and
    from the model's states at position t. Later steps compute a state from the embedding of the
    token that was drafted, and from the state before. The final norm and rows of the LM head turn
    a state into the logits of the token after it.

    Args:
        stack: The model; its layer and its final norm are copied.
        feature_layers: The layers whose inputs are read, 1..N, ascending. The last one is copied.

    Attributes:
        feature_layers: As above.
        hidden_size: The width of a state, D.
        layer: The layer.
        norm: The norm before the LM head.
        is_plain: Whether the layer is computed as one of the model's, so that it can be compiled.
    """

    is_plain: ClassVar[bool]

    layer: Any
    norm: Any

    def __init__(self, stack: DecoderStack, feature_layers: Sequence[int]) -> None:
        super().__init__()
        self.feature_layers = tuple(feature_layers)
        self.hidden_size = stack.hidden_size

    @abc.abstractmethod
    def first_input(
        self, embedded: Tensor, features: Tensor, linear: Linear = plain_linear
    ) -> Tensor:
        """Return the layer's input at a first step, `[..., inputs]`.

        Args:
            embedded: Embeddings of the tokens that follow the features, `[..., D]`.
            features: The model's states, `[..., F + 1, D]`: the inputs of `feature_layers`, then
                the last layer's normed output.
            linear: Computes projections, for rows `[R, inputs]`.
        """

    @abc.abstractmethod
    def next_input(self, embedded: Tensor, states: Tensor, linear: Linear = plain_linear) -> Tensor:
        """Return the layer's input at a later step, `[..., inputs]`.

        Args:
            embedded: Embeddings of the drafted tokens, `[..., D]`.
            states: The states that predicted them, `[..., D]`.
            linear: Computes projections, for rows `[R, inputs]`.
        """

    @abc.abstractmethod
    def heads(self, hidden: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's rotated queries and keys, and its values, as `heads_of` does.

        Args:
            hidden: The layer's input, `[B, T, inputs]`.
            tables: Cosines and sines of the tokens' positions.
        """

    @abc.abstractmethod
    def output(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output, `[B, T, D]`.

        Args:
            hidden: The layer's input, `[B, T, inputs]`.
            attended: What its attention heads return, `[B, heads, T, head_dim]`.
        """

    @abc.abstractmethod
    def fit(self, rows: Iterable[FitRows]) -> None:
        """Set the input matrices to the closed form that predicts the copied layer's next input.

        Args:
            rows: Rows of training texts.
        """

    def unroll(
        self, embedded: Tensor, features: Tensor, tables: Tables, steps: int
    ) -> list[Tensor]:
        """Return the states of each step, `[B, T, D]`, as they are when every draft is accepted.

        Row t of step s belongs to a chain that began with the model's states at position t - s. So
        the first s rows of a step belong to no chain. A chain attends to the first steps of the
        positions up to its beginning, and to its own later steps, as it does when it decodes.

        Args:
            embedded: Embeddings of the tokens at positions 1 to T, `[B, T, D]`.
            features: The model's states at positions 0 to T - 1, `[B, T, F + 1, D]`.
            tables: Cosines and sines of positions 0 to T - 1.
            steps: The number of steps.
        """
        states: list[Tensor] = []
        past: list[tuple[Tensor, Tensor]] = []
        for step in range(steps):
            if step == 0:
                hidden = self.first_input(embedded, features)
            else:
                hidden = self.next_input(embedded, states[-1].roll(1, dims=1))
            queries, keys, values = self.heads(hidden, tables)
            past.append((keys, values))
            if step == 0:
                attended = attend(self.layer, queries, keys, values, None)
            else:
                attended = _attend_as_chains(queries, past, self.layer.self_attn.scaling)
            states.append(self.output(hidden, attended))
        return states


class CascadeNetwork(DrafterNetwork):
    """A copy of a layer as it is. Embeddings and states are projected to its input, `[..., D]`.

    The last layer's normed output is read as well.

    Args:
        stack: As for `DrafterNetwork`.
        feature_layers: As for `DrafterNetwork`.
    """

    is_plain = True

    def __init__(self, stack: DecoderStack, feature_layers: Sequence[int]) -> None:
        super().__init__(stack, feature_layers)
        width = self.hidden_size
        options: dict[str, Any] = {"device": stack.device, "dtype": torch.float32}
        self.embedding_in = nn.Linear(width, width, **options)
        self.features_in = nn.Linear(
            (len(feature_layers) + 1) * width, width, bias=False, **options
        )
        self.embedding_next = nn.Linear(width, width, **options)
        self.state_next = nn.Linear(width, width, bias=False, **options)
        for linear in (self.embedding_in, self.features_in, self.embedding_next, self.state_next):
            for weight in linear.parameters():
                nn.init.zeros_(weight)
        self.layer = trainable_copy(stack.layers[self.feature_layers[-1] - 1])
        decoder: Any = stack.decoder
        self.norm = trainable_copy(decoder.norm)

    def first_input(
        self, embedded: Tensor, features: Tensor, linear: Linear = plain_linear
    ) -> Tensor:
        """Return the layer's input at a first step; see `DrafterNetwork`."""
        dtype = self.features_in.weight.dtype
        own, read = rms_normalized(embedded), rms_normalized(features).flatten(-2)
        return linear(self.embedding_in, own.to(dtype)) + linear(self.features_in, read.to(dtype))

    def next_input(self, embedded: Tensor, states: Tensor, linear: Linear = plain_linear) -> Tensor:
        """Return the layer's input at a later step; see `DrafterNetwork`."""
        dtype = self.state_next.weight.dtype
        own, last = rms_normalized(embedded), rms_normalized(states)
        return linear(self.embedding_next, own.to(dtype)) + linear(self.state_next, last.to(dtype))

    def heads(self, hidden: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values; see `DrafterNetwork`."""
        return heads_of(self.layer, hidden, tables)

    def output(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's output; see `DrafterNetwork`."""
        return output_of(self.layer, hidden, attended)

    @torch.no_grad()
    def fit(self, rows: Iterable[FitRows]) -> None:
        """Fit the matrices of first and of later steps; see `DrafterNetwork`."""
        width, layers = self.hidden_size, len(self.feature_layers)
        device = self.features_in.weight.device
        first = NormalEquations((layers + 2) * width, width, device=device)
        later = NormalEquations(2 * width, width, device=device)
        for each in rows:
            embedded, read = rms_normalized(each.embedded), rms_normalized(each.features)
            first.update(torch.cat([embedded, read.flatten(1)], dim=1), each.wanted)
            # The input of the layer is the last of those that are read.
            later.update(torch.cat([embedded, read[:, layers - 1]], dim=1), each.wanted)
        for sums, of_token, of_states in (
            (first, self.embedding_in, self.features_in),
            (later, self.embedding_next, self.state_next),
        ):
            weight, bias = sums.solve(FIT_STRENGTH)
            of_token.weight.copy_(weight[:width].T)
            of_token.bias.copy_(bias)
            of_states.weight.copy_(weight[width:].T)


def trainable_copy(module: nn.Module) -> nn.Module:
    """Return a copy in fp32 whose weights can be trained.

    Args:
        module: The module.
    """
    made = copy.deepcopy(module).float()
    for weight in made.parameters():
        weight.requires_grad_(True)
    return made


def _attend_as_chains(
    queries: Tensor, past: Sequence[tuple[Tensor, Tensor]], scale: float
) -> Tensor:
    """Return the attention of a later step, whose chains began that many positions before.

    Args:
        queries: `[B, heads, T, head_dim]`.
        past: Keys and values `[B, key heads, T, head_dim]` of all steps, including this one.
        scale: Factor of the scores.
    """
    step, length = len(past) - 1, queries.shape[2]
    repeats = queries.shape[1] // past[0][0].shape[1]
    (keys, values), *later = [
        (keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1))
        for keys, values in past
    ]
    places = torch.arange(length, device=queries.device)
    hidden = places[None, :] > places[:, None] - step
    scores = (queries @ keys.transpose(-1, -2)).float().masked_fill(hidden, float("-inf"))
    # A chain's own keys lie on diagonals: step e of it is step - e rows before this one.
    own = [
        ((queries * key.roll(step - at, dims=2)).sum(-1, keepdim=True).float())
        for at, (key, _) in enumerate(later, start=1)
    ]
    shares = functional.softmax(torch.cat([scores, *own], -1) * scale, dim=-1).to(values.dtype)
    attended: Tensor = shares[..., :length] @ values
    for at, (_, value) in enumerate(later, start=1):
        share = shares[..., length + at - 1 : length + at]
        attended = attended + share * value.roll(step - at, dims=2)
    return attended


def embeddings_of(stack: DecoderStack) -> Tensor:
    """Return the embeddings of all tokens, `[V, D]`.

    Args:
        stack: The model.
    """
    module: Any = stack.model.get_input_embeddings()
    weight: Tensor = module.weight.detach()
    return weight


class DraftHead:
    """Some rows of a model's LM head, for the tokens that a drafter can propose.

    Args:
        stack: The model.
        tokens: The tokens, in the order of the rows, `[V']`.
        dtype: The dtype of the rows.

    Attributes:
        tokens: As above.
    """

    def __init__(self, stack: DecoderStack, tokens: Tensor, dtype: torch.dtype) -> None:
        self._stack, self._dtype = stack, dtype
        self.tokens = tokens.to(stack.device, torch.long)
        self.rows = self._rows(self.tokens)

    def _rows(self, tokens: Tensor) -> nn.Linear:
        head: Any = self._stack.lm_head
        made = nn.Linear(head.in_features, len(tokens), head.bias is not None, device="meta")
        for name, own in head.named_parameters():
            rows = own.detach()[tokens].to(self._dtype)
            setattr(made, name, nn.Parameter(rows, requires_grad=False))
        return made

    def logits(self, normed: Tensor, linear: Linear = plain_linear) -> Tensor:
        """Return the logits of the tokens, `[..., V']`.

        Args:
            normed: Normed states, `[..., D]`.
            linear: Computes the projection, for rows `[R, D]`.
        """
        return linear(self.rows, normed)

    def of_others(self, others: Sequence[int]) -> DraftHead | None:
        """Return a head with the rows of those tokens that this one lacks, each once, if any.

        Args:
            others: The tokens.
        """
        known = set(self.tokens.tolist())
        new = [token for token in dict.fromkeys(others) if token not in known]
        return DraftHead(self._stack, torch.tensor(new), self._dtype) if new else None

    def with_tokens(self, others: Sequence[int]) -> DraftHead:
        """Return a head that also has the rows of other tokens, each once, behind its own."""
        new = self.of_others(others)
        if new is None:
            return self
        return DraftHead(self._stack, torch.cat([self.tokens, new.tokens]), self._dtype)

"""The rows of a generation while they grow, and the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cascade.decoding.forward import Chunk
from cascade.decoding.generation_settings import DecodingConfig
from cascade.models.flops import Counts
from cascade.models.stack import DecoderStack

if TYPE_CHECKING:
    from transformers.generation.stopping_criteria import StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Generation:
    """The result of a generation.

    Attributes:
        sequences: Token ids, `[B, T + new]`; rows that ended earlier are padded.
        exit_layers: The layer whose logits each new token was chosen from, `[B, new]`: an exit
            layer or N; 0 after the end of a row.
        counts: The work that was actually computed, including the prompt.
        passed: Tokens of open rows that the first layer computed, including the prompt.
        drafted: Tokens that were guessed, with verification.
        accepted: Drafted tokens that the full model confirmed.
        passes: Passes of the full model behind the prompt, with verification.
        sources: For each new token that was drafted, the number of its proposer in `proposers` plus
            1; 0 for tokens that were not drafted, `[B, new]`. None without verification.
        proposers: The proposers of drafts.
        proposed: How many tokens of drafts each proposer guessed, in the order of `proposers`.
        positions: For the first, second, ... place of a draft: the number of drafts with a token
            there, and of those whose token there was confirmed; with verification.
        engine: What computed the layers, e.g. "compiled" or "model (REASON)"; with verification.
        pass_costs: The milliseconds of a pass over 1, 2, ... tokens that decided how much was
            drafted, as `EarlyExit.generate` takes them; with verification.
        trees: Whether drafts could be trees; otherwise they were chains.
    """

    sequences: Tensor
    exit_layers: Tensor
    counts: Counts
    passed: int
    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    sources: Tensor | None = None
    proposers: tuple[str, ...] = ()
    proposed: tuple[int, ...] = ()
    positions: tuple[tuple[int, int], ...] = ()
    engine: str | None = None
    pass_costs: tuple[float, ...] = ()
    trees: bool = False

    def with_drafts(
        self,
        passes: int,
        sources: Tensor,
        proposed: Mapping[str, int],
        positions: Sequence[tuple[int, int]],
        engine: str,
    ) -> Generation:
        """Return the generation with how it was drafted; the arguments are attributes.

        Args:
            passes: As the attribute.
            sources: As the attribute.
            proposed: As the attribute, by proposer.
            positions: As the attribute.
            engine: As the attribute.
        """
        return replace(
            self,
            passes=passes,
            sources=sources,
            proposers=tuple(proposed),
            proposed=tuple(proposed.values()),
            positions=tuple(positions),
            engine=engine,
        )

    @property
    def tokens_per_pass(self) -> float:
        """New tokens of all rows per pass behind the prompt; 0 without verification."""
        # The first token of a row comes from the prompt's pass.
        new = int((self.exit_layers > 0).sum()) - len(self.sequences)
        return new / self.passes if self.passes else 0.0

    @property
    def layers_per_token(self) -> float:
        """Layers actually computed per token, including the prompt."""
        return sum(self.counts.layer_rows) / self.passed


class Token(NamedTuple):
    """A chosen token and the layer whose logits it was chosen from."""

    token: int
    layer: int


class GrowingText:
    """The growing rows: their tokens, how many are confirmed, and which rows have ended.

    Attributes:
        ids: Token ids including drafts, `[B, capacity]`.
        confirmed: The number of final columns of each row.
    """

    def __init__(
        self,
        stack: DecoderStack,
        prompt: Chunk,
        config: DecodingConfig,
        capacity: int,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
    ) -> None:
        self.stack, self.config, self.streamer = stack, config, streamer
        self.capacity, self.criteria = capacity, criteria
        batch, self.prompt = prompt.ids.shape
        self.ids = torch.full((batch, self.capacity), config.filling, device=prompt.ids.device)
        self.ids[:, : self.prompt] = prompt.ids
        self.layers = torch.zeros_like(self.ids)
        self.confirmed = [self.prompt] * batch
        self.ended = [False] * batch
        self.mask = prompt.attention_mask
        self.first = self.prompt - prompt.valid.sum(dim=1)
        if streamer is not None:
            streamer.put(prompt.ids.cpu())

    @property
    def open_rows(self) -> list[int]:
        """The rows that have not ended."""
        return [row for row, ended in enumerate(self.ended) if not ended]

    def add(self, column: int, chosen: Mapping[int, Token]) -> None:
        """Append confirmed tokens to rows that have not ended, and end rows.

        Args:
            column: The next column of these rows.
            chosen: The token of each row.
        """
        if not chosen:
            return
        rows = sorted(chosen)
        tokens = torch.tensor([chosen[row].token for row in rows], device=self.ids.device)
        layers = [chosen[row].layer for row in rows]
        if len(rows) == len(self.ended) and len(set(layers)) == 1:  # the usual case, in less time
            self.ids[:, column], self.layers[:, column] = tokens, layers[0]
        else:
            self.ids[rows, column] = tokens
            self.layers[rows, column] = torch.tensor(layers, device=self.ids.device)
        is_full = column + 1 == self.capacity
        for row in rows:
            token = chosen[row].token
            self.confirmed[row] = column + 1
            is_end = token in self.config.eos_token_id
            self.ended[row] = is_full or is_end or self._has_stop_string(row)
            if self.streamer is not None and len(self.ended) == 1:
                self.streamer.put(torch.tensor([token]))
        if self.criteria:
            stopped = self.criteria(self.ids[:, : column + 1], None)
            for row in chosen:
                self.ended[row] = self.ended[row] or bool(stopped[row])

    def _has_stop_string(self, row: int) -> bool:
        """Return whether the newest token of a row completes a stop string."""
        if not self.config.stop_strings or self.stack.tokenizer is None:
            return False
        # As in transformers, a stop string may begin in the prompt. A token has at least one byte.
        stops, end = self.config.stop_strings, self.confirmed[row]
        longest = max(len(stop.encode()) for stop in stops)
        start = max(int(self.first[row]), self.prompt - longest)
        decode = self.stack.tokenizer.decode
        before = str(decode(self.ids[row, start : self.prompt].tolist())).rstrip("\ufffd")
        text = str(decode(self.ids[row, start:end].tolist()))
        return any(stop in text[max(0, len(before) - len(stop) + 1) :] for stop in stops)

    def row_mask(self, rows: Sequence[int]) -> Tensor:
        """Return a mask of some rows, `[B, 1]`."""
        mask = torch.zeros((len(self.ended), 1), dtype=torch.bool, device=self.ids.device)
        mask[list(rows)] = True
        return mask

    def chunk(self, start: int, stop: int) -> Chunk:
        """Return columns start to stop - 1."""
        columns = torch.arange(start, stop, device=self.ids.device)
        positions = (columns - self.first[:, None]).clamp_min(0)
        ended = torch.tensor(self.ended, device=self.ids.device)[:, None]
        mask = self.mask
        if mask is not None:
            new = mask.new_ones((len(mask), max(0, stop - mask.shape[1])))
            mask = torch.cat([mask, new], dim=1)[:, :stop]
        return Chunk(
            self.ids[:, start:stop], (columns >= self.first[:, None]) & ~ended, positions, mask
        )

    def result(self, counts: Counts, passed: int, drafted: int, accepted: int) -> Generation:
        """Return the generation without the columns that no row reached."""
        stop = max(self.confirmed)
        for row, confirmed in enumerate(self.confirmed):
            self.ids[row, confirmed:] = self.config.filling
        if self.streamer is not None:
            self.streamer.end()
        return Generation(
            self.ids[:, :stop].clone(),
            self.layers[:, self.prompt : stop].clone(),
            counts,
            passed,
            drafted,
            accepted,
        )

"""Choice of the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.decoding.generation_settings import DecodingConfig
from cascade.decoding.processors import BatchProcessors


class TokenChooser:
    """Chooses the next token from logits; random choices depend only on seed, row and column.

    Args:
        config: Whether to sample.
        processors: Change the logits first.
    """

    def __init__(self, config: DecodingConfig, processors: BatchProcessors) -> None:
        self.config, self.processors = config, processors
        self.generator = torch.Generator()

    def __call__(
        self, ids: Tensor, logits: Tensor, rows: Sequence[int], columns: Sequence[int]
    ) -> Tensor:
        """Return the chosen tokens, `[n]`.

        Args:
            ids: Token ids of the batch, `[B, capacity]`, with the tokens before those chosen.
            logits: `[n, V]`.
            rows: The row of each token.
            columns: The column that each token will have in its row.

        Raises:
            UsageError: A setting is invalid, or no token is left to choose.
        """
        scores = self._processed(ids, logits, rows, columns) if self.processors else logits
        if not self.config.do_sample:
            return scores.argmax(dim=-1)
        # The argmax of log-probabilities plus Gumbel noise is a sample (Gumbel 1954). Seed, row and
        # column determine the noise. An exit and the full model therefore choose the same token if
        # their logits agree, and verification can compare tokens.
        noise = torch.stack(
            [self._noise(scores.shape[1], *key) for key in zip(rows, columns, strict=True)]
        )
        return (scores + noise.to(scores.device)).argmax(dim=-1)

    def _processed(
        self, ids: Tensor, logits: Tensor, rows: Sequence[int], columns: Sequence[int]
    ) -> Tensor:
        scores = torch.empty_like(logits)
        for column in sorted(set(columns)):
            places = [place for place, other in enumerate(columns) if other == column]
            scores[places] = self.processors(
                ids, logits[places], [rows[place] for place in places], column
            )
        return scores

    def _noise(self, size: int, row: int, column: int) -> Tensor:
        mixed = (self.config.seed * 1_000_003 + row) * 1_000_003 + column
        self.generator.manual_seed(mixed % 2**63)
        exponential = torch.empty(size).exponential_(generator=self.generator)
        return -exponential.clamp_min(1e-30).log()

"""Choice of the next token from logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.decoding.generation_settings import DecodingConfig


class TokenChooser:
    """Chooses the next token from logits; random choices depend only on seed, row and column.

    Args:
        config: Whether and how to sample.
    """

    def __init__(self, config: DecodingConfig) -> None:
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self.config = config
        self.generator = torch.Generator()
        self.warpers = LogitsProcessorList()
        if config.temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            self.warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(config.top_p))

    def __call__(self, logits: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Return the chosen tokens, `[n]`.

        Args:
            logits: `[n, V]`.
            rows: The row of each token.
            columns: The column that each token will have in its row.
        """
        if not self.config.do_sample:
            return logits.argmax(dim=-1)
        scores = self.warpers(None, logits)  # type: ignore[arg-type]
        # The argmax of log-probabilities plus Gumbel noise is a sample (Gumbel 1954). Seed, row and
        # column determine the noise. An exit and the full model therefore choose the same token if
        # their logits agree, and verification can compare tokens.
        noise = torch.stack(
            [self._noise(scores.shape[1], *key) for key in zip(rows, columns, strict=True)]
        )
        return (scores + noise.to(scores.device)).argmax(dim=-1)

    def _noise(self, size: int, row: int, column: int) -> Tensor:
        mixed = (self.config.seed * 1_000_003 + row) * 1_000_003 + column
        self.generator.manual_seed(mixed % 2**63)
        exponential = torch.empty(size).exponential_(generator=self.generator)
        return -exponential.clamp_min(1e-30).log()

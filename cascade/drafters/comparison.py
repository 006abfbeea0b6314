"""What drafts are worth on this machine: held-out prompts, decoded with and without them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.growing_text import Generation
from cascade.drafters.proposer import TrainedDrafter
from cascade.drafters.records import METHODS, Method, MethodFigures
from cascade.drafters.stored import Drafter
from cascade.drafters.texts.batches import GeneratedText
from cascade.models.stack import DecoderStack

#: The most texts that are decoded, and the most new tokens of each.
TEXTS, _NEW_TOKENS = 16, 64


def compare_methods(
    stack: DecoderStack, drafter: Drafter, texts: Sequence[GeneratedText]
) -> tuple[list[MethodFigures], Method]:
    """Continue prompts in all ways, one after the other for each prompt.

    Args:
        stack: The model.
        drafter: The drafter.
        texts: Texts whose prompts are continued, at most `TEXTS` of them.

    Returns:
        The figures of each way, and the fastest way.
    """
    early = EarlyExit(stack)
    ways: dict[Method, dict[str, Any]] = {
        "none": {},
        "lookup": {"verify": True},
        "table": {"verify": True, "drafter": drafter.table},
        "table and network": {
            "verify": True,
            "drafter": TrainedDrafter(stack, drafter, network=True),
        },
    }
    seconds: dict[Method, list[float]] = {method: [] for method in METHODS}
    tokens: dict[Method, list[tuple[int, int]]] = {method: [] for method in METHODS}
    for number, text in enumerate(texts[:TEXTS]):
        ids = text.ids[None, : text.prompt].long().to(stack.device)

        length = min(text.new_tokens, _NEW_TOKENS)

        def run(
            method: Method, ids: torch.Tensor = ids, length: int = length
        ) -> tuple[float, Generation]:
            return _timed(lambda: _continued(early, ids, length, ways[method]))

        if not number:  # engines and costs are measured on first use
            for method in METHODS:
                run(method)
        for method in METHODS:
            took, made = run(method)
            new = made.sequences.shape[1] - ids.shape[1]
            seconds[method].append(took / new)
            # The prompt's pass gives the first token.
            tokens[method].append((new - 1, made.passes or new - 1))
    rows = [
        MethodFigures(
            method=method,
            tokens_per_pass=_ratio(tokens[method]),
            milliseconds=1e3 * statistics.median(seconds[method]),
            speed=statistics.median(
                before / after
                for before, after in zip(seconds["none"], seconds[method], strict=True)
            ),
        )
        for method in METHODS
    ]
    return rows, max(rows, key=lambda row: row.speed).method


def _continued(
    early: EarlyExit, ids: torch.Tensor, length: int, settings: dict[str, Any]
) -> Generation:
    made = early.generate(
        ids,
        torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=False,
        return_dict_in_generate=True,
        **settings,
    )
    assert isinstance(made, Generation)
    return made


def _timed(run: Callable[[], Generation]) -> tuple[float, Generation]:
    start = time.perf_counter()
    made = run()
    return time.perf_counter() - start, made


def _ratio(counts: Sequence[tuple[int, int]]) -> float:
    """Return tokens per pass over all texts; 1 where none has a second token."""
    tokens, passes = (sum(column) for column in zip(*counts, strict=True))
    return tokens / passes if passes else 1.0

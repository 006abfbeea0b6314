"""The variants of the benchmark: which are timed where."""

from __future__ import annotations

import pytest
import torch
from support.generating import NEW, PROMPT
from support.graphed import graphed, new_stack
from support.recorded_graphs import RecordedGraphs

from cascade.benchmarks.lossless.variants import (
    DecodingVariant,
    PromptBatch,
    find_reasons,
    variants_of,
)
from cascade.models.stack import DecoderStack


def graphs_of(stack: DecoderStack, monkeypatch: pytest.MonkeyPatch) -> dict[str, DecodingVariant]:
    """Return the variants by graphs, which are those that a CPU does not have."""
    on_cpu = variants_of(stack, None, compiled=False)
    with monkeypatch.context() as patched:
        patched.setattr(DecoderStack, "device", torch.device("cuda"))
        # Other variants choose what computes them when they are made.
        patched.setattr("cascade.benchmarks.lossless.variants.EarlyExit", lambda *_, **__: None)
        on_cuda = variants_of(stack, None, compiled=False)
    return {name: each for name, each in on_cuda.items() if name not in on_cpu}


def a_batch(rows: int = 1) -> PromptBatch:
    return PromptBatch(PROMPT[:rows], torch.ones_like(PROMPT[:rows]), NEW, 64)


def test_graphs_are_variants_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = new_stack("llama")
    found = graphs_of(stack, monkeypatch)
    assert list(found) == ["graphs", "graphs-lookup"]
    graphed(stack, RecordedGraphs())  # as on CUDA
    own = variants_of(stack, None, compiled=False)["generate"]
    for rows in (1, 3):
        expected = own.run(a_batch(rows)).sequences
        for variant in found.values():
            assert variant.run(a_batch(rows)).sequences.equal(expected)


def test_graphs_are_not_timed_where_other_passes_take_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = graphs_of(new_stack("llama"), monkeypatch)
    reasons = find_reasons({"graphs": found["graphs"]}, a_batch())
    assert str(reasons["graphs"]).startswith("expected passes by graphs, got passes of a fixed")
    mistral = graphs_of(new_stack("mistral"), monkeypatch)
    reasons = find_reasons({"graphs": mistral["graphs"]}, a_batch())
    assert "the graphs engine does not support this model" in str(reasons["graphs"])

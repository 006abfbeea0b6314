"""The area under the ROC curve matches scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from cascade.stats.auroc import auroc


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=40),
    st.sampled_from([np.float32, np.float64]),
)
def test_auroc_matches_scikit_learn(tokens: list[tuple[int, bool]], dtype: Any) -> None:
    values = np.array([value for value, _ in tokens], dtype=dtype)
    agrees = np.array([right for _, right in tokens])
    if agrees.all() or not agrees.any():
        assert auroc(values, agrees) is None
    else:
        assert auroc(values, agrees) == pytest.approx(roc_auc_score(agrees, values), abs=1e-12)


def test_auroc_accepts_any_shape() -> None:
    rng = np.random.default_rng(0)
    agrees = rng.random((50, 40)) < 0.7
    values = (agrees + rng.normal(size=agrees.shape)).round(1).astype(np.float32)
    expected = roc_auc_score(agrees.ravel(), values.ravel())
    assert auroc(values, agrees) == pytest.approx(expected, abs=1e-12)
    assert 0.6 < expected < 0.9

"""Early exit keeps the stored budgets of quality and speed."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.budgets
def test_budgets(exit_budget: Any, cascade_evaluation: Any) -> None:
    """Measure the stored points again and hold them to their budgets."""
    exit_budget.check(cascade_evaluation)

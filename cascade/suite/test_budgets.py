"""Check that early exit stays within its stored budgets of quality and speed."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.budgets
def test_budgets(exit_budget: Any, cascade_evaluation: Any) -> None:
    """Measure the stored operating points again and check them against their budgets.

    Skipped in a project that stores no budgets.
    """
    exit_budget.check(cascade_evaluation, required=False)

"""Check that the model's saturation profile has not drifted from its stored baseline."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.saturation
def test_saturation(saturation_baseline: Any, cascade_profile: Any) -> None:
    """Compare the model with its baseline on as few tokens as possible."""
    saturation_baseline.check(cascade_profile)

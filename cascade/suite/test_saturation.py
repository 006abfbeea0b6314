"""The model's saturation is as its stored baseline."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.saturation
def test_saturation(saturation_baseline: Any, cascade_profile: Any) -> None:
    """Hold the model to its baseline, on as few tokens as decide."""
    saturation_baseline.check(cascade_profile)

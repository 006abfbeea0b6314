"""Checks of seeds."""

from __future__ import annotations

from typing import Any

import pytest

from cascade.core import arguments
from cascade.core.errors import UsageError


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "1", None, True])
def test_seed_out_of_range_is_rejected(seed: Any) -> None:
    arguments.check_seed(2**63 - 1)
    with pytest.raises(UsageError, match=rf"expected a seed in 0\.\.{2**63 - 1}, got "):
        arguments.check_seed(seed)

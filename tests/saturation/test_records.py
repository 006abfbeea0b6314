"""Stored profiles are read as typed records and written again with the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paths import BASELINES

from cascade.core.records import read_typed, to_json
from cascade.core.schema import to_plain
from cascade.saturation.records import ProfileRecord

STORED = sorted(BASELINES.glob("*/*.saturation.json"))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name)
def test_stored_profile_is_written_again_with_the_same_bytes(path: Path) -> None:
    record = read_typed(path, ProfileRecord)
    assert to_json(to_plain(record)) + "\n" == path.read_text(encoding="utf-8")

"""What a baseline of an earlier release cannot be checked for, as a note of one line."""

from __future__ import annotations

from pathlib import Path

from cascade.core.records import has_hash, read_plain
from cascade.core.schema import UNSET, known
from cascade.gate.records import BudgetsRecord
from cascade.saturation.records import ProfileRecord


def profile_note(baseline: ProfileRecord) -> str | None:
    """Return what a profile of an earlier release lacks; None for one of this release's schema.

    Args:
        baseline: The stored profile.
    """
    if baseline.schema >= ProfileRecord.SCHEMA and not _lacks_parts(baseline):
        return None
    missing = []
    if baseline.hash is UNSET:
        missing.append("whether it was edited (it has no hash)")
    if known(baseline.noise) is None:
        missing.append("how much its machine rounds (it has no noise floor)")
    if baseline.parts is UNSET:
        missing.append("which weights and settings differ (it has no summary of them)")
    of = f" (schema {baseline.schema})" if baseline.schema < ProfileRecord.SCHEMA else ""
    return _note(f"the baseline is of an earlier release{of}", missing)


def _lacks_parts(baseline: ProfileRecord) -> bool:
    """Return whether a baseline has a noise floor, and not the parts that are stored with it."""
    return baseline.parts is UNSET and known(baseline.noise) is not None


def budgets_note(path: Path) -> str | None:
    """Return what the budgets of an earlier release lack; None if they lack nothing.

    Args:
        path: The budget file.

    Raises:
        RecordError: It is missing, torn or edited, or has a newer schema.
    """
    record = read_plain(path, BudgetsRecord)
    if has_hash(record):
        return None
    missing = ["whether they were edited (they have no hash)"]
    if "lossless" not in record:
        missing.append("lossless decoding (they have no budget of it)")
    return _note("the budgets are of an earlier release", missing)


def _note(what: str, missing: list[str]) -> str | None:
    if not missing:
        return None
    listed = ", and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
    return f"{what}; not checked: {listed}; accept a new run to check this too"

"""What came of a whole test session, as one record: from it every report is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Record = dict[str, Any]

#: Verdicts, the worst first.
ORDER = ("FAIL", "NOT COMPARABLE", "INCONCLUSIVE", "PASS")


def session_record(
    comparisons: Iterable[Mapping[str, Any]],
    budgets: Iterable[Mapping[str, Any]] = (),
    missing: Iterable[Mapping[str, Any]] = (),
    regenerated: Iterable[str] = (),
    unused: Iterable[str] = (),
) -> Record:
    """Return a session as a record of kind `report`.

    Args:
        comparisons: Records of kind `comparison`, each with `name` ("<model>/<corpus>") and `path`
            of its baseline.
        budgets: `name`, `path`, `verdict`, `points` (how many), `overruns` (each with `point`,
            `figure`, `limit`, `measured`, `command`) and `reason` (why it could not be compared).
        missing: Baselines that are not there: `path`, and the `command` that makes one.
        regenerated: Paths of baselines that were made anew.
        unused: Paths of baselines that no test used.

    Returns:
        The record. Its verdict is the worst of all; what is missing fails, and a session that
        held nothing to a baseline, or to one that it has just made, has decided nothing.
    """
    record: Record = {
        "schema": 1,
        "kind": "report",
        "verdict": "",
        "comparisons": [dict(comparison) for comparison in comparisons],
        "budgets": [dict(budget) for budget in budgets],
        "missing": [dict(baseline) for baseline in missing],
        "regenerated": list(regenerated),
        "unused": list(unused),
    }
    found = {part["verdict"] for part in (*record["comparisons"], *record["budgets"])}
    if record["missing"]:
        found.add("FAIL")
    if record["regenerated"] or not found:
        found.add("INCONCLUSIVE")
    record["verdict"] = min(found, key=ORDER.index)
    return record

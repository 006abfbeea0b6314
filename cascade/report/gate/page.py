"""One self-contained HTML page of a session: a map of every cell, the profiles, the worst cells."""

from __future__ import annotations

from cascade.gate.records import SessionRecord
from cascade.report.common.sections import html_page
from cascade.report.gate.sections import session_report

#: How many of the worst cells are listed; the map has them all.
_WORST = 25


def report_page(record: SessionRecord) -> str:
    """Return a session as one self-contained HTML page: nothing is loaded, no script runs.

    Args:
        record: A record of kind `report`.
    """
    return html_page(session_report(record, worst=_WORST, drawn=True))

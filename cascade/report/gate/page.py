"""A session as one self-contained HTML page: map of all cells, profiles, worst cells."""

from __future__ import annotations

from cascade.gate.records import SessionRecord
from cascade.report.common.sections import html_page
from cascade.report.gate.sections import session_report

#: The number of listed worst cells; the map shows all cells.
_WORST = 25


def report_page(record: SessionRecord) -> str:
    """Return a session as one self-contained HTML page, which loads nothing and runs no script.

    Args:
        record: A record of kind `report`.
    """
    return html_page(session_report(record, worst=_WORST, drawn=True))

"""A saturation profile as one self-contained HTML page."""

from __future__ import annotations

from cascade.report.common.records import Arrays
from cascade.report.common.sections import html_page
from cascade.report.saturation.figures import density_svg, layer_profile_svg
from cascade.report.saturation.wording import profile_report
from cascade.saturation.records import ProfileRecord


def profile_page(
    record: ProfileRecord, arrays: Arrays, *, pictures: tuple[str, str] | None = None
) -> str:
    """Return a profile as one self-contained HTML page, which loads nothing and runs no script.

    Args:
        record: The profile's record.
        arrays: Its arrays, as for `density_svg`.
        pictures: The results of `layer_profile_svg` and `density_svg`, if already drawn.

    Raises:
        ValueError: The record has another schema or no layers, or the arrays do not belong to it.
    """
    drawn = pictures or (layer_profile_svg(record), density_svg(record, arrays))
    return html_page(profile_report(record, drawn))

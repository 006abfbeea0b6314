"""Terminal tables, figures and pages, all drawn from saved records.

Nothing is measured here: numbers are formatted, scaled to pixels, or rebinned for display.
"""

from cascade.report.benchmarks import print_bench
from cascade.report.figures import density_svg, layer_profile_svg
from cascade.report.page import profile_page
from cascade.report.terminal import print_profile

__all__ = ["density_svg", "layer_profile_svg", "print_bench", "print_profile", "profile_page"]

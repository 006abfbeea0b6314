"""Terminal tables, figures and pages, all drawn from saved records.

Nothing is measured here: numbers are formatted, scaled to pixels, or rebinned for display.
"""

from cascade.report.benchmarks import (
    print_bench,
    print_collecting,
    print_decoding,
    print_fitting,
    print_gating,
)
from cascade.report.calibration import print_calibration
from cascade.report.cascades import print_cascade_evaluation, print_training
from cascade.report.drift import print_comparison, print_report
from cascade.report.drift_markdown import report_markdown
from cascade.report.drift_page import report_page
from cascade.report.evaluation import evaluation_page, print_evaluation
from cascade.report.figures import density_svg, layer_profile_svg
from cascade.report.generation import print_generation
from cascade.report.hard_tokens import print_hard_tokens
from cascade.report.page import profile_page
from cascade.report.pareto import pareto_svg
from cascade.report.terminal import print_profile

__all__ = [
    "density_svg",
    "evaluation_page",
    "layer_profile_svg",
    "pareto_svg",
    "print_bench",
    "print_calibration",
    "print_cascade_evaluation",
    "print_collecting",
    "print_comparison",
    "print_decoding",
    "print_evaluation",
    "print_fitting",
    "print_gating",
    "print_generation",
    "print_hard_tokens",
    "print_profile",
    "print_report",
    "print_training",
    "profile_page",
    "report_markdown",
    "report_page",
]

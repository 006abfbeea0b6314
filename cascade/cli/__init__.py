"""The command line: one function per command; heavy imports wait until a command needs them."""

from cascade.cli.app import app, main
from cascade.cli.bench import bench_collect, bench_collect_hard, bench_decode, bench_fit, bench_gate
from cascade.cli.exits import calibrate, evaluate, fit_heads, generate
from cascade.cli.gate import compare, gate
from cascade.cli.measure import RUN_FILES, accept, analyze
from cascade.cli.models import compare_models
from cascade.cli.stages import collect_hard, train

__all__ = [
    "RUN_FILES",
    "accept",
    "analyze",
    "app",
    "bench_collect",
    "bench_collect_hard",
    "bench_decode",
    "bench_fit",
    "bench_gate",
    "calibrate",
    "collect_hard",
    "compare",
    "compare_models",
    "evaluate",
    "fit_heads",
    "gate",
    "generate",
    "main",
    "train",
]

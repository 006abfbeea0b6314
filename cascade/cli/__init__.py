"""The command line: one function per command; heavy imports wait until a command needs them."""

from cascade.cli.app import app, main
from cascade.cli.bench import bench_collect, bench_collect_hard, bench_decode, bench_fit, bench_gate
from cascade.cli.corpora import compare_corpora
from cascade.cli.exits import calibrate, evaluate, fit_heads, generate
from cascade.cli.explain import explain
from cascade.cli.findings import findings
from cascade.cli.gate import compare, gate
from cascade.cli.measure import RUN_FILES, accept, analyze
from cascade.cli.models import compare_models
from cascade.cli.search import search_exit
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
    "compare_corpora",
    "compare_models",
    "evaluate",
    "explain",
    "findings",
    "fit_heads",
    "gate",
    "generate",
    "main",
    "search_exit",
    "train",
]

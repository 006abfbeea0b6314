"""Benchmarks: ways to do the same work, timed in one process with interleaved rounds.

A room per benchmark, each with its ways, its targets and the record of its kind; what all of them
need is in `timing`, peak memory in `memory`.
"""

# The functions are what a caller wants of these names: they cover the rooms', whose others come
# by `from cascade.benchmarks.collect import ...`.
from cascade.benchmarks.collect import Setup, collect
from cascade.benchmarks.decode import DecodeSetup, decode
from cascade.benchmarks.fit import FitSetup, fit
from cascade.benchmarks.gate import GateSetup, gate
from cascade.benchmarks.hard_tokens import HardSetup, collect_hard_tokens
from cascade.benchmarks.timing import BenchmarkError

__all__ = [
    "BenchmarkError",
    "DecodeSetup",
    "FitSetup",
    "GateSetup",
    "HardSetup",
    "Setup",
    "collect",
    "collect_hard_tokens",
    "decode",
    "fit",
    "gate",
]

"""Benchmarks: ways to do the same work, timed in one process with interleaved rounds.

A room per benchmark, each with its ways, its targets and the record of its kind; what all of them
need is in `timing`, peak memory in `memory`.
"""

# The function is what a caller wants of this name: it covers the room's, whose other names come
# by `from cascade.benchmarks.collect import ...`.
from cascade.benchmarks.collect import Setup, collect
from cascade.benchmarks.timing import BenchmarkError

__all__ = ["BenchmarkError", "Setup", "collect"]

"""Measure the peak memory of a task in a fresh process. Task and peak are passed as JSON.

Internal: `memory.peak_in_fresh_process` starts this module.
"""

from __future__ import annotations

import json
import sys

from cascade.benchmarks.collection import (
    CollectionBenchmark,
    CollectionBenchmarkConfig,
    peak_of_variant,
)
from cascade.core.schema import to_plain

#: Functions that measure one variant, by record kind.
_PEAKS = {
    CollectionBenchmark.KIND: lambda config, variant, factor: peak_of_variant(
        CollectionBenchmarkConfig(**config), variant, factor
    ),
}

if __name__ == "__main__":
    _task = json.loads(sys.argv[1])
    _peak = _PEAKS[_task["kind"]](_task["config"], _task["variant"], _task["factor"])
    print(json.dumps(to_plain(_peak), allow_nan=False))

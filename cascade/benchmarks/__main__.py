"""The fresh process that memory is measured in: a task as JSON comes in, its peak as JSON goes out.

Started by `memory.peak_in_fresh_process`; not meant to be called by hand.
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

#: What measures one variant, by the kind of the record.
_PEAKS = {
    CollectionBenchmark.KIND: lambda config, variant, factor: peak_of_variant(
        CollectionBenchmarkConfig(**config), variant, factor
    ),
}

if __name__ == "__main__":
    _task = json.loads(sys.argv[1])
    _peak = _PEAKS[_task["kind"]](_task["config"], _task["variant"], _task["factor"])
    print(json.dumps(to_plain(_peak)))

"""The fresh process that memory is measured in: a task as JSON comes in, its row as JSON goes out.

Started by `memory.measure_usage`; not meant to be called by hand.
"""

from __future__ import annotations

import json
import sys

from cascade.benchmarks.collect import KIND, Setup, peak_of_way

#: What measures one way, by the kind of the record that the row is for.
_PEAKS = {
    KIND: lambda setup, way, factor: peak_of_way(Setup(**setup), way, factor),
}

if __name__ == "__main__":
    _task = json.loads(sys.argv[1])
    print(json.dumps(_PEAKS[_task["kind"]](_task["setup"], _task["way"], _task["factor"])))

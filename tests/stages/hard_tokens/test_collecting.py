"""Test collecting: it resumes to the same bytes after any interruption, in constant memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.disk import contents
from support.reference_early_exit import (
    one_line,
)
from support.tiny_hard_tokens import (
    LENGTH,
    SMALL_SHARDS,
    Stopped,
    collect,
    edited,
    some_splits,
    stop_after,
)

from cascade.core.errors import (
    OutputError,
)
from cascade.models.stack import DecoderStack


@SMALL_SHARDS
def test_progress_counts_all_tokens_including_finished_shards(tmp_path: Path) -> None:
    done: list[int] = []
    collect(tmp_path / "a", progress=done.append)
    assert sum(done) == 29 * LENGTH
    with pytest.raises(Stopped):
        collect(tmp_path / "d", progress=stop_after(12 * LENGTH))
    done.clear()
    collect(tmp_path / "d", progress=done.append)
    assert sum(done) == 29 * LENGTH


@SMALL_SHARDS
def test_an_interrupted_collection_resumes_without_recomputing_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(tmp_path / "whole")
    visit, seen = DecoderStack.visit, []

    def counted(self: DecoderStack, ids: torch.Tensor, visitor: Any) -> Any:
        seen.append(len(ids))
        return visit(self, ids, visitor)

    with pytest.raises(Stopped):
        collect(tmp_path / "d", progress=stop_after(13 * LENGTH))
    monkeypatch.setattr(DecoderStack, "visit", counted)
    collect(tmp_path / "d")
    # Three shards of 4 sequences were finished, and the fourth was interrupted.
    assert sum(seen) == 29 - 12
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


@SMALL_SHARDS
def test_a_damaged_shard_is_collected_again(tmp_path: Path) -> None:
    collect(tmp_path / "whole")
    with pytest.raises(Stopped):
        collect(tmp_path / "d", progress=stop_after(13 * LENGTH))
    shards = sorted((tmp_path / "d").rglob("data-*.arrow"))
    edited(shards[0], lambda content: content[: len(content) // 2])
    shutil.copy(shards[2], shards[1])
    collect(tmp_path / "d")
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


@SMALL_SHARDS
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layer": 2}, "states, layer: 3, now 2"),
        ({"dtype": "bfloat16"}, "states, dtype: float16, now bfloat16"),
        ({"batch_size": 2}, "batches, batch_size: 4, now 2"),
        ({"family": "qwen2"}, "model, family: llama, now qwen2"),
        ({"splits": some_splits(21, 8)}, "train split, tokens: 264, now 252"),
    ],
)
def test_an_unfinished_dataset_with_other_arguments_is_refused(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(Stopped):
        collect(tmp_path / "d", progress=stop_after(13 * LENGTH))
    before = contents(tmp_path / "d")
    with pytest.raises(OutputError) as caught:
        collect(tmp_path / "d", **settings)
    assert f"holds an unfinished dataset with other arguments ({named})" in one_line(caught)
    assert contents(tmp_path / "d") == before
    collect(tmp_path / "d", overwrite=True, **settings)
    collect(tmp_path / "e", **settings)
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


_KILLED = """
import os, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
from cascade.core.errors import RecordError
from cascade.core.run_folder import COMMITTED
from cascade.stages.hard_tokens import plan
from cascade.stages.hard_tokens.dataset import load_hard_tokens
from support import tiny_hard_tokens as tiny
from support.disk import contents

torch.set_num_threads(1)
plan.SHARD_BYTES, plan.MOST_SHARDS = 1, 4
folder = Path(sys.argv[2])
tiny.a_stack("llama"), tiny.some_splits()
earlier = len(sys.argv) > 3

def collect(name):
    return tiny.collect(folder / name, overwrite=earlier)

def dies_at(number):
    # Renames and removals are the only operations that change the disk permanently.
    left = [number]
    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    Path.replace = counted(Path.replace)
    os.unlink = counted(os.unlink)
    os.rmdir = counted(os.rmdir)

collect("whole")
expected = contents(folder / "whole")
killed = 0
# Every third change; tests/suites/test_file_faults.py tries all of them under -m slow.
for number in range(earlier, 1000, 3):
    name = str(number)
    if earlier:
        tiny.collect(folder / name, hard_ratio=0.3)
    child = os.fork()
    if child == 0:
        dies_at(number)
        collect(name)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, (number, status)
    killed += 1
    # Reading a dataset whose switch was made finishes it.
    switched = (folder / name / COMMITTED).exists()
    if not switched and not (folder / name / "hard-tokens.json").exists():
        try:
            load_hard_tokens(folder / name)
        except RecordError:
            pass
        else:
            raise AssertionError(number)
    found = collect(name)
    assert contents(folder / name) == expected, number
    assert load_hard_tokens(folder / name).record == found.record
print(killed)
"""


@pytest.mark.parametrize("earlier", [False, True])
def test_a_collection_killed_at_any_point_resumes_to_the_same_bytes(
    tmp_path: Path, earlier: bool
) -> None:
    """Kill a process at changes of the disk, with and without an earlier dataset."""
    arguments = [str(Path(__file__).parents[2]), str(tmp_path), *(["earlier"] if earlier else [])]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    # 8 shards are written and then marked, 6 more files are written, and all are moved.
    assert int(done.stdout) > 12


_PEAK = """
import sys, tempfile
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens import plan
from cascade.stages.hard_tokens.collecting import collect_hard
from cascade.stages.hard_tokens.plan import CollectingConfig
from support.tiny_hard_tokens import some_splits
from support.tiny_models import tiny_model
from cascade.benchmarks.memory import peak_memory, reset_peak_memory

torch.set_num_threads(1)
plan.SHARD_BYTES = 1e6
stack = DecoderStack(tiny_model("llama", hidden_size=512, num_layers=2))
peaks = []
for rows in (160, 160, 1280):
    splits = some_splits(rows, rows // 4, 32)
    reset_peak_memory()
    found = collect_hard(stack, splits, Path(sys.argv[2]) / "d",
                         CollectingConfig(layer=1, hard_ratio=0.5, batch_size=8), overwrite=True)
    peaks.append(peak_memory())
print(peaks[2] - peaks[1], sum(file.bytes for file in found.record.files))
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    from cascade.benchmarks.memory import STEADY_MALLOC

    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(Path(__file__).parents[2]), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | STEADY_MALLOC,
    )
    assert done.returncode == 0, done.stderr
    growth, size = map(int, done.stdout.split())
    # With eight times the tokens, the states alone would add 46 MB. Only tokens, marks and
    # similarities may add memory.
    assert size > 50e6
    assert growth < 8e6

"""One task: skipped when complete, started twice at once, killed, and refused for other models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.disk import contents
from support.tiny_models import save_checkpoint, tiny_model

import cascade
from cascade.core.errors import ModelError, RecordError, UsageError
from cascade.corpora.blocks import TokenBlocks
from cascade.models.source import ModelSource
from cascade.models.stack import DecoderStack
from cascade.shards import measuring
from cascade.shards.plan import Plan

IDS = np.random.default_rng(0).integers(2, 97, (12, 8)).astype(np.int32)
BLOCKS = TokenBlocks(IDS, "random", "random", 12)


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return DecoderStack(tiny_model("llama"))


@pytest.fixture(scope="module")
def saved_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Return a plan of a checkpoint, from which other processes load the model."""
    folder = tmp_path_factory.mktemp("saved")
    save_checkpoint(folder / "tiny")
    return cascade.plan(str(folder / "tiny"), BLOCKS, folder / "plan", shards=3, batch_size=2)


@pytest.fixture
def plan(saved_plan: Plan, tmp_path: Path) -> Plan:
    import shutil

    files = shutil.ignore_patterns("shards")
    return Plan.read(shutil.copytree(saved_plan.folder, tmp_path / "plan", ignore=files))


def test_a_complete_shard_is_skipped_without_loading_the_model(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cascade.measure_shard(plan, 1)
    assert not first.skipped
    before = contents(plan.folder)
    monkeypatch.setattr(ModelSource, "load", lambda _: pytest.fail("it was loaded"))
    again = cascade.measure_shard(plan.folder, 1)
    assert (again.skipped, again.record) == (True, first.record)
    assert contents(plan.folder) == before


def test_the_engine_and_the_progress_of_a_task(plan: Plan) -> None:
    done: list[int] = []
    found = cascade.measure_shard(plan, 2, engine="ray 2.60.0", progress=done.append)
    assert found.record.engine == "ray 2.60.0"
    assert sum(done) == len(plan.shard(2).sequences) * 8


@pytest.mark.parametrize("number", [-1, 3])
def test_a_shard_that_the_plan_does_not_have_is_refused(plan: Plan, number: int) -> None:
    with pytest.raises(UsageError, match=f"expected a shard from 0 to 2 in .*, got {number}"):
        cascade.measure_shard(plan, number)


def test_another_model_is_refused(plan: Plan) -> None:
    for model in (tiny_model("gpt2"), tiny_model("llama", seed=5)):
        with pytest.raises(ModelError, match="is a plan for tiny with"):
            cascade.measure_shard(plan, 0, model=DecoderStack(model))
    assert not (plan.folder / "shards").exists()


def test_a_checkpoint_that_changed_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "tiny")
    cascade.plan(str(tmp_path / "tiny"), BLOCKS, tmp_path / "plan", batch_size=2)
    save_checkpoint(tmp_path / "tiny", seed=1)
    with pytest.raises(ModelError, match=r"expected .*tiny with weights sha256:"):
        cascade.measure_shard(tmp_path / "plan", 0)


def test_a_model_in_memory_has_to_be_given_again(stack: DecoderStack, tmp_path: Path) -> None:
    plan = cascade.plan(stack, BLOCKS, tmp_path / "plan")
    with pytest.raises(ModelError, match="was in memory, so no other process can load it; save"):
        cascade.measure_shard(plan, 0)
    assert not cascade.measure_shard(plan, 0, model=stack).skipped


def test_other_versions_are_refused_before_the_model_is_loaded(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = measuring.library_versions() | {"numpy": "1.0"}
    monkeypatch.setattr(measuring, "library_versions", lambda: versions)
    monkeypatch.setattr(ModelSource, "load", lambda _: pytest.fail("it was loaded"))
    with pytest.raises(RecordError, match=r"shard 0 would be measured with numpy 1\.0, expected"):
        cascade.measure_shard(plan, 0)


# --- Other processes -------------------------------------------------------------------------

TASK = """
import sys, time
from pathlib import Path
import cascade
from cascade.shards import shard_files

plan, number, ready, wanted = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
rename = Path.rename

def waiting(self, target):
    # All files are written, but the shard has not appeared yet.
    (ready / str(time.time_ns())).touch()
    while len(list(ready.iterdir())) < wanted:
        time.sleep(0.02)
    return rename(self, target)

Path.rename = waiting
print("skipped" if cascade.measure_shard(plan, number).skipped else "measured")
"""


def started(plan: Plan, number: int, ready: Path, wanted: int) -> subprocess.Popen[str]:
    """Start a task that waits before its shard appears, until so many tasks are there."""
    ready.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", TASK, str(plan.folder), str(number), str(ready), str(wanted)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_tasks_of_one_shard_at_once_complete_it_once(plan: Plan, tmp_path: Path) -> None:
    tasks = [started(plan, 0, tmp_path / "ready", 2) for _ in range(2)]
    outputs = [task.communicate(timeout=280) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert sorted(out.strip() for out, _ in outputs) == ["measured", "skipped"]
    assert sorted(path.name for path in (plan.folder / "shards").iterdir()) == ["00000"]
    assert cascade.measure_shard(plan, 0).skipped


def test_a_killed_task_leaves_nothing_that_counts(plan: Plan, tmp_path: Path) -> None:
    task = started(plan, 1, tmp_path / "ready", 99)
    end = time.monotonic() + 280
    while not list((tmp_path / "ready").iterdir()) and time.monotonic() < end:
        assert task.poll() is None, task.communicate()
        time.sleep(0.05)
    os.kill(task.pid, signal.SIGKILL)
    task.communicate()
    left = [path.name for path in (plan.folder / "shards").iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".00001-")
    assert not cascade.measure_shard(plan, 1).skipped
    assert [path.name for path in (plan.folder / "shards").iterdir()] == ["00001"]

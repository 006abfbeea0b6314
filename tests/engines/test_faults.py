"""Whatever dies on a two-node cluster, the bytes at the end are those of an undisturbed run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import engine_faults as faults
from support.shard_runs import measured_here, merged_files, planned, saved_model
from support.stacks import one_line

from cascade.core.errors import CascadeError, ModelError, OutputError
from cascade.engines.cluster import Cluster, cluster
from cascade.engines.config import EngineConfig
from cascade.engines.profiles import measure_on_ray
from cascade.engines.running import RETRIES
from cascade.engines.work import Task
from cascade.models.stack import DecoderStack
from cascade.shards.merging import missing_shards
from cascade.shards.plan import Plan

SHARDS = 7

#: Two nodes and their faults take minutes. In a session with many other tests, Ray has ended the
#: process of the tests twice, so they run by themselves: `pytest -m slow tests/engines`.
pytestmark = pytest.mark.slow

Run = Callable[[faults.Function], None]


@pytest.fixture(scope="module")
def nodes(ray: Any, environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes on this machine, and the object that adds and removes them."""
    from ray.cluster_utils import Cluster as Nodes

    folder = Path(tempfile.mkdtemp(prefix="cascade-", dir="/tmp"))  # short enough for a socket
    os.environ["RAY_TMPDIR"] = str(folder)
    small = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20}
    (folder / "ray").mkdir()
    head = small | {"include_dashboard": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own
        made = Nodes(initialize_head=True, head_node_args=head)
        made.add_node(**small)
        made.wait_for_nodes()
        yield made
        made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def two_nodes(nodes: Any) -> Iterator[Cluster]:
    """A driver that is connected to both."""
    with (
        warnings.catch_warnings(),
        cluster(EngineConfig(workers=2, address=nodes.address)) as found,
    ):
        assert found.workers == 2
        yield found


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> DecoderStack:
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(stack: DecoderStack, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an undisturbed run in one process gives."""
    folder = tmp_path_factory.mktemp("expected")
    made = measured_here(planned(stack, folder / "plan", SHARDS), stack)
    return merged_files(made, folder / "run")


@pytest.fixture
def made(stack: DecoderStack, tmp_path: Path) -> Plan:
    return planned(stack, tmp_path / "plan", SHARDS)


def half_written(made: Plan) -> list[str]:
    """Return what lies among the shards that is no whole shard."""
    folder = made.folder / "shards"
    whole = {f"{number:05d}" for number in range(SHARDS)}
    found = folder.iterdir() if folder.exists() else []
    return [path.name for path in found if path.name not in whole]


def test_killed_workers_are_replaced(
    two_nodes: Cluster, stack: DecoderStack, made: Plan, expected: Any, tmp_path: Path
) -> None:
    faults.run_with(two_nodes, made, stack, faults.killed_once)
    assert {path.name for path in (made.folder / "marks").iterdir()} == {"killed-1", "killed-4"}
    assert half_written(made) == []
    assert merged_files(made, tmp_path / "run") == expected


def test_a_task_whose_process_dies_each_time_ends_with_one_error_after_rays_retries(
    two_nodes: Cluster, stack: DecoderStack, made: Plan, expected: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as error:
        faults.run_with(two_nodes, made, stack, faults.always_killed)
    assert one_line(error).startswith("the process of shard 1 died 4 times; look for the reason")
    assert len(list(made.folder.glob("try-*"))) == RETRIES + 1
    assert 1 in missing_shards(made)
    measure_on_ray(made, EngineConfig(workers=2))
    assert merged_files(made, tmp_path / "run") == expected


def test_nan_in_a_layer_ends_the_run_with_that_error_and_is_not_tried_again(
    two_nodes: Cluster, stack: DecoderStack, made: Plan, expected: Any, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as error:
        faults.run_with(two_nodes, made, stack, faults.nan_in_a_layer)
    assert "layer 2 is the first to give NaN or infinite hidden states" in one_line(error)
    assert len(list(made.folder.glob("try-*"))) == 1
    assert half_written(made) == []
    measure_on_ray(made, EngineConfig(workers=2))
    assert merged_files(made, tmp_path / "run") == expected


def test_an_unexpected_error_is_one_line_that_names_the_task(
    two_nodes: Cluster, stack: DecoderStack, made: Plan
) -> None:
    with pytest.raises(ModelError) as error:
        faults.run_with(two_nodes, made, stack, faults.unexpected_error)
    assert one_line(error).startswith("shard 1 failed with ZeroDivisionError: one; run it alone")


def test_a_full_disk_in_one_task_is_one_error_and_leaves_nothing_half_written(
    two_nodes: Cluster, stack: DecoderStack, made: Plan, expected: Any, tmp_path: Path
) -> None:
    with pytest.raises(OutputError) as error:
        faults.run_with(two_nodes, made, stack, faults.full_disk)
    assert "shards/00002" in one_line(error)
    assert "File too large" in str(error.value)
    assert half_written(made) == []
    assert 2 in missing_shards(made)
    measure_on_ray(made, EngineConfig(workers=2))
    assert merged_files(made, tmp_path / "run") == expected


def test_two_drivers_on_one_plan_give_the_same_bytes(
    two_nodes: Cluster, stack: DecoderStack, made: Plan, expected: Any, tmp_path: Path
) -> None:
    errors: list[CascadeError] = []

    def drive() -> None:
        try:
            faults.run_with(two_nodes, made, stack, faults.slow)
        except CascadeError as error:
            errors.append(error)

    drivers = [threading.Thread(target=drive) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert errors == []
    assert half_written(made) == []
    assert merged_files(made, tmp_path / "run") == expected


#: A driver in a process of its own.
DRIVER = """
import sys
from support import engine_faults as faults
from cascade import load
from cascade.engines.cluster import cluster
from cascade.engines.config import EngineConfig
from cascade.shards.plan import Plan

with cluster(EngineConfig(workers=2, address=sys.argv[3])) as found:
    faults.run_with(found, Plan.read(sys.argv[1]), load(sys.argv[2]), faults.slow)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_driver_leaves_whole_shards_and_the_next_one_continues(
    how: signal.Signals,
    nodes: Any,
    stack: DecoderStack,
    made: Plan,
    expected: Any,
    tmp_path: Path,
) -> None:
    arguments = [made.folder, stack.provenance.source, nodes.address]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *map(str, arguments)], stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        while len(missing_shards(made)) > SHARDS - 2:
            assert driver.poll() is None, driver.stderr and driver.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        driver.send_signal(how)
        assert driver.wait(timeout=60) != 0
    finally:
        driver.kill()
        if driver.stderr is not None:
            driver.stderr.close()
    before = missing_shards(made)
    assert before
    done: list[int] = []
    measure_on_ray(made, EngineConfig(workers=2, address=nodes.address), progress=done.append)
    # Tasks of the killed driver may have finished in the meantime.
    assert len(done) <= len(before)
    assert merged_files(made, tmp_path / "run") == expected


def test_a_node_that_is_removed_takes_no_shard_with_it(
    nodes: Any, stack: DecoderStack, made: Plan, expected: Any, tmp_path: Path
) -> None:
    """Last in this file: the node does not come back."""
    config = EngineConfig(workers=2, address=nodes.address)
    removed: list[int] = []

    def remove(task: Task) -> None:
        if not removed:
            nodes.remove_node(nodes.list_all_nodes()[-1])
            removed.append(task.number)

    with cluster(config) as found:
        assert found.workers == 2
        faults.run_with(found, made, stack, faults.slow, done=remove)
        assert sum(node["Alive"] for node in found.ray.nodes()) == 1
    assert removed
    assert merged_files(made, tmp_path / "run") == expected

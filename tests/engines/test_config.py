"""How many threads and workers an engine uses."""

from __future__ import annotations

import pytest
from support.stacks import one_line

from cascade.core.errors import DeviceError, UsageError
from cascade.engines import config as configs
from cascade.engines.cluster import _workers, room_of
from cascade.engines.config import EngineConfig


@pytest.mark.parametrize(
    ("config", "given", "threads"),
    [
        (EngineConfig(), None, 1),
        (EngineConfig(workers=2), None, 4),
        (EngineConfig(workers=3), None, 2),
        (EngineConfig(workers=16), None, 1),
        (EngineConfig(workers=2), "3", 3),
        (EngineConfig(workers=2), "many", 4),
        (EngineConfig(workers=2, threads=5), "3", 5),
        (EngineConfig(workers=2, address="auto"), None, 1),
        (EngineConfig(workers=2, gpus_per_worker=0.5), None, 1),
    ],
)
def test_threads_of_a_worker(
    config: EngineConfig, given: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "cpus", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert config.threads_of() == threads


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EngineConfig(workers=0), "expected --workers of at least 1, got 0"),
        (EngineConfig(threads=-1), "expected --threads of at least 1, got -1"),
        (EngineConfig(gpus_per_worker=-1.0), "expected --gpus-per-worker of 0, a fraction"),
        (EngineConfig(gpus_per_worker=1.5), "expected --gpus-per-worker of 0, a fraction"),
        (EngineConfig(gpus_per_worker=float("nan")), "expected --gpus-per-worker of 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(config: EngineConfig, message: str) -> None:
    with pytest.raises(UsageError) as error:
        config.check()
    assert one_line(error).startswith(message)


@pytest.mark.parametrize(
    ("node", "threads", "gpus", "room"),
    [
        ({"CPU": 8.0}, 1, 0.0, 8),
        ({"CPU": 8.0}, 3, 0.0, 2),
        ({"CPU": 8.0}, 1, 1.0, 0),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 1.0, 2),
        ({"CPU": 1.0, "GPU": 2.0}, 1, 1.0, 1),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 0.1, 8),
        ({"CPU": 64.0, "GPU": 3.0}, 1, 0.1, 30),
        ({}, 1, 0.0, 0),
    ],
)
def test_room_of_a_node(node: dict[str, float], threads: int, gpus: float, room: int) -> None:
    assert room_of(node, threads, gpus) == room


def test_workers_fill_the_nodes_but_no_more_than_asked_for() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 2.0}]
    assert _workers(nodes, EngineConfig(threads=2)) == 2
    assert _workers(nodes, EngineConfig(threads=1)) == 5
    assert _workers(nodes, EngineConfig(threads=1, workers=4)) == 4
    assert _workers(nodes, EngineConfig(threads=1, workers=9)) == 5


def test_a_cluster_without_room_for_a_worker_is_refused() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 4.0, "GPU": 1.0}]
    with pytest.raises(DeviceError) as error:
        _workers(nodes, EngineConfig(threads=1, gpus_per_worker=2))
    assert one_line(error) == (
        "a worker needs 1 CPUs and 2 GPUs, but the largest node has 4 CPUs and 1 GPUs; change"
        " --threads or --gpus-per-worker"
    )

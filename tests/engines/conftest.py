"""One cluster for a file of tests: starting it takes seconds."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from cascade.engines.cluster import Cluster, cluster, import_ray
from cascade.engines.config import EngineConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray, for one file of tests at a time: clusters that start together disturb each other."""
    pytest.importorskip("ray", reason="the extra cascade-exit[ray] is not installed")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with FileLock(shared / "ray.lock", timeout=1200):
        yield import_ray()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let workers import the package and the tests, with a cache folder of their own."""
    before = dict(os.environ)
    cache = tmp_path_factory.mktemp("cache")
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ |= {"CASCADE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    yield cache
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def two_workers(ray: Any, environment: Path) -> Iterator[Cluster]:
    """A cluster of this machine with two workers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own
        with cluster(EngineConfig(workers=2)) as found:
            yield found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Compute on one thread, as the workers do; the marker `slow` would allow more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

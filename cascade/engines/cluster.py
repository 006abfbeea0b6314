"""A Ray cluster: one that is running, or one of this machine that is started and removed again."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.core.cache import cache_folder
from cascade.core.errors import CascadeError, DeviceError, UsageError, first_line, os_reason
from cascade.core.locks import locked
from cascade.engines.config import EngineConfig, cpus

#: Off unless the user set them: by default Ray writes a token into the home folder, and sends
#: statistics of its use.
_QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

#: Shared memory of a cluster that is started here, in bytes. Tasks exchange nothing but numbers.
_OBJECT_STORE = 100 << 20

#: Seconds to wait for another process that starts a cluster.
_START_WAITS = 120.0

#: Seconds within which a running cluster answers.
_ANSWERS = 10.0

#: The address of a cluster: host and port.
_ADDRESS = re.compile(r"\[?([^/]+?)\]?:(\d{1,5})")

#: The longest path of a socket is 107 bytes. Ray's begin with the folder of its session.
_LONGEST_FOLDER = 107 - len("/session_2026-11-29_11-45-53_947862_4194304/sockets/plasma_store.1")


@dataclass(frozen=True)
class Cluster:
    """A cluster that tasks run on.

    Attributes:
        ray: The module.
        workers: Tasks at once.
        engine: Its name and version, for the provenance.
    """

    ray: Any
    workers: int
    engine: str


def import_ray() -> Any:
    """Return the module of Ray, with its statistics and its token turned off.

    Raises:
        UsageError: It is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
    except ImportError as error:
        raise UsageError(
            "--engine ray needs the package ray; run `pip install cascade-exit[ray]`"
        ) from error
    return ray


@contextlib.contextmanager
def cluster(config: EngineConfig) -> Iterator[Cluster]:
    """Yield a cluster: the running one at an address, or one that lives as long as the context.

    A process that is already connected to a cluster uses that one.

    Args:
        config: How tasks run.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
        DeviceError: The cluster has too few GPUs or CPUs for one worker.
    """
    config.check()
    ray = import_ray()
    with contextlib.ExitStack() as cleanup:
        if not ray.is_initialized():
            with _kept_signals(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if config.address is None:
                    _start(ray, config, cleanup)
                else:
                    _connect(ray, config.address)
                    cleanup.callback(ray.shutdown)
        workers = _workers(_nodes(ray), config)
        yield Cluster(ray, workers, f"ray {ray.__version__}")


def _connect(ray: Any, address: str) -> None:
    try:
        _check_answers(address)
        ray.init(
            address=address, log_to_driver=False, configure_logging=False, logging_level="ERROR"
        )
    except Exception as error:  # of many types, for a wrong name and for no answer
        raise UsageError(
            f"no Ray cluster at {address} ({first_line(error)}); start one with `ray start --head`,"
            " or leave out --address"
        ) from error


def _check_answers(address: str) -> None:
    """Check that something answers at an address. Ray itself tries for several minutes.

    Raises:
        OSError: Nothing does.
    """
    found = _ADDRESS.fullmatch(address)
    if found is not None:  # else a name that Ray looks up, such as auto
        socket.create_connection((found[1], int(found[2])), timeout=_ANSWERS).close()


def _start(ray: Any, config: EngineConfig, cleanup: contextlib.ExitStack) -> None:
    """Start a cluster of this machine, which ends with the process."""
    folder = cleanup.enter_context(_session_folder())
    threads = config.threads_of()
    workers = config.workers or max(1, cpus() // threads)
    cleanup.callback(ray.shutdown)
    try:
        # Clusters that start at the same time can take the same ports.
        with locked(cache_folder() / "ray", wait=_START_WAITS, doing="starting Ray in"):
            ray.init(
                address="local",
                # As many as the workers need: Ray would otherwise start tasks for CPUs only.
                num_cpus=workers * threads,
                num_gpus=None if config.gpus_per_worker else 0,
                include_dashboard=_wants_dashboard(),
                object_store_memory=_OBJECT_STORE,
                log_to_driver=False,
                configure_logging=False,
                logging_level="ERROR",
                _temp_dir=str(folder),
            )
    except CascadeError:
        raise
    except OSError as error:
        raise UsageError(f"Ray cannot start here: {os_reason(error)}; free some space") from error
    except Exception as error:  # of many types
        raise UsageError(
            f"Ray cannot start here: {first_line(error)}; run without --engine ray"
        ) from error


def _wants_dashboard() -> bool:
    return os.environ.get("RAY_INCLUDE_DASHBOARD", "").lower() in ("1", "true", "yes")


@contextlib.contextmanager
def _session_folder() -> Iterator[Path]:
    """Yield a new folder for Ray's sockets and logs, and remove it at the end.

    It is in the cache folder, or, where its path is too long for a socket, in the system's folder
    for temporary files.
    """
    parent = cache_folder() / "ray"
    if len(os.fsencode(parent)) + len("/cascade-12345678") > _LONGEST_FOLDER:
        parent = Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="cascade-", dir=parent))
    try:
        yield folder
    finally:
        # Ray's processes can write their last lines after it was shut down.
        for _ in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.1)


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Put back the handlers of signals, which Ray replaces where it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- Room for workers ------------------------------------------------------------------------


def _nodes(ray: Any) -> list[dict[str, float]]:
    """Return the resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _workers(nodes: list[dict[str, float]], config: EngineConfig) -> int:
    """Return how many tasks run at once.

    Raises:
        DeviceError: No node has room for one.
    """
    threads, gpus = config.threads_of(), config.gpus_per_worker
    room = sum(room_of(node, threads, gpus) for node in nodes)
    if room < 1:
        most = [max((node.get(name, 0) for node in nodes), default=0) for name in ("CPU", "GPU")]
        raise DeviceError(
            f"a worker needs {threads} CPUs and {gpus:g} GPUs, but the largest node has "
            f"{most[0]:g} CPUs and {most[1]:g} GPUs; change --threads or --gpus-per-worker"
        )
    return min(room, config.workers or room)


def room_of(node: dict[str, float], threads: int, gpus: float) -> int:
    """Return how many workers a node has room for.

    Args:
        node: Its resources, "CPU" and "GPU".
        threads: CPUs of a worker.
        gpus: GPUs of a worker.

    Example:
        >>> room_of({"CPU": 8.0, "GPU": 2.0}, 1, 0.5), room_of({"CPU": 8.0}, 3, 0)
        (4, 2)
    """
    room = int(node.get("CPU", 0) // threads)
    return min(room, int(node.get("GPU", 0) / gpus + 1e-9)) if gpus else room

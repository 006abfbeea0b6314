"""A cluster of this machine: what it leaves, and what is off."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.stacks import one_line

from cascade.core.errors import UsageError
from cascade.engines import cluster as clusters
from cascade.engines.cluster import cluster, import_ray
from cascade.engines.config import EngineConfig

#: A process that starts a cluster, runs a task, and says what it sees.
ALONE = """
import json, os, signal, sys, warnings
from cascade.engines.cluster import cluster
from cascade.engines.config import EngineConfig

if __name__ == "__main__":
    warnings.simplefilter("error")
    before = signal.getsignal(signal.SIGTERM)
    with cluster(EngineConfig(workers=2, threads=1)) as found:
        seen = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED")}
        node = found.ray.nodes()[0]
        seen["cpus"] = node["Resources"]["CPU"]
        seen["workers"] = found.workers
        seen["folders"] = sorted(os.listdir(os.path.join(os.environ["CASCADE_CACHE"], "ray")))
        seen["dashboard"] = found.ray._private.worker._global_node.webui_url
        seen["signal"] = signal.getsignal(signal.SIGTERM) == before
    seen["left"] = os.listdir(os.path.join(os.environ["CASCADE_CACHE"], "ray"))
    print(json.dumps(seen))
"""


def test_a_cluster_of_this_machine_leaves_nothing_and_sends_nothing(
    ray: Any, environment: Path, tmp_path: Path
) -> None:
    home, script = tmp_path / "home", tmp_path / "alone.py"
    home.mkdir()
    script.write_text(ALONE)
    cache = Path("/tmp") / f"c{os.getpid()}"  # so short that a socket fits
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        "CASCADE_CACHE": str(cache),
        "TMPDIR": str(tmp_path),
    }
    before = set(os.listdir(tmp_path))
    try:
        done = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, env=environ, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        seen = json.loads(done.stdout.splitlines()[-1])
        assert seen["RAY_AUTH_MODE"] == "disabled"
        assert seen["RAY_USAGE_STATS_ENABLED"] == "0"
        assert seen["cpus"] == seen["workers"] == 2
        assert len(seen["folders"]) == 1
        assert not seen["dashboard"]
        assert seen["signal"]
        assert seen["left"] == []
        assert [path for path in home.rglob("*") if path.is_file()] == []
        assert set(os.listdir(tmp_path)) == before
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch, ray: Any) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "as the user says")
    import_ray()
    assert os.environ["RAY_AUTH_MODE"] == "as the user says"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "as the user says"


def test_a_cache_folder_with_a_long_path_is_not_used_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / ("long" * 20)))
    monkeypatch.setattr(clusters.tempfile, "gettempdir", lambda: str(tmp_path))
    with clusters._session_folder() as folder:
        assert folder.parent == tmp_path
        (folder / "log").write_text("a line")
    assert not folder.exists()
    short = Path("/tmp") / f"c{os.getpid()}"
    monkeypatch.setenv("CASCADE_CACHE", str(short))
    try:
        with clusters._session_folder() as folder:
            assert folder.parent == short / "ray"
            assert len(str(folder)) <= clusters._LONGEST_FOLDER
        assert not folder.exists()
    finally:
        shutil.rmtree(short)


def test_handlers_of_signals_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with clusters._kept_signals():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "no-such-host.invalid:6379"])
def test_no_cluster_at_an_address_is_one_line_at_once(address: str) -> None:
    """Ray itself tries for minutes."""
    pytest.importorskip("ray", reason="the extra cascade-exit[ray] is not installed")
    start = time.monotonic()
    with pytest.raises(UsageError) as error, cluster(EngineConfig(address=address, threads=1)):
        pass
    assert time.monotonic() - start < 60
    assert one_line(error).startswith(f"no Ray cluster at {address} (")
    assert one_line(error).endswith("or leave out --address")

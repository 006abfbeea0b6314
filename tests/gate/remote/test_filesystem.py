"""Remote folders through fsspec: missing packages, the hub's names, offline, and HTTP."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from fsspec.registry import _registry
from support.build_profiles import a_profile
from support.remote_place import PROFILE, RemotePlace, local_folder, push_profile

from cascade.core.errors import RecordError, UsageError
from cascade.gate.baselines import read_profile
from cascade.gate.remote.copies import OFFLINE, copy_folder, up_to_date
from cascade.gate.remote.filesystem import RemoteFolder, is_offline


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [
        ("s3://key:secret@bucket/a", "s3fs", "s3fs"),
        ("gs://bucket/a", "gcsfs", "gcsfs"),
        ("https://host/a", "fsspec.implementations.http", "aiohttp"),
        ("simplecache::s3://bucket/a", "s3fs", "s3fs"),
    ],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    url: str,
    module: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    # fsspec remembers what it imported.
    for protocol in ("s3", "gs", "https"):
        monkeypatch.delitem(_registry, protocol, raising=False)
    with pytest.raises(UsageError) as caught:
        up_to_date(url)
    assert f"install it with `pip install {package}`" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_unknown_protocol_says_what_to_install(cache: Path) -> None:
    words = "fsspec does not know nowhere://; install the package that adds it to fsspec, or use"
    with pytest.raises(UsageError, match=re.escape(words)):
        up_to_date("nowhere://bucket/a")


# --- The hub ---------------------------------------------------------------------------------


class Hub(RemotePlace):
    """The hub's place: names keep their revision, as those of `HfFileSystem` do."""

    protocol = "hf"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setitem(_registry, "hf", Hub)
    Hub.reset()
    push_profile(PROFILE, a_profile())
    for name in list(Hub.files):
        moved = name.replace("store/baselines", "datasets/ORG/NAME@v1.0")
        Hub.files[moved] = Hub.files.pop(name)
    yield Hub
    Hub.reset()


def test_a_revision_of_the_hub_is_passed_on_unchanged(hub: type[Hub]) -> None:
    url = "hf://datasets/ORG/NAME@v1.0"
    found = up_to_date(url)
    assert hub.paths == ["datasets/ORG/NAME@v1.0", "datasets/ORG/NAME@v1.0/tiny"]
    assert found.origin.url == url
    assert read_profile(copy_folder(url) / PROFILE).record() == a_profile().record()
    assert copy_folder(url) != copy_folder("hf://datasets/ORG/NAME")


def test_the_hubs_own_file_system_reads_the_revision_from_the_name() -> None:
    from huggingface_hub import HfFileSystem

    stripped = HfFileSystem._strip_protocol("hf://datasets/ORG/NAME@v1.0")
    assert stripped == "datasets/ORG/NAME@v1.0"


def test_offline_the_hub_is_not_asked(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    url = "hf://datasets/ORG/NAME@v1.0"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecordError, match=f"{re.escape(url)}: HF_HUB_OFFLINE is set, and"):
        up_to_date(url)
    assert not hub.calls
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    first = up_to_date(url)
    hub.calls.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = up_to_date(url)
    assert not hub.calls
    assert found.origin.revision == first.origin.revision
    assert (found.origin.checked, found.origin.reason) == (False, OFFLINE)


def test_offline_concerns_the_hub_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert is_offline("hf://datasets/ORG/NAME")
    assert is_offline("simplecache::hf://datasets/ORG/NAME")
    assert not any(map(is_offline, ("s3://bucket/hf", "file:///hf")))


# --- HTTP ------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with an ETag for each file, and counts what is read."""

    read: list[str]

    def end_headers(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_file():
            self.send_header("ETag", hashlib.md5(path.read_bytes()).hexdigest())
        super().end_headers()

    def do_GET(self) -> None:
        self.read.append(self.path)
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Serve baselines on 127.0.0.1: address, folder, paths that were read."""
    folder, read = local_folder(tmp_path / "shared"), list[str]()
    handler = type("CountingHandler", (Handler,), {"read": read})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder, read
    server.shutdown()
    server.server_close()
    thread.join()


def test_baselines_of_a_web_server(cache: Path, served: tuple[str, Path, list[str]]) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp, an optional package")
    url, folder, read = served
    first = up_to_date(f"{url}/")
    assert first.refused == {}
    assert read_profile(copy_folder(url) / PROFILE).record() == a_profile(seed=0).record()
    read.clear()
    assert up_to_date(url).origin.revision == first.origin.revision
    assert not [path for path in read if path.endswith((".json", ".npz"))]
    local_folder(folder, seed=7)
    assert up_to_date(url).origin.revision != first.origin.revision
    assert read_profile(copy_folder(url) / PROFILE).record() == a_profile(seed=7).record()


def test_a_web_server_that_is_gone(cache: Path, served: tuple[str, Path, list[str]]) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp, an optional package")
    with pytest.raises(RecordError, match="it cannot be reached: there is no such folder or file"):
        up_to_date(f"{served[0]}/nowhere")
    with pytest.raises(RecordError, match="it cannot be reached: Cannot connect to host"):
        up_to_date("http://127.0.0.1:9/baselines")


def test_a_link_has_the_version_of_its_target(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "shared/tiny/a.budgets.json"
    link.parent.mkdir(parents=True)
    target.write_bytes(b"old")
    link.symlink_to(target)
    folder = RemoteFolder(f"file://{tmp_path}/shared")
    (before,) = folder.files()
    assert folder.files() == [before]
    target.write_bytes(b"new")
    os.utime(target, (1, 1))
    (after,) = folder.files()
    assert (before.size, after.size) == (3, 3)
    assert before.stamp != after.stamp


def test_listing_an_unreadable_folder_is_no_empty_folder(cache: Path) -> None:
    folder = RemoteFolder("file:///nowhere/at/all")
    with pytest.raises(Exception, match="there is no such folder or file"):
        folder.files()

"""A remote place for fsspec that counts what is asked of it, and fails in every way it can."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from fsspec import AbstractFileSystem

from cascade.core.records import to_file
from cascade.gate.baselines import StoredProfile
from support.build_profiles import a_profile, plain_record, write_profile, write_rows

URL = "remote://store/baselines"
PROFILE, ARRAYS = "tiny/texts.saturation.json", "tiny/texts.saturation.npz"
ROWS = "tiny/texts.saturation.parquet"
OTHER = "other/texts.saturation.json"

#: What a fault makes of the content of a file on its way; it may raise.
Fault = Callable[[str, bytes], bytes]


class RemotePlace(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Files in memory under `remote://`, the same for all instances.

    Attributes:
        files: The content of each file, by its path.
        calls: How often each method was called.
        paths: The paths that were listed.
        fault: What happens to content on its way; None for nothing.
        unreachable: The error that every call raises; None for none.
        stamped: Whether the place says which version of a file it has.
    """

    protocol = "remote"
    cachable = False
    root_marker = ""

    files: ClassVar[dict[str, bytes]] = {}
    calls: ClassVar[Counter[str]] = Counter()
    paths: ClassVar[list[str]] = []
    fault: ClassVar[Fault | None] = None
    unreachable: ClassVar[Exception | None] = None
    stamped: ClassVar[bool] = True

    @classmethod
    def reset(cls) -> None:
        """Empty the place and repair it."""
        cls.files.clear()
        cls.calls.clear()
        cls.paths.clear()
        cls.fault = cls.unreachable = None
        cls.stamped = True

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        if self.unreachable is not None:
            raise self.unreachable

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self._called("ls")
        self.paths.append(path)
        top = f"{self._strip_protocol(path)}/"
        below = {name[len(top) :].split("/")[0] for name in self.files if name.startswith(top)}
        if not below and top.rstrip("/") not in ("store/baselines",):
            raise FileNotFoundError(path)
        return [self.info(f"{top}{name}") for name in sorted(below)]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path not in self.files:
            return {"name": path, "type": "directory", "size": 0}
        content = self.files[path]
        etag = {"ETag": hashlib.md5(content).hexdigest()} if self.stamped else {}
        return {"name": path, "type": "file", "size": len(content), **etag}

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        self._called("get_file")
        content = self.files[self._strip_protocol(rpath)]
        Path(lpath).write_bytes(content if self.fault is None else type(self).fault(rpath, content))


def push(name: str, content: bytes) -> None:
    """Put a file at the address."""
    RemotePlace.files[f"store/baselines/{name}"] = content


def push_profile(name: str, profile: StoredProfile) -> None:
    """Put the files of a profile at the address."""
    push(name, to_file(plain_record(profile)).encode())
    from cascade.core.records import packed

    push(name.replace(".json", ".npz"), packed(profile.state))
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows", profile)
        push(name.replace(".json", ".parquet"), (Path(folder) / "rows").read_bytes())


def push_folder(folder: Path) -> None:
    """Put all files of a local folder of baselines at the address."""
    for path in folder.rglob("*"):
        if path.is_file():
            push(path.relative_to(folder).as_posix(), path.read_bytes())


def truncated(_: str, content: bytes) -> bytes:
    """Lose the second half of a file on its way, as a connection that ends early does."""
    return content[: len(content) // 2]


def hangs_up(path: str, content: bytes) -> bytes:
    """End the connection in the middle of a file."""
    raise ConnectionResetError(104, "Connection reset by peer")


def changed(_: str, content: bytes) -> bytes:
    """Change a digit of a file, which keeps its size."""
    return content.replace(b'"sequences": 12', b'"sequences": 13').replace(
        b"PK\x03\x04", b"PK\x03\x05"
    )


def local_folder(folder: Path, *, seed: int = 0) -> Path:
    """Write a local folder of two baselines, and return it."""
    write_profile(folder / PROFILE, a_profile(seed=seed))
    write_profile(folder / OTHER, a_profile(seed=seed + 100))
    return folder

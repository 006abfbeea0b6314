"""Unreadable files give one line: torn, forged, no regular file, or larger than they can be."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from cascade.core.reading import (
    UnreadableError,
    parse_json,
    read_arrays,
    read_bytes,
    read_json,
    read_tensors,
)
from cascade.core.records import packed

ARRAYS = {"layers": np.arange(40, dtype=np.int64), "means": np.linspace(0, 1, 60).reshape(20, 3)}
TENSORS = {"head.1.weight": torch.arange(12.0).reshape(3, 4), "head.1.bias": torch.ones(4)}

READERS: dict[str, tuple[Callable[[Path], Any], bytes]] = {
    "json": (read_json, b'{"schema": 2, "layers": [{"layer": "1", "mean": 0.5}], "note": "x"}'),
    "npz": (read_arrays, packed(ARRAYS)),
    "safetensors": (read_tensors, save(TENSORS, {"cascade": "{}"})),
}

ANY_FORMAT = pytest.mark.parametrize("kind", READERS)


@ANY_FORMAT
def test_missing_file_is_reported_as_missing(tmp_path: Path, kind: str) -> None:
    with pytest.raises(FileNotFoundError):
        READERS[kind][0](tmp_path / "none")


@ANY_FORMAT
@pytest.mark.parametrize("place", ["pipe", "folder", "device", "loop"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str, place: str) -> None:
    path = tmp_path / place
    if place == "pipe":
        os.mkfifo(path)
    elif place == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if place == "device" else path)
    with pytest.raises(UnreadableError) as caught:
        READERS[kind][0](path)
    assert "\n" not in str(caught.value)


@ANY_FORMAT
@given(st.data())
def test_torn_files_give_one_error_or_the_same_types(kind: str, data: st.DataObject) -> None:
    read, whole = READERS[kind]
    torn = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(torn) - 1))
        if data.draw(st.booleans()):
            torn[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            torn[place:] = data.draw(st.binary(max_size=8))
            torn = torn or bytearray(b"\0")
    path = Path(tempfile.gettempdir()) / f"cascade-torn-{kind}-{os.getpid()}"
    try:
        path.write_bytes(torn)
        message = "read"
        try:
            read(path)
        except UnreadableError as error:
            message = str(error)
        assert message
        assert "\n" not in message
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"b": [{"a": 1, "a": 1}]}', "the key 'a' is there twice"),
        ("9" * 5000, "digits"),
        ("", "Expecting value"),
        (b"\xff{}", "utf-8"),
        (b'{"a": "\xff"}', "utf-8"),
        (r'{"a": "\ud800"}', "half of a character"),
        (r'{"a": "x\\\udc00"}', "half of a character"),
    ],
)
def test_json_that_no_record_holds_is_unreadable(text: str | bytes, message: str) -> None:
    with pytest.raises(UnreadableError, match=message):
        parse_json(text)


@pytest.mark.parametrize("text", [r'"\ud83d\ude00"', r'"\\ud800"', '"\U0001f600"', r'"\u00e9"'])
def test_whole_characters_are_read(text: str) -> None:
    assert parse_json(text) == json.loads(text)


def test_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 11)
    assert read_bytes(tmp_path / "file", largest=11) == b"x" * 11
    with pytest.raises(UnreadableError, match="expected at most 10 bytes, got 11"):
        read_bytes(tmp_path / "file", largest=10)


def test_arrays_are_read_as_they_were_written(tmp_path: Path) -> None:
    stored = ARRAYS | {
        "empty": np.zeros((0, 3)),
        "scalar": np.float32(2),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    }
    (tmp_path / "a.npz").write_bytes(packed(stored))
    found = read_arrays(tmp_path / "a.npz")
    assert list(found) == list(stored)
    for name, values in stored.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == np.asarray(values).dtype


def _npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (2000000000,)}"), "declares"),
        (_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}"), "declares"),
        (_npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}", b"x" * 9), "declares"),
        (
            _npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"x" * 8),
            "declares|object",
        ),
        (b"\x93NUMPY\x09\x00", "version"),
        (b"no array", "magic"),
        (b"", "."),
    ],
)
def test_array_that_lies_about_its_size_is_unreadable(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(UnreadableError, match=message):
        read_arrays(tmp_path / "a.npz")


def test_archive_bomb_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w", force_zip64=True) as entry,
    ):
        entry.write(_npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000,)}"))
        for _ in range(1000):
            entry.write(bytes(1_000_000))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from cascade.core.reading import UnreadableError, read_arrays\n"
        "import numpy\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_arrays(Path(sys.argv[1]))\n"
        "except UnreadableError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    message, grown = done.stdout.splitlines()
    assert "its entries declare 1,000,000,129 bytes" in message
    assert int(grown) < 20_000  # KB

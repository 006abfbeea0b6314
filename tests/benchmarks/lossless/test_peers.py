"""Other libraries are timed in processes of their own, or the record says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import save_gguf

from cascade.benchmarks.lossless.peers import (
    LIBRARIES,
    PeerTask,
    PeerTimes,
    find_peers,
    time_peer,
)

#: A library that generates the number of its threads again and again, then a token 7.
_LLAMA = """
class Llama:
    def __init__(self, model_path, n_ctx, n_threads, n_threads_batch, verbose):
        assert open(model_path, "rb").read(4) == b"GGUF", "no GGUF file"
        assert n_ctx == 12, n_ctx
        self.threads, self.fresh = n_threads, False

    def reset(self):
        self.fresh = True

    def generate(self, prompt, top_k, temp, repeat_penalty):
        assert self.fresh, "the beginning of the prompt was kept"
        self.fresh = False
        for _ in range(len(prompt) - 1):
            yield self.threads
        while True:
            yield 7
"""


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    save_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a library of the name llama_cpp; return its file."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "llama_cpp.py").write_text(_LLAMA)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return folder / "llama_cpp.py"


def test_missing_libraries_are_named(saved: Path) -> None:
    found, file = find_peers(str(saved), wanted=True, device="cpu")
    assert [peer.name for peer in found] == ["llama.cpp", "openvino"]
    for peer, library in zip(found, LIBRARIES, strict=True):
        if peer.version is None:
            assert peer.reason == f"{library.package} is not installed"
            assert peer.precision is None
    assert file is None


def test_no_library_is_timed_if_none_is_wanted(saved: Path) -> None:
    found, _ = find_peers(str(saved), wanted=False, device="cpu")
    assert {peer.reason for peer in found} == {"disabled by --no-peers"}


def test_a_model_without_gguf_file_is_not_given_to_a_library(installed: Path, saved: Path) -> None:
    found, _ = find_peers(str(saved), wanted=True, device="cpu")
    assert found[0].version == "unknown"
    assert found[0].reason == "the model has no GGUF file that it could read"


def test_an_installed_library_reads_the_models_own_file(
    installed: Path, gguf: Path, here: Path
) -> None:
    found, file = find_peers(str(gguf), wanted=True, device="cpu")
    assert file == gguf
    assert found[0].reason is None
    assert found[0].precision == "Q4_1"


def test_a_library_continues_each_prompt_in_its_own_process(installed: Path, gguf: Path) -> None:
    task = PeerTask(gguf, [[5, 6], [5, 6, 8, 9]], new_tokens=8, ends=[7], threads=3)
    found = time_peer("llama.cpp", task)
    assert isinstance(found, PeerTimes)
    assert found.new_tokens == [2, 4]  # up to and including the end
    assert len(found.seconds) == len(found.cpu_seconds) == 2
    assert min(found.seconds) > 0


def test_no_more_new_tokens_than_wanted_are_timed(installed: Path, gguf: Path) -> None:
    task = PeerTask(gguf, [[5, 6, 8, 9]], new_tokens=8, ends=[], threads=3)
    found = time_peer("llama.cpp", task)
    assert isinstance(found, PeerTimes)
    assert found.new_tokens == [8]


def test_a_library_that_fails_gives_the_last_line_of_its_error(
    installed: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"nothing")
    task = PeerTask(broken, [[5]], new_tokens=8, ends=[7], threads=1)
    assert time_peer("llama.cpp", task) == "AssertionError: no GGUF file"


def test_a_library_that_prints_no_times_is_named(installed: Path, gguf: Path) -> None:
    installed.write_text("import sys\nprint('hello')\nsys.exit(0)\n")
    task = PeerTask(gguf, [[5]], new_tokens=8, ends=[7], threads=1)
    assert str(time_peer("llama.cpp", task)).startswith("its process printed no times (")


def test_a_library_that_ends_its_process_is_named_with_the_signal(
    installed: Path, gguf: Path
) -> None:
    task = PeerTask(gguf, [[5]], new_tokens=8, ends=[7], threads=1)
    installed.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert time_peer("llama.cpp", task) == "its process was ended by the signal SIGKILL"
    installed.write_text("import os\nos._exit(3)\n")
    assert time_peer("llama.cpp", task) == "its process ended with status 3"

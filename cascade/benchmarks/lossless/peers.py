"""Other libraries that decode on a CPU, each timed in a process of its own on the same prompts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.benchmarks.lossless.records import Peer
from cascade.core.errors import CascadeError, first_line
from cascade.models.checkpoints.weights import resolve


@dataclass(frozen=True)
class PeerLibrary:
    """A library.

    Attributes:
        name: Name of its variant.
        module: Module that is imported.
        package: Package that contains it.
    """

    name: str
    module: str
    package: str

    @property
    def version(self) -> str | None:
        """The installed version, "unknown" without metadata; None if it is not installed."""
        if importlib.util.find_spec(self.module) is None:
            return None
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


#: The libraries that are known.
LIBRARIES = (
    PeerLibrary("llama.cpp", "llama_cpp", "llama-cpp-python"),
    PeerLibrary("openvino", "openvino_genai", "openvino-genai"),
)


@dataclass(frozen=True)
class PeerTimes:
    """The times of a library.

    Attributes:
        seconds: Seconds of each prompt.
        cpu_seconds: CPU seconds of each prompt.
        new_tokens: New tokens of each prompt.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    new_tokens: list[int]


@dataclass(frozen=True)
class PeerTask:
    """What a library has to do.

    Attributes:
        file: The GGUF file.
        prompts: Token ids of each prompt.
        new_tokens: Maximum number of new tokens.
        ends: End-of-sequence tokens.
        threads: Number of threads.
    """

    file: Path
    prompts: Sequence[Sequence[int]]
    new_tokens: int
    ends: Sequence[int]
    threads: int


def find_peers(model: str, *, wanted: bool, device: str) -> tuple[list[Peer], Path | None]:
    """Return which libraries can be timed, and the GGUF file that they read.

    Args:
        model: Source of the model.
        wanted: Whether they are to be timed.
        device: Device of the model.
    """
    file, precision = _gguf_file(model)
    found = []
    for library in LIBRARIES:
        version, reason = library.version, None
        if not wanted:
            reason = "disabled by --no-peers"
        elif version is None:
            reason = f"{library.package} is not installed"
        elif device != "cpu":
            reason = f"it is compared on a CPU, not on {device}"
        elif file is None:
            reason = "the model has no GGUF file that it could read"
        found.append(
            Peer(
                name=library.name,
                package=library.package,
                version=version,
                precision=None if reason else precision,
                reason=reason,
            )
        )
    return found, file


def _gguf_file(model: str) -> tuple[Path | None, str | None]:
    """Return the single GGUF file of a model and its precision, or None twice."""
    try:
        weights = resolve(model)
    except CascadeError:
        return None, None
    files = [path for path in weights.files if path.suffix.lower() == ".gguf"]
    return (files[0], weights.quantization or "unknown") if len(files) == 1 else (None, None)


def time_peer(name: str, task: PeerTask) -> PeerTimes | str:
    """Time a library on prompts, in a process of its own. Return why it failed, if it did.

    Args:
        name: Name of the library.
        task: What it has to do.
    """
    plain = {
        "name": name,
        "file": str(task.file),
        "prompts": [list(prompt) for prompt in task.prompts],
        "new_tokens": task.new_tokens,
        "ends": list(task.ends),
        "threads": task.threads,
    }
    done = subprocess.run(
        [sys.executable, "-m", "cascade.benchmarks.lossless.peer_process"],
        input=json.dumps(plain, allow_nan=False),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(task.threads)},
    )
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [_ended(done.returncode)])[-1]
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return PeerTimes(**found)
    except (ValueError, IndexError, TypeError) as error:
        return f"its process printed no times ({first_line(error)})"


def _ended(status: int) -> str:
    """Return how a process ended that wrote no error."""
    if status >= 0:
        return f"its process ended with status {status}"
    try:
        return f"its process was ended by the signal {signal.Signals(-status).name}"
    except ValueError:  # a signal without a name
        return f"its process was ended by the signal {-status}"

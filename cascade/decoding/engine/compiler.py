"""Compiles the layers for this machine, once; the libraries are stored in the cache folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from cascade.core.cache import cache_folder
from cascade.core.errors import OutputError, first_line, os_reason
from cascade.core.files import atomic_path

_FOLDER = Path(__file__).parent

#: NaN and infinity keep their meaning, and the process keeps its floating-point mode, so no
#: -ffast-math.
_FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)

#: In fp32, sums may be reordered and fused, as in any library of matrix products. In bfloat16, the
#: source says how everything is rounded.
_ROUNDING = {
    "fp32": ("-ffp-contract=fast", "-fassociative-math", "-fno-signed-zeros"),
    "bf16": ("-ffp-contract=off",),
}

#: Seconds; compiling takes one to six.
_TIMEOUT = 120


class CompilerError(Exception):
    """The layers cannot be compiled on this machine; the message says why, in one line."""


def library_path(name: str) -> Path:
    """Return where the compiled layers are stored.

    Args:
        name: "fp32" or "bf16".

    Raises:
        CompilerError: There is no C compiler, or it does not run.
    """
    # What the compiler says of itself and of this processor's instructions. Names of processors
    # prove little: virtual machines share them.
    machine = _run([_compiler(), "-march=native", "-dM", "-E", "-x", "c", os.devnull])
    texts = [path.read_text(encoding="utf-8") for path in (_source(name), *_headers())]
    about = (texts, _FLAGS, _ROUNDING[name], machine)
    digest = hashlib.sha256(repr(about).encode()).hexdigest()
    return cache_folder() / "kernels" / f"layers-{name}-{digest[:16]}.so"


def _source(name: str) -> Path:
    return _FOLDER / f"layers_{name}.c"


def _headers() -> list[Path]:
    return sorted(_FOLDER.glob("*.h"))


@functools.cache
def compiled_library(name: str) -> ctypes.CDLL:
    """Return the compiled layers.

    The compiler is the one that the environment variable `CC` names, or `cc`.

    Args:
        name: "fp32" or "bf16".

    Raises:
        CompilerError: There is no C compiler, it cannot compile the layers, or the kernel does not
            permit what they need.
    """
    path = library_path(name)
    if path.is_file():
        try:
            return _loaded(path)
        except OSError:  # damaged: compile again
            pass
    try:
        with atomic_path(path) as temporary:
            flags = (*_FLAGS, *_ROUNDING[name])
            _run([_compiler(), *flags, str(_source(name)), "-o", str(temporary), "-lm"])
        return _loaded(path)
    except OutputError as error:
        raise CompilerError(first_line(error)) from error
    except OSError as error:
        raise CompilerError(f"the compiled layers cannot be loaded ({os_reason(error)})") from error


def _loaded(path: Path) -> ctypes.CDLL:
    """Load a library and ask the kernel for what its instructions need.

    Raises:
        OSError: It cannot be loaded.
        CompilerError: The kernel does not permit it.
    """
    library = ctypes.CDLL(str(path))
    permission = getattr(library, "cascade_permission", None)
    if permission is not None and permission():
        raise CompilerError("the kernel does not permit the processor's tiles (AMX)")
    return library


def _compiler() -> str:
    name = os.environ.get("CC") or "cc"
    path = shutil.which(name)
    if path is None:
        raise CompilerError(f"there is no C compiler ({name} is not on the PATH)")
    return path


def _run(command: list[str]) -> str:
    """Run a compiler and return what it printed.

    Raises:
        CompilerError: It failed.
    """
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilerError(f"{command[0]} does not run ({first_line(error)})") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CompilerError(f"{command[0]} fails ({said[0]})")
    return done.stdout

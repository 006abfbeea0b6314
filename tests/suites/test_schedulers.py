"""What the page of many machines shows for other schedulers runs, and gives the same bytes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.doc_blocks import Command, blocks_of, pages, read
from support.doc_lines import parse_cascade
from support.shard_runs import measured_here, merged_files, planned, saved_model

PAGE = "docs/how-to/scale.md"

#: The shards of the page, and of the test.
LAST, SHARDS = 63, 5

#: SLURM starts an array as many processes, each with its number. This does the same.
SBATCH = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
array=$(sed -n 's/^#SBATCH --array=0-//p' "$1")
for number in $(seq 0 "$array"); do
  SLURM_ARRAY_TASK_ID=$number bash "$1" || exit 1
done
echo 17
"""

#: GNU parallel, as far as the page uses it, where it is not installed.
PARALLEL = """#!/bin/bash
[[ "$1 $3 $5" == "--jobs --retries --env" ]] || exit 2
jobs=$2; shift 6
command=()
while [[ $1 != ::: ]]; do command+=("$1"); shift; done
shift
printf '%s\\n' "$@" | xargs -P "$jobs" -I '{}' "${command[@]}"
"""


def shown(word: str) -> str:
    """Return the block of the page with a word, for the plan of this test."""
    blocks = [block.text for block in blocks_of(PAGE, read(PAGE))]
    (found,) = [block for block in blocks if word in block]
    assert re.search(rf"\b{LAST}\b|tasks=64", found)
    found = re.sub(rf"\b{LAST}\b", str(SHARDS - 1), found)
    return found.replace("tasks=64", "tasks=3").replace(" --device cuda", "")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with PLAN, and put commands of the page on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    script = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m cascade "$@"\n'
    for name, text in {"cascade": script, "sbatch": SBATCH}.items():
        (programs / name).write_text(text)
    if shutil.which("parallel") is None:
        (programs / "parallel").write_text(PARALLEL)
    for program in programs.iterdir():
        program.chmod(0o755)
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def expected(place: Path) -> Any:
    stack = saved_model(place)
    planned(stack, place / "PLAN", SHARDS)
    return merged_files(measured_here(planned(stack, place / "one", 1), stack), place / "expected")


def check(place: Path, expected: Any, command: list[str]) -> str:
    """Run a command in the folder of the plan, and compare the merged profile."""
    from cascade.shards.plan import Plan

    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert merged_files(Plan.read(place / "PLAN"), place / "run") == expected
    return done.stdout


@pytest.mark.slow
def test_an_array_of_slurm(place: Path, expected: Any) -> None:
    (place / "measure.sbatch").write_text(shown("#SBATCH --array") + "\n")
    line = next(line for line in shown_lines("sbatch --parsable") if "--parsable" in line)
    assert check(place, expected, ["bash", "-c", f'{line}; echo "$array" | tail -1']) == "17\n"


def shown_lines(word: str) -> list[str]:
    blocks = [block.text for block in blocks_of(PAGE, read(PAGE))]
    return next(block for block in blocks if word in block).splitlines()


@pytest.mark.slow
def test_gnu_parallel(place: Path, expected: Any) -> None:
    check(place, expected, ["bash", "-c", shown("parallel --jobs").replace("--jobs 4", "--jobs 2")])


@pytest.mark.slow
def test_torchrun(place: Path, expected: Any) -> None:
    line = shown("torchrun").replace("--nproc-per-node 4", "--nproc-per-node 2")
    torchrun = f"{shlex.quote(sys.executable)} -m torch.distributed.run "
    check(place, expected, ["bash", "-c", line.replace("torchrun ", torchrun, 1)])


@pytest.mark.slow
def test_datatrove(place: Path, expected: Any) -> None:
    pytest.importorskip("datatrove", reason="datatrove is not installed")
    (place / "pipeline.py").write_text(shown("LocalPipelineExecutor").replace("=4", "=2"))
    check(place, expected, [sys.executable, "-W", "ignore", "pipeline.py"])


def test_the_page_shows_every_scheduler_and_nothing_that_is_not_tried() -> None:
    words = ("#SBATCH --array", "parallel --jobs", "torchrun")
    for word in (*words, "LocalPipelineExecutor"):
        assert shown(word)
    others = ("sbatch --parsable", "--engine ray", "cascade bench scale")
    for name in pages():
        for block in blocks_of(name, read(name)):
            if block.language == "sh":
                assert name == PAGE
                assert any(word in block.text for word in (*words, *others)), block.place


def test_lines_of_the_page_with_an_engine_are_valid() -> None:
    lines = shown_lines("--engine ray") + shown_lines("cascade bench scale")
    assert len(lines) == 5
    for number, line in enumerate(lines):
        parse_cascade(Command(f"{PAGE}:{number}", tuple(shlex.split(line))))

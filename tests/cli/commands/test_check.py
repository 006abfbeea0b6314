"""`cascade check`: committed baselines are sealed, readable, used and small."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.build_profiles import a_profile
from support.commands import Run, check_refusal, python
from support.disk import contents

from cascade.gate.accepting import store_profile

PROFILE = Path("baselines/tiny/words.saturation.json")


@pytest.fixture
def stored(here: Path) -> Path:
    store_profile(here / "baselines", a_profile())
    return here


def test_sound_baselines_end_with_0(run: Run, stored: Path) -> None:
    before = contents(stored)
    done = run("check")
    words = "Checked 1 baseline: sealed, readable, used and small\n"
    assert (done.status, done.out, done.err) == (0, "", words)
    assert run("check", PROFILE, "--quiet").err == ""
    assert contents(stored) == before


def test_each_problem_is_one_line_and_the_status_is_1(run: Run, stored: Path) -> None:
    PROFILE.write_text(PROFILE.read_text().replace("0.1.0", "0.2.0"))
    done = run("check", "baselines")
    assert done.status == 1
    (line,) = done.out.splitlines()
    assert line.startswith(f"{PROFILE} was changed after it was written")
    assert done.err == ""
    # Problems are errors: --quiet does not hide them.
    assert run("check", "--quiet").out == done.out


@pytest.mark.parametrize("path", ["nowhere", "texts.jsonl"])
def test_a_path_without_baselines_is_refused(run: Run, stored: Path, path: str) -> None:
    check_refusal(run("check", path), [path])


def test_the_command_imports_no_model_library(stored: Path) -> None:
    done = python("-X", "importtime", "-m", "cascade", "check")
    assert done.status == 0
    imported = {line.rpartition("|")[2].strip() for line in done.err.splitlines()}
    assert "cascade.gate.baseline_files" in imported
    assert not imported & {"torch", "transformers", "datasets", "scipy", "matplotlib", "rich"}

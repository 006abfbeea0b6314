"""`--json` and `--quiet` of every command that measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import Run

from cascade.cli import app
from cascade.cli.app import bench

#: Commands that measure nothing, and those with JSON of another form.
_NO_RECORD = {"accept", "check", "comment", "env", "export-drafter", "findings"}

MEASURE: dict[str, tuple[object, ...]] = {
    "analyze": (),
    "calibrate": (),
    "evaluate": ("--layers", 2, "--rule", "cosine", "--hard-ratio", 0.5),
    "search-exit": ("--layers", 2, "--rule", "cosine"),
    "generate": ("--prompt", "Number", "--max-new-tokens", 2),
    "collect-hard": ("--hard-ratio", 0.5, "--output", "hard"),
    "fit-heads": ("--layers", 2, "--output", "heads.safetensors"),
    "explain": ("--layer", 2, "--max-tokens", 256),
}
KINDS = {
    "analyze": "saturation",
    "calibrate": "calibration",
    "evaluate": "evaluation",
    "search-exit": "exit-search",
    "generate": "generation",
    "collect-hard": "hard-tokens",
    "fit-heads": "exit-heads",
    "explain": "explanation",
}


def test_every_command_that_measures_has_json_and_quiet() -> None:
    for command in [*app.registered_commands, *bench.registered_commands]:
        if command.name in _NO_RECORD:
            continue
        names = set(command.callback.__annotations__)  # type: ignore[union-attr]
        assert {"json", "quiet"} <= names, command.name


@pytest.mark.parametrize("command", MEASURE)
def test_json_prints_the_record_and_nothing_else(tiny: Callable[..., Any], command: str) -> None:
    done = tiny(command, *MEASURE[command], "--json", "--quiet")
    assert done.status == 0, done.err
    assert done.err == ""
    assert json.loads(done.out)["kind"] == KINDS[command]


def test_json_is_what_output_writes_and_progress_stays_on_stderr(
    tiny: Callable[..., Any], here: Path
) -> None:
    done = tiny("calibrate", "--json", "--output", "out")
    assert done.err == "Wrote out/calibration.json\n"
    assert done.out == (here / "out/calibration.json").read_text()


def test_quiet_prints_errors_only(tiny: Callable[..., Any], here: Path) -> None:
    done = tiny("calibrate", "--quiet", "--output", "out")
    assert (done.status, done.out, done.err) == (0, "", "")
    done = tiny("calibrate", "--quiet", "--output", "out")
    assert (done.status, done.out) == (2, "")
    assert "holds another run" in done.err


def test_printing_of_one_run_does_not_affect_the_next(tiny: Callable[..., Any]) -> None:
    tiny("calibrate", "--quiet")
    assert "tiny (llama" in tiny("calibrate").out


def test_gate_and_compare_print_the_report_and_keep_their_exit_status(
    tiny: Callable[..., Any], run: Run, here: Path
) -> None:
    tiny("analyze", "--output", "a", "--quiet")
    tiny("analyze", "--output", "b", "--quiet", "--max-tokens", 320)
    done = run("compare", "a", "a", "--json")
    assert (done.status, json.loads(done.out)["kind"]) == (0, "report")
    assert run("accept", "a").status == 0
    done = tiny("gate", "--json", "--output", "report")
    assert done.status == 0, done.err
    assert done.out == (here / "report/report.json").read_text()

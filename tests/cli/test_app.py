"""The command line itself: help, usage errors, and a stdout that is full."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.commands import (
    Run,
    check_refusal,
    python,
)
from support.disk import contents

import cascade

if TYPE_CHECKING:
    pass


def test_help_and_import_load_nothing_heavy() -> None:
    code = """
import sys
heavy = {"torch", "transformers", "numpy", "datasets", "matplotlib", "pandas", "huggingface_hub"}
import cascade
print(heavy & set(sys.modules))
from cascade import cli
for arguments in (["--help"], ["analyze", "--help"], ["accept", "--help"], ["--version"]):
    sys.argv[1:] = arguments
    try:
        cli.main()
    except SystemExit as done:
        print(done.code, heavy & set(sys.modules))
"""
    done = python("-c", code, COLUMNS="120")
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == "set()"
    assert lines.count("0 set()") == 4
    assert f"cascade {cascade.__version__}" in lines
    for option in ("--model", "--text-column", "--max-tokens", "--overwrite", "--npz"):
        assert option in done.out


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("analyze", "--seq-len", 1), ["--seq-len", "2", "got '1'"]),
        (("analyze", "--seq-len=1"), ["--seq-len", "2", "got '1'"]),
        (("analyze", "--batch-size", 0), ["--batch-size", "1", "got '0'"]),
        (("analyze", "--max-tokens", 0), ["--max-tokens", "1", "got '0'"]),
        (("analyze", "--num-samples", -1), ["--num-samples", "0", "got '-1'"]),
        (("analyze", "--seed", "x\ny"), ["--seed", "integer", r"got 'x\ny'"]),
        (("analyze", "--seed"), ["--seed"]),
        (("analyze", "--no-such-option"), ["--no-such-option"]),
        (("fit-heads", "--layers", "2"), ["--output", "`cascade fit-heads --help`"]),
        (("calibrate", "--hard-ratio", 0.5, "--hard-ratio", "x"), ["number", "got '0.5', 'x'"]),
        (("bench", "decode", "--rounds", "many"), ["--rounds", "`cascade bench decode --help`"]),
        (("no-such-command",), ["no-such-command", "see `cascade --help`"]),
        (("accept",), ["run", "see `cascade accept --help`"]),
    ],
    ids=lambda values: " ".join(map(str, values)) if isinstance(values, tuple) else "",
)
def test_a_usage_error_is_one_line_and_leaves_no_trace(
    run: Run, here: Path, arguments: tuple[object, ...], fragments: list[str]
) -> None:
    before = contents(here)
    done = run(*arguments, *(["--output", "new"] if arguments[0] == "analyze" else []))
    check_refusal(done, fragments)
    assert contents(here) == before


@pytest.mark.parametrize("arguments", [(), ("bench",)])
def test_no_command_at_all_shows_the_help(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.status, done.err) == (2, "")
    assert "Usage: " in done.out


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [(["--output", ""], "--output"), (["--output="], "--output"), (["--model", ""], "--model")],
)
def test_an_option_that_a_script_left_empty_is_refused(
    run: Run, here: Path, arguments: list[str], flag: str
) -> None:
    before = contents(here)
    done = run("analyze", *arguments)
    assert done.status == 2
    assert done.err == f"cascade: expected a value for {flag}, got an empty one\n"
    assert contents(here) == before


def test_a_text_that_looks_like_an_empty_option_is_a_text(
    run: Run, here: Path, models: Path
) -> None:
    few = ("--model", models / "tiny", "--max-new-tokens", 2, "--no-compare")
    done = run("generate", *few, "--prompt", "--foo=")
    assert done.status == 0, done.err
    assert "--foo=" in done.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("command", ["--help", "analyze --help", "accept run", "fit-heads"])
def test_what_cannot_be_printed_is_one_line_and_what_was_written_stays(
    analyze: Run, here: Path, models: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a buffer nothing is left for Python to flush at its end, where it would fail again.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert analyze("--max-tokens", 320, "--output", "run").status == 0
    common = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--seq-len", 16)
    fitting = (*common, "--layers", 2, "--distill", 1, "--output", "h.safetensors")
    arguments = [*command.split(), *(fitting if command == "fit-heads" else ())]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cascade", *map(str, arguments)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Wrote ")]
    assert lines == ["cascade: cannot print: No space left on device; send stdout elsewhere"]
    assert done.returncode == 2
    assert Path("h.safetensors").exists() == (command == "fit-heads")
    assert Path("baselines").exists() == (command == "accept run")


def test_a_full_disk_behind_stdout_is_one_line(
    analyze: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cascade.report.saturation.terminal.print_profile", full)
    done = analyze("--output", "report")
    assert done.status == 2
    assert done.err == "cascade: cannot print: No space left on device; send stdout elsewhere\n"
    assert Path("report/profile.json").exists()

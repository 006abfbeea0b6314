"""The command line itself: help, usage errors, and a stdout that is full."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import Run, check_refusal, python
from support.disk import contents

import cascade
from cascade.cli.app import BUG_STATUS, CLOSED_PIPE_STATUS


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
        (("bench", "fit", "--rounds", "many"), ["--rounds", "`cascade bench fit --help`"]),
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


@pytest.mark.parametrize("command", [["--help"], ["env"], ["compare", "run", "run"]])
def test_a_closed_pipe_behind_stdout_is_no_error_and_no_drift(
    analyze: Run, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    if command[0] == "compare":
        assert analyze("--max-tokens", 320, "--output", "run").status == 0
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "cascade", *command],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert done.returncode == CLOSED_PIPE_STATUS, done.stderr
    assert "Error" not in done.stderr


def test_an_unexpected_error_is_one_line_that_names_its_traceback(
    analyze: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr("cascade.report.saturation.terminal.print_profile", fail)
    done = analyze("--max-tokens", 320)
    assert done.status == BUG_STATUS == 70
    found = re.fullmatch(
        r"cascade: unexpected ZeroDivisionError: division by zero; the traceback is in (\S+),"
        r" please report it with the output of `cascade env`",
        done.err.splitlines()[-1],
    )
    assert found, done.err
    text = Path(found.group(1)).read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in text
    assert "analyze" in text.splitlines()[0]
    Path(found.group(1)).unlink()


def test_an_unexpected_error_shows_its_traceback_where_it_cannot_be_saved(
    analyze: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("cascade.report.saturation.terminal.print_profile", lambda *_: 1 / 0)
    monkeypatch.setattr("tempfile.mkstemp", fail)
    done = analyze("--max-tokens", 320)
    assert done.status == BUG_STATUS
    assert "Traceback (most recent call last)" in done.err
    assert "the traceback is above" in done.err.splitlines()[-1]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOSPC])
def test_a_file_that_the_system_refuses_is_no_bug(
    number: int, analyze: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "some/folder")

    monkeypatch.setattr("cascade.report.saturation.terminal.print_profile", fail)
    done = analyze("--max-tokens", 320)
    assert (done.status, done.err.splitlines()[-1]) == (
        2,
        f"cascade: cannot use some/folder: {os.strerror(number)}; mend that, then run the command"
        " again",
    )


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

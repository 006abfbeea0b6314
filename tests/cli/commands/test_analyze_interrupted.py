"""A full disk or a signal in the middle of `cascade analyze`, and its progress bar."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.commands import (
    DRAWN,
    TEXTS,
    Run,
    check_refusal,
)
from support.disk import contents, largest_file

from cascade.cli.commands.analyze import RUN_FILES

if TYPE_CHECKING:
    pass


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_full_disk_keeps_the_previous_report(analyze: Run, here: Path, name: str) -> None:
    arguments = ("--output", "report", "--overwrite")
    assert analyze("--max-tokens", 640, *arguments).status == 0
    sizes = {file: (here / "report" / file).stat().st_size for file in RUN_FILES}
    assert analyze("--max-tokens", 320, *arguments).status == 0
    before = contents(here)
    limit = sizes[name] - 1
    with largest_file(limit):
        done = analyze("--max-tokens", 640, *arguments)
    # Of the files that are too large, the one that is written first is named.
    named = re.search(r"cannot write report/(\S+): File too large", done.err)
    assert named is not None
    assert sizes[named.group(1)] > limit
    check_refusal(done, ["free some space"])
    assert contents(here) == before


def test_a_full_disk_keeps_the_previous_npz_and_report(analyze: Run, here: Path) -> None:
    arguments = ("--output", "report", "--npz", "x.npz", "--overwrite")
    assert analyze(*arguments).status == 0
    size = (here / "x.npz").stat().st_size
    assert size > max(DRAWN.values())
    assert analyze("--max-tokens", 320, *arguments).status == 0
    before = contents(here)
    # A working file takes a fifth of the archive.
    for limit in (size - 1, size // 10):
        with largest_file(limit):
            done = analyze(*arguments)
        check_refusal(done, ["cannot write ", ": File too large; free some space"])
        assert contents(here) == before
    with largest_file(size):
        assert analyze(*arguments).status == 0


@pytest.mark.parametrize(
    "place",
    [
        "cascade.models.loading.load",
        "cascade.corpora.blocks.load_blocks",
        "cascade.saturation.profile.similarities",
        "cascade.report.saturation.page.profile_page",
        "cascade.saturation.token_archive.SimilarityArchive.save",
        "cascade.core.run_folder.RunFolder.commit",
    ],
)
def test_ctrl_c_at_any_point_leaves_all_files_unchanged(
    place: str, analyze: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    arguments = ("--output", "new/report", "--npz", "newer/x.npz")
    before = contents(here)
    with monkeypatch.context() as patch:
        patch.setattr(place, interrupt)
        done = analyze(*arguments)
    assert (done.status, done.out, done.err) == (130, "", "")
    left = contents(here)
    # The archive is whole before the report is put in its place.
    if place.endswith("commit"):
        assert np.load(here / "newer/x.npz")["layer_1"].size > 0
        left = {path: content for path, content in left.items() if not path.startswith("newer")}
    assert left == before
    assert analyze(*arguments, "--overwrite").status == 0


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_a_termination_signal_leaves_all_files_unchanged(
    kind: signal.Signals, analyze: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        during.append(contents(here))
        signal.raise_signal(kind)

    during: list[dict[str, bytes | None]] = []
    before = contents(here)
    monkeypatch.setattr("cascade.saturation.profile.similarities", stop)
    inherited = signal.signal(kind, signal.SIG_DFL)  # ignored where nohup started the tests
    try:
        done = analyze("--output", "new/report", "--npz", "newer/x.npz")
        assert signal.getsignal(kind) == signal.SIG_DFL
    finally:
        signal.signal(kind, inherited)
    assert (done.status, done.out, done.err) == (128 + kind, "", "")
    assert set(during[0]) > set(before)  # the working files
    assert contents(here) == before


def test_a_hangup_that_nohup_ignores_stays_ignored(
    analyze: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_up(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGHUP)
        return measure(*arguments)

    from cascade.saturation.profile import similarities as measure

    monkeypatch.setattr("cascade.saturation.profile.similarities", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert analyze().status == 0
    finally:
        signal.signal(signal.SIGHUP, before)


#: A slow pass; it says when it began.
SLOW = """
import os, time
from cascade import cli
from cascade.saturation import profile

measure = profile.similarities

def slowly(*arguments):
    os.write(1, b"measuring\\n")  # print goes to the bar's console
    time.sleep(0.1)
    return measure(*arguments)

profile.similarities = slowly
cli.main()
"""


def test_ctrl_c_in_a_running_process_exits_cleanly(here: Path, models: Path) -> None:
    """A real signal to a real process whose stderr is a terminal: the bar, then nothing left."""
    before = contents(here)
    terminal, other_end = pty.openpty()
    common = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--seq-len", "8")
    written = ("--output", "new/report", "--npz", "newer/x.npz")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "analyze", *common, *written],
        stdout=subprocess.PIPE,
        stderr=other_end,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
        # A shell may have started the tests with SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(other_end)
    shown: list[bytes] = []
    reader = threading.Thread(target=read_terminal, args=(terminal, shown))
    reader.start()
    assert process.stdout is not None
    # What does not stop by itself is killed, and its exit status says so.
    patience = threading.Timer(60, process.kill)
    patience.start()
    with process, process.stdout:
        for _ in range(5):
            assert process.stdout.readline() == b"measuring\n"
        during = contents(here)
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    patience.cancel()
    reader.join()
    os.close(terminal)
    text = b"".join(shown).decode()
    assert process.returncode == 130
    assert set(during) > set(before)  # the working files
    assert set(rest.split()) <= {b"measuring"}
    assert contents(here) == before
    assert "Traceback" not in text
    assert "KeyboardInterrupt" not in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"Analyzing .*\d+/2,\d{3} tokens [\d,]+ tokens/s \d:\d\d:\d\d left", plain)


def read_terminal(terminal: int, shown: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # the other end was closed
        while part := os.read(terminal, 65536):
            shown.append(part)


def test_the_progress_bar_counts_every_token_on_a_terminal(
    analyze: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal, other_end = pty.openpty()
    shown: list[bytes] = []
    reader = threading.Thread(target=read_terminal, args=(terminal, shown))
    reader.start()
    with open(other_end, "w", encoding="utf-8") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        done = analyze()
    reader.join()
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode())
    assert done.status == 0
    tokens = f"{len(chr(10).join(TEXTS)) // 32 * 32:,}"
    assert f"{tokens}/{tokens} tokens" in text
    assert re.search(r"[\d,]+ tokens/s \d:\d\d:\d\d left", text)
    assert "Loading" in text
    assert "Reading texts.jsonl" in text


def test_no_progress_bar_is_shown_if_stderr_is_not_a_terminal(analyze: Run) -> None:
    done = analyze()
    assert (done.status, done.err) == (0, "")
    assert "Suggested thresholds" in done.out

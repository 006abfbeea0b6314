"""Files of a run are switched together, also after failures, interrupts and kills."""

from __future__ import annotations

import contextlib
import errno
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.disk import contents, largest_file

from cascade.core.errors import OutputError
from cascade.core.files import staging_folder
from cascade.core.run_folder import COMMITTED, RunFolder, current

NAMES = ("profile.json", "profile.npz", "report.html")


class Killed(BaseException):
    """The end of a process that nothing can handle."""


def raise_killed(folder: Path) -> None:
    raise Killed


def raise_unwritable(folder: Path) -> None:
    raise PermissionError(errno.EROFS, "read-only")


ANY_FAILURE = pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])


def write_run(
    target: Path,
    content: str | bytes,
    *,
    names: tuple[str, ...] = NAMES,
    failure: type[BaseException] | None = None,
) -> None:
    """Write a run that replaces any other; with `failure`, raise it at the end."""
    with RunFolder(target, NAMES, overwrite=True) as folder:
        for name in names:
            folder.write(name, content)
        if failure is not None:
            raise failure


def test_files_of_a_run_appear_together_at_its_end(tmp_path: Path) -> None:
    target = tmp_path / "a/report"
    with RunFolder(target, NAMES) as folder:
        for name in NAMES:
            folder.write(name, "new")
        assert not any((target / name).exists() for name in NAMES)
    assert contents(target) == dict.fromkeys(NAMES, b"new")


def test_run_folder_writes_text_and_bytes_unchanged(tmp_path: Path) -> None:
    with RunFolder(tmp_path, ("text", "bytes")) as folder:
        folder.write("text", "\u00e4\r\n")
        folder.write("bytes", b"\x00\xff\r\n")
    assert contents(tmp_path) == {"text": b"\xc3\xa4\r\n", "bytes": b"\x00\xff\r\n"}


@ANY_FAILURE
def test_failed_run_leaves_older_run_and_other_files_unchanged(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    write_run(tmp_path, "old")
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(failure):
        write_run(tmp_path, "new", failure=failure)
    assert contents(tmp_path) == before


@ANY_FAILURE
def test_failed_run_removes_the_folders_it_created(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    with pytest.raises(failure):
        write_run(tmp_path / "a/b/c", "new", failure=failure)
    assert contents(tmp_path) == {}


def test_failed_run_keeps_a_created_folder_that_holds_other_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a/b", NAMES)
    (tmp_path / "a/notes.txt").write_text("mine")
    folder.__exit__(ValueError)
    assert contents(tmp_path) == {"a": None, "a/notes.txt": b"mine"}


@pytest.mark.parametrize("name", NAMES)
def test_existing_run_is_rejected_without_overwrite(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    with pytest.raises(OutputError, match=rf"holds another run \({name}\).*--overwrite"):
        RunFolder(tmp_path, NAMES)
    assert contents(tmp_path) == {name: b"old"}


def test_overwrite_replaces_only_files_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / NAMES[0]).write_text("old")
    write_run(tmp_path, "new")
    assert contents(tmp_path) == {"notes.txt": b"mine"} | dict.fromkeys(NAMES, b"new")


def test_other_files_do_not_count_as_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder(tmp_path, NAMES) as folder:
        for name in NAMES:
            folder.write(name, "new")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_with_the_name_of_a_run_file_is_rejected_and_kept(
    tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / NAMES[2]).mkdir()
    (tmp_path / NAMES[2] / "inside").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"report\.html is a folder.*choose another --output"):
        RunFolder(tmp_path, NAMES, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_file_at_the_path_of_the_folder_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file, expected a folder; choose another"):
        RunFolder(tmp_path / "file", NAMES, overwrite=True)
    with pytest.raises(OutputError, match="choose a folder you can write to"):
        RunFolder(tmp_path / "file/below/it", NAMES)
    assert contents(tmp_path) == {"file": b"mine"}


def test_too_long_folder_name_is_an_output_error(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300), tmp_path / "made" / ("x" * 300)):
        with pytest.raises(OutputError, match="choose a folder you can write to"):
            RunFolder(path, NAMES)
    assert contents(tmp_path) == {}


def test_full_disk_leaves_the_older_run(tmp_path: Path) -> None:
    write_run(tmp_path, "old")
    before = contents(tmp_path)
    with largest_file(1000), pytest.raises(OutputError) as caught:
        write_run(tmp_path, b"x" * 1001)
    assert str(caught.value).startswith(f"cannot write {tmp_path / NAMES[0]}: ")
    assert "free some space" in str(caught.value)
    assert contents(tmp_path) == before


def test_incomplete_run_replaces_no_file(tmp_path: Path) -> None:
    write_run(tmp_path, "old")
    with pytest.raises(OutputError, match="cannot write to"):
        write_run(tmp_path, "new", names=(NAMES[0], NAMES[2]))
    assert contents(tmp_path) == dict.fromkeys(NAMES, b"old")


@given(
    present=st.sets(st.sampled_from(NAMES)),
    failing=st.integers(1, 2 * len(NAMES)),
    after=st.booleans(),
    failure=st.sampled_from([Killed, PermissionError]),
)
def test_interrupted_switch_leaves_all_files_old_or_all_new(
    present: set[str], failing: int, after: bool, failure: type[BaseException]
) -> None:
    rename = Path.replace
    calls = 0

    def failing_replace(self: Path, target: Path) -> Path:
        """Fail before or after one of the renames."""
        nonlocal calls
        calls += 1
        if calls == failing and not after:
            raise failure
        renamed = rename(self, target)
        if calls == failing:
            raise failure
        return renamed

    with tempfile.TemporaryDirectory() as name:
        target = Path(name)
        for old in present:
            (target / old).write_text("old")
        (target / "notes.txt").write_text("mine")
        before = contents(target)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "replace", failing_replace)
            with contextlib.suppress(Killed, OutputError):
                write_run(target, "new")
        new = {"notes.txt": b"mine"} | dict.fromkeys(NAMES, b"new")
        expected = before if failing == 1 and not after else new
        assert {name: current(target / name).read_bytes() for name in expected} == expected
        assert contents(target) == expected


def test_files_of_an_interrupted_switch_are_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, "old")
    with monkeypatch.context() as patch:
        run = RunFolder(tmp_path, NAMES, overwrite=True)
        for name in NAMES:
            run.write(name, "new")
        patch.setattr("cascade.core.run_folder.finish_commit", raise_killed)
        with pytest.raises(Killed):
            run.__exit__(None)
        patch.setattr("cascade.core.run_folder.finish_commit", raise_unwritable)
        for name in NAMES:
            assert (tmp_path / name).read_text() == "old"
            assert current(tmp_path / name).read_text() == "new"
    write_run(tmp_path, "newer")
    assert contents(tmp_path) == dict.fromkeys(NAMES, b"newer")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_a_planted_switch_moves_nothing_out_of_the_folder(tmp_path: Path, name: str) -> None:
    planted = tmp_path / "run" / COMMITTED
    planted.mkdir(parents=True)
    (tmp_path / "outside").write_text("mine")
    (planted / "files.json").write_text(json.dumps({"all": [name], "staged": []}))
    with pytest.raises(OutputError, match="remove it"):
        RunFolder(tmp_path / "run", NAMES)
    assert current(tmp_path / "run/profile.json") == tmp_path / "run/profile.json"
    assert (tmp_path / "outside").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "[", "[]", "{}", '{"all": 1, "staged": 2}'])
def test_a_torn_switch_is_an_output_error(tmp_path: Path, content: str) -> None:
    (tmp_path / COMMITTED).mkdir()
    (tmp_path / COMMITTED / "files.json").write_text(content)
    with pytest.raises(OutputError, match="is torn, remove it"):
        RunFolder(tmp_path, NAMES)


def test_second_writer_of_a_folder_is_rejected_before_it_writes(tmp_path: Path) -> None:
    with RunFolder(tmp_path, ["a"]) as first:
        with pytest.raises(OutputError, match=r"another process is writing to .*wait for it"):
            RunFolder(tmp_path, ["a"], overwrite=True)
        first.write("a", "first")
    assert contents(tmp_path) == {"a": b"first"}
    with pytest.raises(OutputError, match="holds another run"):
        RunFolder(tmp_path, ["a"])


def test_leftovers_of_killed_runs_are_removed_and_those_of_live_ones_kept(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from cascade.core.run_folder import RunFolder\n"
        f"run = RunFolder(Path({str(tmp_path)!r}), ['a']); run.write('a', 'half'); os._exit(9)"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert len(list(tmp_path.iterdir())) == 1  # the second removed what the first left
    with staging_folder(tmp_path) as live:
        with RunFolder(tmp_path, ["a"]) as folder:
            folder.write("a", "whole")
        assert live.is_dir()
    assert contents(tmp_path) == {"a": b"whole"}


def test_files_below_the_folder_are_switched_with_the_others(tmp_path: Path) -> None:
    with RunFolder(tmp_path, ["page.md", "page/a.svg"], optional=["page/b.svg"]) as folder:
        folder.write("page.md", "page")
        folder.write("page/a.svg", "picture")
    assert contents(tmp_path) == {"page": None, "page.md": b"page", "page/a.svg": b"picture"}


def test_optional_file_that_is_not_written_is_removed(tmp_path: Path) -> None:
    for content in ("old", None):
        with RunFolder(tmp_path, ["a"], optional=["b"], overwrite=True) as folder:
            folder.write("a", "new")
            if content is not None:
                folder.write("b", content)
        assert (tmp_path / "b").exists() is (content is not None)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_optional_file_counts_as_a_run(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("of an older run")
    with pytest.raises(OutputError, match="holds another run"):
        RunFolder(tmp_path, ["a"], optional=["b"])

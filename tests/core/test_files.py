"""Files are written atomically, also after failures and interrupts."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.disk import contents, largest_file

from cascade.core.errors import OutputError
from cascade.core.files import RunFolder, atomic_path, check_writable, make_folder, write_text

NAMES = ("profile.json", "profile.npz", "report.html")

ANY_FAILURE = pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])


# --- atomic_path -----------------------------------------------------------------------------


def write_half(path: Path, failure: type[BaseException]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        raise failure


def test_reader_sees_old_content_until_new_content_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert contents(tmp_path) == {"table.csv": b"new"}


def test_temporary_file_is_hidden_in_the_same_folder_and_keeps_its_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "table.npz") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".table-")
        assert temporary.suffix == ".npz"


@ANY_FAILURE
def test_failed_write_leaves_only_the_old_file(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(failure):
        write_half(path, failure)
    assert contents(tmp_path) == {"table.csv": b"old"}


@ANY_FAILURE
def test_failed_write_removes_the_folders_it_created(
    tmp_path: Path, failure: type[BaseException]
) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(failure):
        write_half(tmp_path / "kept/new/newer/table.csv", failure)
    assert contents(tmp_path) == {"kept": None}
    write_text(tmp_path / "kept/new/newer/table.csv", "x")
    assert (tmp_path / "kept/new/newer/table.csv").read_text() == "x"


def test_error_on_a_full_disk_names_path_cause_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with largest_file(1000), pytest.raises(OutputError) as caught:
        write_text(path, "x" * 1001)
    message = str(caught.value)
    assert message.startswith(f"cannot write {path}: ")
    assert os.strerror(errno.EFBIG) in message
    assert "free some space" in message
    assert contents(tmp_path) == {"table.csv": b"old"}


def test_unwritable_folder_is_rejected_on_entry(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file/table.csv", tmp_path / "file/below/table.csv"):
        with pytest.raises(OutputError, match=r"cannot write .*table\.csv: .*choose a folder"):
            atomic_path(path).__enter__()
    assert contents(tmp_path) == {"file": b"in the way"}


def test_check_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("old")
    check_writable(tmp_path / "table.csv")
    check_writable(tmp_path / "new/newer/table.csv")
    assert contents(tmp_path) == {"table.csv": b"old"}
    for path in (tmp_path / "table.csv/x.csv", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match=r"cannot write .*: .*choose a folder"):
            check_writable(path)
    assert contents(tmp_path) == {"table.csv": b"old"}


def test_folder_at_the_path_of_the_file_is_unchanged(tmp_path: Path) -> None:
    (tmp_path / "table.csv").mkdir()
    (tmp_path / "table.csv/inside").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        write_text(tmp_path / "table.csv", "x")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_file_permissions_follow_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "table.csv", "x")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "table.csv").stat().st_mode & 0o777 == mode


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("line\nline\r\n\u00e4")
def test_text_is_written_byte_for_byte(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        write_text(path, text)
        assert path.read_bytes() == text.encode("utf-8")


def test_encoding_error_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "text", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "text", "half a pair: \ud800")
    assert contents(tmp_path) == {"text": b"old"}


# --- make_folder -----------------------------------------------------------------------------


def test_make_folder_returns_only_missing_folders(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "a/b")
    assert made == [tmp_path / "a", tmp_path / "a/b"]
    assert make_folder(tmp_path / "a/b") == []


def test_make_folder_removes_created_parents_on_failure(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"[Nn]ame too long"):
        make_folder(tmp_path / "a" / ("b" * 300))
    assert contents(tmp_path) == {}


# --- RunFolder -------------------------------------------------------------------------------


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
    failure=st.sampled_from([KeyboardInterrupt, PermissionError]),
)
def test_interrupted_commit_leaves_all_files_old_or_all_new(
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
            with contextlib.suppress(KeyboardInterrupt, OutputError):
                write_run(target, "new")
        renames = len(NAMES) + len(present)
        new = {"notes.txt": b"mine"} | dict.fromkeys(NAMES, b"new")
        assert contents(target) == (before if failing <= renames else new)


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

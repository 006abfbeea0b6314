"""Files are written atomically, also after failures and interrupts."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.disk import contents, hide, largest_file

from cascade.core.errors import OutputError
from cascade.core.files import atomic_path, check_writable, files_below, make_folder, write_text

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


def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/c/two", "a", "b/one"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert files_below(tmp_path) == [tmp_path / name for name in ("a", "b/c/two", "b/one")]
    hide(tmp_path / "b/c", monkeypatch)
    with pytest.raises(PermissionError):
        files_below(tmp_path)

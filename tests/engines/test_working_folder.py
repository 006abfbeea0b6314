"""A working folder continues what was asked for, and nothing else."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from support.stacks import one_line

from cascade.core.errors import OutputError
from cascade.engines.working_folder import REQUEST, discard, working_folder

ASKED = {"tokens": 5, "layers": (2, 3), "seed": None}


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))


def work(folder: Path, *, overwrite: bool = False, **changes: object) -> list[str]:
    """Open the folder, write one more file, and return what was there."""
    asked = ASKED | changes
    with working_folder(folder, asked, overwrite=overwrite, doing="working on it") as place:
        found = sorted(path.name for path in place.iterdir() if path.name != REQUEST)
        (place / f"{len(found)}.done").touch()
    return found


def test_the_same_request_continues_until_the_work_is_discarded(tmp_path: Path) -> None:
    folder = tmp_path / "run" / ".work"
    assert [work(folder), work(folder), work(folder)] == [[], ["0.done"], ["0.done", "1.done"]]
    discard(folder)
    assert work(folder) == []


def test_another_request_is_refused_or_replaces(tmp_path: Path) -> None:
    folder = tmp_path / ".work"
    work(folder)
    with pytest.raises(OutputError) as error:
        work(folder, tokens=6)
    assert "holds unfinished work with other arguments (tokens: 5, now 6)" in one_line(error)
    assert work(folder) == ["0.done"]
    assert work(folder, tokens=6, overwrite=True) == []
    assert work(folder, tokens=6, overwrite=True) == ["0.done"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"tokens": 5, "tokens": 5}'])
def test_a_torn_request_is_refused(content: str, tmp_path: Path) -> None:
    folder = tmp_path / ".work"
    work(folder)
    (folder / REQUEST).write_text(content)
    with pytest.raises(OutputError, match=r"its request\.json is torn"):
        work(folder)
    (folder / REQUEST).unlink()
    with pytest.raises(OutputError, match=r"its request\.json is missing"):
        work(folder)


def test_a_failure_before_any_work_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run" / ".work"
    with (
        pytest.raises(ZeroDivisionError),
        working_folder(folder, ASKED, overwrite=False, doing="working on it"),
    ):
        raise ZeroDivisionError
    assert not (tmp_path / "run").exists()


def test_a_failure_after_some_work_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "run" / ".work"

    def fail() -> None:
        with working_folder(folder, ASKED, overwrite=False, doing="working on it") as place:
            (place / "0.done").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert work(folder) == ["0.done"]


def _try(folder: Path, results: multiprocessing.SimpleQueue[str]) -> None:
    try:
        work(folder)
        results.put("")
    except OutputError as error:
        results.put(str(error))


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / ".work"
    context = multiprocessing.get_context("fork")
    results: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    with working_folder(folder, ASKED, overwrite=False, doing="working on it") as place:
        (place / "0.done").touch()
        other = context.Process(target=_try, args=(folder, results))
        other.start()
        other.join()
    assert results.get().startswith(f"another process is working on it {folder}; wait for it")

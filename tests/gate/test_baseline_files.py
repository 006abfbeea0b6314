"""The files of committed baselines: each way to break one is one problem in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.build_evaluations import a_row, an_evaluation
from support.build_profiles import (
    a_profile,
    edited,
    old_arrays,
    provenance,
    write_profile,
    write_rows,
)
from support.commands import python
from support.paths import BASELINES
from support.records import edit_sealed

from cascade.core.errors import UsageError
from cascade.core.records import packed, to_json
from cascade.gate.accepting import store_profile
from cascade.gate.baseline_files import MOST_BYTES, check_files
from cascade.gate.budgets import accept_budgets

FOLDER = Path("baselines")
PROFILE = FOLDER / "tiny/words.saturation.json"
ARRAYS = PROFILE.with_suffix(".npz")
ROWS = PROFILE.with_suffix(".parquet")
BUDGETS = FOLDER / "tiny/words.budgets.json"

#: A profile of a model that was loaded from a file.
LOADED = provenance(model__source="runs/tiny")


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store a profile and budgets in the working folder, and a file that is no baseline."""
    monkeypatch.chdir(tmp_path)
    store_profile(FOLDER, a_profile(about=LOADED))
    accept_budgets(FOLDER, an_evaluation(a_row()))
    (FOLDER / "README.md").write_text("What these files are.")
    (FOLDER / "tiny/heads.safetensors").write_bytes(b"0" * (MOST_BYTES + 1))


pytestmark = pytest.mark.usefixtures("stored")


def problems(*paths: Path) -> list[str]:
    return check_files(paths or [FOLDER]).problems


def test_stored_baselines_have_no_problem() -> None:
    checked = check_files([FOLDER])
    assert (checked.baselines, checked.problems) == ([BUDGETS, PROFILE], [])


def test_the_baselines_of_this_repository_have_no_problem() -> None:
    checked = check_files([BASELINES])
    assert checked.problems == []
    assert len(checked.baselines) == 2


@pytest.mark.parametrize("file", [PROFILE, ARRAYS, ROWS])
def test_any_file_of_a_profile_stands_for_all(file: Path) -> None:
    assert check_files([file]).baselines == [PROFILE]
    write_profile(PROFILE, a_profile(seed=1))
    ARRAYS.unlink()
    assert len(problems(PROFILE)) == 1


# --- Broken files ----------------------------------------------------------------------------


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def of_another_run() -> None:
    kept = PROFILE.read_bytes()
    store_profile(FOLDER, a_profile(seed=1, about=LOADED))
    PROFILE.write_bytes(kept)


def rows_of_another_run() -> None:
    write_rows(ROWS, a_profile(seed=1))


def without_hash(path: Path) -> None:
    record = json.loads(path.read_text())
    del record["hash"]
    path.write_text(to_json(record))


def of_the_first_schema() -> None:
    profile = a_profile(about=LOADED)

    def age(record: dict[str, object]) -> None:
        record["schema"] = 1
        del record["hash"], record["arrays_hash"]

    PROFILE.write_text(to_json(edited(profile, age, sealed=False)))
    ARRAYS.write_bytes(packed(old_arrays(profile)))


def large(path: Path) -> None:
    # Neither JSON nor a zip archive minds: only the size is wrong.
    filler = b" " * MOST_BYTES
    path.write_bytes(filler + path.read_bytes())


def large_rows() -> None:
    # The end of a Parquet file says where its groups are: filler before it changes nothing.
    content = ROWS.read_bytes()
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    ROWS.write_bytes(content[:end] + b" " * MOST_BYTES + content[end:])


def without_points() -> None:
    edit_sealed(BUDGETS, lambda record: record.update(groups=[]))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"

BROKEN: dict[str, tuple[Callable[[], object], str]] = {
    "a number of a profile is edited": (
        lambda: edit(PROFILE, '"tokens": 192', '"tokens": 193'),
        "words.saturation.json was changed after it was written",
    ),
    "a limit is edited": (
        lambda: edit(BUDGETS, '"least": ', '"least": 1'),
        "words.budgets.json was changed after it was written",
    ),
    "a profile is torn": (
        lambda: PROFILE.write_text(PROFILE.read_text()[:500]),
        "words.saturation.json is torn or edited",
    ),
    "budgets are empty": (lambda: BUDGETS.write_text(""), "words.budgets.json is torn or edited"),
    "budgets are a pointer of Git LFS": (
        lambda: BUDGETS.write_text(POINTER),
        "words.budgets.json is torn or edited",
    ),
    "arrays are a pointer of Git LFS": (
        lambda: ARRAYS.write_text(POINTER),
        "words.saturation.npz is torn",
    ),
    "arrays are of another run": (of_another_run, "words.saturation.npz was changed after"),
    "arrays are missing": (ARRAYS.unlink, "no file baselines/tiny/words.saturation.npz"),
    "rows are a pointer of Git LFS": (
        lambda: ROWS.write_text(POINTER),
        "words.saturation.parquet is torn",
    ),
    "rows are torn": (
        lambda: ROWS.write_bytes(ROWS.read_bytes()[:-9]),
        "words.saturation.parquet is torn",
    ),
    "rows are of another run": (rows_of_another_run, "words.saturation.parquet is torn, edited or"),
    "rows are missing": (ROWS.unlink, "no rows baselines/tiny/words.saturation.parquet"),
    "a record is missing": (
        PROFILE.unlink,
        "words.saturation.npz has no words.saturation.json next to it",
    ),
    "a record is a broken link": (
        lambda: (PROFILE.unlink(), PROFILE.symlink_to("elsewhere.json")),
        "no record baselines/tiny/words.saturation.json",
    ),
    "a profile is of another kind": (
        lambda: edit_sealed(PROFILE, lambda record: record.update(kind="budgets")),
        "expected a record of kind saturation, got budgets",
    ),
    "budgets are of an unknown kind": (
        lambda: edit_sealed(BUDGETS, lambda record: record.update(kind="limits")),
        "expected a record of kind budgets, got limits",
    ),
    "a profile is of a newer release": (
        lambda: edit_sealed(PROFILE, lambda record: record.update(schema=99)),
        "has schema 99, this release reads up to 3",
    ),
    "budgets are of a newer release": (
        lambda: edit_sealed(BUDGETS, lambda record: record.update(schema=99)),
        "has schema 99, this release reads up to 1",
    ),
    "a profile has no hash": (of_the_first_schema, "words.saturation.json has no hash"),
    "budgets have no hash": (lambda: without_hash(BUDGETS), "words.budgets.json has no hash"),
    "budgets have no operating point": (without_points, "has no operating point"),
    "a record is too large": (
        lambda: large(BUDGETS),
        r"words.budgets.json has 2,00\d,\d{3} bytes, expected at most 2,000,000",
    ),
    "arrays are too large": (
        lambda: large(ARRAYS),
        r"words.saturation.npz has 2,0\d\d,\d{3} bytes, expected at most 2,000,000",
    ),
    "rows are too large": (
        large_rows,
        r"words.saturation.parquet has 2,0\d\d,\d{3} bytes, expected at most 2,000,000",
    ),
}


@pytest.mark.parametrize(("break_it", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line_that_names_it(
    break_it: Callable[[], object], words: str
) -> None:
    break_it()
    (line,) = problems()
    assert re.search(words, line), line
    assert "baselines/tiny/words." in line
    assert "\n" not in line


def test_every_problem_is_shown() -> None:
    edit(BUDGETS, '"least": ', '"least": 1')
    ARRAYS.unlink()
    assert [line.split(" ")[0] for line in problems()] == [str(BUDGETS), "no"]


# --- Unused files ----------------------------------------------------------------------------


def test_a_baseline_that_is_not_in_a_model_folder_is_unused() -> None:
    for file in (PROFILE, ARRAYS, ROWS):
        file.rename(FOLDER / file.name)
    (line,) = problems()
    assert line == (
        "baselines/words.saturation.json is unused: baselines are looked up as "
        "baselines/<model>/words.saturation.json; move it there"
    )
    assert problems(FOLDER / PROFILE.name) == [line]


def test_a_baseline_that_is_too_deep_is_unused() -> None:
    shutil.copytree(FOLDER / "tiny", FOLDER / "old/tiny")
    lines = problems()
    assert [line.split(":")[0] for line in lines] == [
        "baselines/old/tiny/words.budgets.json is unused",
        "baselines/old/tiny/words.saturation.json is unused",
    ]


def test_a_copy_of_a_baseline_is_unused() -> None:
    shutil.copytree(FOLDER / "tiny", FOLDER / "copy")
    lines = problems()
    assert [line.split(" is unused: ")[0] for line in lines] == [
        "baselines/copy/words.budgets.json",
        "baselines/copy/words.saturation.json",
    ]
    assert "the gate looks for baselines/tiny/words.saturation.json" in lines[1]


def test_a_renamed_baseline_is_used_if_its_record_names_its_sources() -> None:
    (FOLDER / "tiny").rename(FOLDER / "product")
    (line,) = problems()
    # These budgets are of a model in memory, which only its name identifies.
    assert line.startswith("baselines/product/words.budgets.json is unused: for its model tiny and")
    assert problems(FOLDER / "product/words.saturation.json") == []


def test_two_baselines_of_the_same_text_under_other_names_are_unused() -> None:
    for name in ("one", "two"):
        shutil.copytree(FOLDER / "tiny", FOLDER / name)
    shutil.rmtree(FOLDER / "tiny")
    lines = [line for line in problems() if "saturation" in line]
    assert len(lines) == 2
    assert all("expected one baseline of runs/tiny on words.jsonl, got" in line for line in lines)


def test_a_folder_of_baselines_can_have_any_name() -> None:
    FOLDER.rename("gates")
    assert problems(Path("gates")) == []
    assert problems(Path("gates/tiny")) == []
    assert problems(Path("gates/tiny/words.saturation.json")) == []


def test_paths_can_be_relative_to_any_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER / "tiny")
    assert problems(Path()) == []
    assert problems(Path(PROFILE.name)) == []
    monkeypatch.chdir("..")
    assert problems(Path()) == []


# --- Usage -----------------------------------------------------------------------------------


def test_a_path_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="got nowhere, which is missing"):
        check_files([FOLDER, Path("nowhere")])


def test_a_folder_without_baselines_is_refused() -> None:
    Path("empty").mkdir()
    with pytest.raises(UsageError, match=r"got none in empty, baselines/README\.md; store one"):
        check_files([Path("empty"), FOLDER / "README.md"])


def test_no_model_library_is_loaded() -> None:
    code = """
import sys
from pathlib import Path
from cascade.gate.baseline_files import check_files
print(check_files([Path("baselines")]).problems)
heavy = {"torch", "transformers", "datasets", "scipy", "pandas", "matplotlib", "rich"}
print(sorted(heavy & {*sys.modules}))
"""
    assert python("-c", code).out == "[]\n[]\n"

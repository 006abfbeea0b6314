"""A history as a report: what the terminal and the page show of a saved record."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from support.build_history import BASELINE, Repository, drifted, write_profile
from support.html import Page, ids, svgs

from cascade.core.records import to_file, write_record
from cascade.gate.history.history import read_history
from cascade.gate.history.records import HistoryRecord
from cascade.record_kinds import read_record
from cascade.report.history.sections import history_page, print_history

VERSIONS = {"cascade-exit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}


def slow(repository: Repository) -> None:
    for k in range(4):
        torch = {"torch": "2.14.0"} if k > 1 else {}
        repository.accept(drifted(k, versions=VERSIONS | torch), f"Accept {k}")


def sudden(repository: Repository) -> None:
    for k in (0, 9):
        repository.accept(drifted(k), f"Accept {k}")


def mixed(repository: Repository) -> None:
    """A torn version, one of another dtype, and an uncommitted one."""
    slow(repository)
    path = repository.folder / BASELINE
    path.write_text(path.read_text()[:100])
    repository.commit("Torn")
    repository.accept(drifted(3, model__dtype="bfloat16", versions=VERSIONS), "bf16")
    write_profile(path, drifted(4, versions=VERSIONS))


def unchanged(repository: Repository) -> None:
    for k in (0, 0.1):
        repository.accept(drifted(k), "A <b>subject</b> & $x_1$ \x1b[31m")


def single(repository: Repository) -> None:
    repository.accept(drifted(0), "Only one")


def foreign(repository: Repository) -> None:
    repository.accept(drifted(0), "fp32")
    repository.accept(drifted(0, model__dtype="bfloat16"), "bf16")


KINDS: dict[str, Callable[[Repository], None]] = {
    "slow": slow,
    "sudden": sudden,
    "mixed": mixed,
    "unchanged": unchanged,
    "single": single,
    "foreign": foreign,
}


@pytest.fixture
def record(request: pytest.FixtureRequest, tmp_path: Path) -> HistoryRecord:
    """Return a record as it is read back from its file."""
    repository = Repository(tmp_path / "project")
    KINDS[request.param](repository)
    path = tmp_path / "history.json"
    write_record(path, read_history(repository.folder / "baselines", command="cascade history"))
    found = read_record(path, kind="history")
    assert isinstance(found, HistoryRecord)
    return found


def of(*kinds: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("record", kinds, indirect=True)


def printed(record: HistoryRecord, *, width: int = 200) -> str:
    file = io.StringIO()
    print_history(record, Console(file=file, width=width, color_system=None))
    return file.getvalue()


def flat(text: str) -> str:
    return " ".join(text.split())


@of("slow")
def test_slow_drift_is_said_first_with_its_size_and_its_steps(record: HistoryRecord) -> None:
    first = record.series[0].versions[0].name
    text = flat(printed(record))
    assert (
        f"SLOW DRIFT: small steps add up in layer 2: 3 steps moved its mean by +2.25 tolerances "
        f"since {first} (2026-01-01), 3 up and 0 down, the largest by +0.75"
    ) in text
    assert "+2.25 +0.75 3 0 fail, slow" in text
    assert "torch 2.13.0 to 2.14.0" in text


@of("slow")
def test_every_version_is_a_row_with_its_step_and_the_sum(record: HistoryRecord) -> None:
    rows = [row for row in Page(history_page(record)).rows if len(row) == 7]
    names = [version.name for version in record.series[0].versions]
    assert [row[0] for row in rows] == ["version", *names]
    assert [row[2] for row in rows[1:]] == ["-", "+0.75 pass", "+0.75 pass", "+0.75 pass"]
    assert [row[3] for row in rows[1:]] == ["-", "+0.75 pass", "+1.50 fail", "+2.25 fail"]
    assert [row[6] for row in rows[1:]] == [f"Accept {k}" for k in range(4)]


@of("sudden")
def test_a_single_step_beyond_the_limit_is_drift_and_names_the_layer(
    record: HistoryRecord,
) -> None:
    text = flat(printed(record))
    assert "DRIFT: drift in" in text
    assert "SLOW" not in text
    assert "layer 2 moved most, by +6.75 tolerances" in text
    assert "Likely cause layer 2 is the first that moved" in text


@of("mixed")
def test_versions_without_numbers_say_why(record: HistoryRecord) -> None:
    torn, foreign = record.series[0].versions[4:6]
    text = flat(printed(record))
    assert f"Not read {torn.name} (2026-01-05): {torn.name}:{BASELINE} is torn or edited" in text
    assert f"{foreign.name} 2026-01-06 not comparable -" in text
    assert "model.dtype float32 to bfloat16 bf16" in text
    assert "since" in text
    tooltips = re.findall(r"<title>(.*?)</title>", history_page(record))
    assert any(f"{torn.name} (2026-01-05): not read: " in tip for tip in tooltips)
    assert any("not comparable: model.dtype float32 to bfloat16" in tip for tip in tooltips)


@of("unchanged")
def test_no_drift_lists_no_layer_in_the_terminal_and_all_on_the_page(
    record: HistoryRecord,
) -> None:
    assert "NO DRIFT: all 60 cells are within tolerance" in flat(printed(record))
    assert "beyond the limit" not in printed(record)
    rows = [row for row in Page(history_page(record)).rows if len(row) == 9]
    assert [row[0] for row in rows] == ["layer", "1", "2", "3", "3+norm"]


@of("single")
def test_a_single_version_has_a_row_and_no_picture(record: HistoryRecord) -> None:
    assert "ONE VERSION: there is no earlier version to compare with" in flat(printed(record))
    assert svgs(history_page(record)) == []


@of("foreign")
def test_versions_that_are_not_comparable_say_what_differs(record: HistoryRecord) -> None:
    text = flat(printed(record))
    assert "NOT COMPARABLE: " in text
    assert "not comparable with any earlier version: model.dtype float32 to bfloat16" in text
    assert svgs(history_page(record)) == []


@of(*KINDS)
def test_the_page_is_well_formed_loads_nothing_and_shows_no_markup_of_names(
    record: HistoryRecord,
) -> None:
    page = history_page(record)
    read = Page(page)
    assert not read.misnested
    assert not read.open
    assert not {"script", "link", "img", "b"} & {tag for tag, _ in read.tags}
    assert "\x1b" not in page
    every = [one for svg in svgs(page) for one in ids(svg)]
    assert len(every) == len(set(every))
    assert history_page(record) == page


@of("slow", "mixed")
def test_every_layer_of_every_version_is_a_cell_of_both_maps(record: HistoryRecord) -> None:
    (series,) = record.series
    maps = [svg for svg in svgs(history_page(record)) if "Heat map" in svg]
    assert len(maps) == 2
    for drawing in maps:
        root = ElementTree.fromstring(re.sub(r"var\(--(\w+)\)", r"\1", drawing))
        space = "{http://www.w3.org/2000/svg}"
        cells = [
            rect for rect in root.iter(f"{space}rect") if rect.find(f"{space}title") is not None
        ]
        assert len(cells) == 4 * len(series.versions)
        places = {(cell.get("x"), cell.get("y")) for cell in cells}
        assert len(places) == len(cells)
    total, step = maps
    # Beyond its limit in all, and never in one step.
    assert total.count("(FAIL)") == 2 + ("uncommitted" in total)
    assert "(FAIL)" not in step


@of("slow")
def test_a_narrow_ascii_terminal_shows_every_number(record: HistoryRecord) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    print_history(record, Console(file=file, width=40, color_system=None))
    file.seek(0)
    text = file.read()
    for number in ("+0.75", "+1.50", "+2.25"):
        assert number in text


@of("slow")
def test_a_record_with_the_number_of_a_missing_version_is_refused(
    record: HistoryRecord, tmp_path: Path
) -> None:
    from support.records import edit_sealed

    from cascade.core.errors import RecordError

    path = tmp_path / "edited.json"
    path.write_text(to_file(record))
    edit_sealed(path, lambda plain: plain["series"][0].update(first=9))
    with pytest.raises(RecordError, match=r"one of 4 versions at series\[0\].first, got number 9"):
        read_record(path, kind="history")

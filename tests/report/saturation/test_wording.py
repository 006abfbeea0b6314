"""Every kind of profile is shown whole, and other records are refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
from support.build_profile_records import (
    a_full_record,
    a_record,
    all_equal,
    density_figure,
    many_dips,
    named_in_another_script,
    page_of,
    printed,
    profile_figure,
    section,
    some_arrays,
    two_layers,
    without_stable_bands,
)
from support.html import Page, svgs


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "record",
    [
        pytest.param(two_layers(), id="two layers, no cutoff"),
        pytest.param(all_equal(0.7312), id="all equal"),
        pytest.param(all_equal(1.0), id="all one"),
        pytest.param(all_equal(-1.0), id="all minus one"),
        pytest.param(without_stable_bands(), id="no stable band"),
        pytest.param(many_dips(), id="a hundred layers"),
        pytest.param(named_in_another_script(), id="name beyond the font"),
        pytest.param(a_full_record(normed=-0.09), id="negative mean"),
    ],
)
def test_every_kind_of_record_is_drawn_whole(record: dict[str, Any]) -> None:
    text = printed(record)
    assert max(map(len, text.splitlines())) <= 80
    lines = section(text, "Similarity of input and output, per layer")[2:]
    assert [line.split()[0] for line in lines] == [row["layer"] for row in record["layers"]]
    page = page_of(record, some_arrays(record))
    assert Page(page).misnested == []
    assert len(svgs(page)) == 2
    assert max(map(len, svgs(page))) < 300_000
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]*", "", page), re.IGNORECASE)


def test_without_a_cutoff_nothing_is_called_active_or_stable() -> None:
    record = two_layers()
    text = printed(record)
    assert "too few layers to distinguish active from stable ones" in text
    page = "".join(Page(page_of(record, some_arrays(record))).texts)
    assert "There are too few layers to distinguish active from stable ones." in page
    assert "saturated" not in page
    assert "cutoff" not in profile_figure(record)


def test_without_a_norm_row_nothing_is_said_of_the_norm() -> None:
    record = a_record([0.9, 0.95, 0.96])
    assert "norm" not in printed(record)
    assert "norm" not in "".join(Page(profile_figure(record)).texts)
    page = page_of(record, some_arrays(record))
    assert "final norm" not in page


def test_reporting_leaves_record_and_arrays_as_they_were() -> None:
    record = a_full_record()
    arrays = some_arrays(record)
    before = copy.deepcopy((record, arrays["histogram"]))
    printed(record)
    page_of(record, arrays)
    assert record == before[0]
    assert np.array_equal(arrays["histogram"], before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "evaluation"}, 'expected "saturation" at kind, got "evaluation"'),
        ({"kind": None}, 'expected "saturation" at kind, got null'),
        ({"schema": 4}, "expected schema 3, got 4"),
        ({"layers": []}, "expected at least one layer, got none"),
    ],
)
def test_another_record_is_refused_by_every_report(change: dict[str, Any], message: str) -> None:
    record = a_full_record()
    arrays = some_arrays(record)
    record.update(change)
    for report in (
        lambda: printed(record),
        lambda: profile_figure(record),
        lambda: density_figure(record, arrays),
        lambda: page_of(record, arrays),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            report()


def test_an_incomplete_record_is_refused() -> None:
    record = a_full_record()
    del record["structure"]
    with pytest.raises(ValueError, match="expected an object at structure, got nothing"):
        printed(record)


def test_arrays_of_another_record_are_refused() -> None:
    record = a_full_record()
    arrays = some_arrays(record)
    wrong = {
        "expected arrays of the layers": {**arrays, "layers": arrays["layers"][::-1]},
        "expected a histogram of shape": {**arrays, "histogram": arrays["histogram"][1:]},
        "got only zeros": {**arrays, "histogram": np.zeros_like(arrays["histogram"])},
        r"got none of \['histogram'\]": {"layers": arrays["layers"]},
    }
    for message, others in wrong.items():
        with pytest.raises(ValueError, match=message):
            density_figure(record, others)


def test_importing_the_room_loads_no_matplotlib() -> None:
    import subprocess
    import sys

    code = "import cascade.report, sys; print({'matplotlib', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""Records are read with care and compared without holes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk import contents, largest_file
from hypothesis import given
from hypothesis import strategies as st

from cascade.baselines import (
    EXTREME_TOLERANCE,
    TOLERANCE,
    Cell,
    accept,
    baseline_paths,
    compare,
    read_arrays,
    read_record,
    to_json,
    write_arrays,
    write_record,
)
from cascade.errors import OutputError, RecordError
from cascade.statistics import SimilarityStatistics

LAYERS = ["1", "2", "2+norm"]


def statistics_of(seed: int = 0) -> SimilarityStatistics:
    statistics = SimilarityStatistics(LAYERS, np.full((3, 3), 1000))
    values = np.random.default_rng(seed).uniform(0.5, 1, (3, 4, 8)).astype(np.float32)
    statistics.update(values, np.arange(4))
    return statistics


def a_record(seed: int = 0) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "saturation",
        "provenance": {
            "model": {
                "name": "tiny",
                "weights_hash": "sha256:1",
                "quantization": None,
                "dtype": "float32",
            },
            "tokenizer_hash": "sha256:2",
            "corpus": {"name": "words", "fingerprint": "sha256:3"},
        },
        "layers": statistics_of(seed).table(),
    }


def changed(record: dict[str, Any], row: int, **values: Any) -> dict[str, Any]:
    other = copy.deepcopy(record)
    other["layers"][row] |= values
    return other


def test_a_record_equals_itself() -> None:
    comparison = compare(a_record(), a_record())
    assert comparison.verdict == "PASS"
    assert len(comparison.cells) == 3 * 10
    assert comparison.describe().startswith("PASS: 0 of 30 cells")


@pytest.mark.parametrize(
    ("statistic", "tolerance"),
    [
        ("mean", TOLERANCE),
        ("p50", TOLERANCE),
        ("frac_negative", TOLERANCE),
        ("min", EXTREME_TOLERANCE),
        ("max", EXTREME_TOLERANCE),
    ],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_statistic_fails_just_beyond_its_tolerance(
    statistic: str, tolerance: float, sign: int
) -> None:
    record = a_record()
    value = record["layers"][1][statistic]
    within = changed(record, 1, **{statistic: value + sign * 0.9 * tolerance})
    beyond = changed(record, 1, **{statistic: value + sign * 1.1 * tolerance})
    assert compare(within, record).verdict == "PASS"
    comparison = compare(beyond, record)
    assert comparison.verdict == "FAIL"
    [cell] = [cell for cell in comparison.cells if not cell.ok]
    assert (cell.layer, cell.statistic) == ("2", statistic)
    assert cell.difference == pytest.approx(sign * 1.1 * tolerance)
    assert f"difference {cell.difference:>+10.6f}" in comparison.describe()


def test_one_token_more_or_less_fails() -> None:
    record = a_record()
    assert compare(changed(record, 0, count=33), record).verdict == "FAIL"


@pytest.mark.parametrize("value", [float("nan"), None, "0.9", True])
def test_what_is_no_number_fails_on_either_side(value: Any) -> None:
    record = a_record()
    broken = changed(record, 2, p90=value)
    assert compare(broken, record).verdict == "FAIL"
    assert compare(record, broken).verdict == "FAIL"
    # The usual table comparison holds NaN equal to NaN: here both sides broken is broken.
    assert compare(broken, broken).verdict == "FAIL"


def test_a_missing_or_added_layer_or_statistic_fails() -> None:
    record = a_record()
    shorter = copy.deepcopy(record)
    del shorter["layers"][1]
    narrower = copy.deepcopy(record)
    del narrower["layers"][1]["std"]
    for other in (shorter, narrower):
        assert compare(other, record).verdict == "FAIL"
        assert compare(record, other).verdict == "FAIL"


def test_no_layers_at_all_is_no_pass() -> None:
    empty = a_record() | {"layers": []}
    assert compare(empty, empty).verdict == "FAIL"


def test_a_layer_listed_twice_is_refused() -> None:
    record = a_record()
    double = record | {"layers": [*record["layers"], record["layers"][0]]}
    with pytest.raises(RecordError, match="appears twice"):
        compare(double, record)


@pytest.mark.parametrize(
    "path",
    [
        ("model", "weights_hash"),
        ("model", "dtype"),
        ("model", "quantization"),
        ("tokenizer_hash",),
        ("corpus", "fingerprint"),
    ],
)
def test_another_origin_is_not_comparable_whatever_the_numbers(path: tuple[str, ...]) -> None:
    record, other = a_record(), a_record()
    place = other["provenance"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = "another"
    comparison = compare(other, record)
    assert comparison.verdict == "NOT COMPARABLE"
    assert ".".join(path) in comparison.describe()
    assert "another" in comparison.describe()


def test_the_worst_cells_come_first_and_the_rest_are_counted() -> None:
    record = a_record()
    rows = record["layers"]
    other = changed(record, 0, mean=rows[0]["mean"] + 0.01, std=rows[0]["std"] + 0.02)
    other = changed(other, 2, p10=float("nan"))
    lines = compare(other, record).describe(worst=2).splitlines()
    assert lines[0] == "FAIL: 3 of 30 cells beyond tolerance"
    assert "p10" in lines[1]
    assert "std" in lines[2]
    assert lines[3] == "  ... and 1 more"


@given(st.floats(allow_nan=True), st.floats(allow_nan=True))
def test_a_cell_is_in_order_only_where_both_numbers_are_and_are_close(a: float, b: float) -> None:
    cell = Cell("1", "mean", a, b, 0.5)
    assert cell.ok == (np.isfinite([a, b]).all() and abs(b - a) <= 0.5)


def test_json_shows_one_row_a_line_and_reads_back(tmp_path: Path) -> None:
    record = a_record()
    text = to_json(record)
    assert json.loads(text) == record
    rows = [line for line in text.splitlines() if '"p50"' in line]
    assert len(rows) == len(record["layers"])
    write_record(tmp_path / "a.json", record)
    assert read_record(tmp_path / "a.json", kind="saturation") == record


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path / "a.json", {"mean": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 1, "kind": "satu', "torn or edited"),
        ('{"schema": 1, "kind": "evaluation"}', "expected a saturation record, got evaluation"),
        ("[1]", "expected a saturation record, got list"),
        ('{"schema": 2, "kind": "saturation"}', "has schema 2, this release reads up to 1"),
        ('{"kind": "saturation"}', "has schema None"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecordError, match=message):
        read_record(path, kind="saturation")


def test_missing_files_are_named_with_their_remedy(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cascade analyze --output"):
        read_record(tmp_path / "none.json", kind="saturation")
    with pytest.raises(RecordError, match="belongs beside"):
        read_arrays(tmp_path / "none.npz")


def test_a_torn_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_arrays(path, statistics_of().arrays())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RecordError, match="is torn"):
        read_arrays(path)


def a_run(folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    write_record(folder / "profile.json", a_record(seed))
    write_arrays(folder / "profile.npz", statistics_of(seed).arrays())
    return folder


def test_an_accepted_run_is_the_baseline_and_the_next_one_is_compared(tmp_path: Path) -> None:
    store = tmp_path / "baselines"
    path, before = accept(store, a_run(tmp_path / "first"))
    assert path == store / "tiny/words.saturation.json" == baseline_paths(store, a_record())[0]
    assert before is None
    assert read_record(path, kind="saturation") == a_record()
    assert set(read_arrays(path.with_suffix(".npz"))) == set(statistics_of().arrays())
    _, same = accept(store, a_run(tmp_path / "again"))
    assert same is not None
    assert same.verdict == "PASS"
    _, other = accept(store, a_run(tmp_path / "other", seed=1))
    assert other is not None
    assert other.verdict == "FAIL"
    assert read_record(path, kind="saturation") == a_record(1)


def test_files_of_two_runs_are_not_accepted_together(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    write_arrays(run / "profile.npz", statistics_of(seed=1).arrays())
    with pytest.raises(RecordError, match="not of one run"):
        accept(tmp_path / "baselines", run)
    assert not (tmp_path / "baselines").exists()


def test_accepting_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="make one with"):
        accept(tmp_path / "baselines", tmp_path)


@pytest.mark.parametrize("name", ["../../out", "a/b", "a\\b", "", ".", "..", None, 3])
@pytest.mark.parametrize("part", ["model", "corpus"])
def test_a_name_that_leads_out_of_the_folder_is_refused(
    tmp_path: Path, part: str, name: Any
) -> None:
    run = a_run(tmp_path / "run")
    record = a_record()
    record["provenance"][part]["name"] = name
    write_record(run / "profile.json", record)
    with pytest.raises(RecordError, match="expected the provenance to name model and corpus"):
        accept(tmp_path / "deep/baselines", run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("section", ["layers", "provenance"])
def test_a_record_without_one_of_its_sections_is_not_accepted(tmp_path: Path, section: str) -> None:
    run = a_run(tmp_path / "run")
    record = a_record()
    del record[section]
    write_record(run / "profile.json", record)
    with pytest.raises(RecordError):
        accept(tmp_path / "baselines", run)
    assert not (tmp_path / "baselines").exists()


@pytest.mark.parametrize(("name", "value"), [("layers", None), ("total", np.array(["x"] * 3))])
def test_arrays_that_were_edited_are_not_accepted(tmp_path: Path, name: str, value: Any) -> None:
    run = a_run(tmp_path / "run")
    arrays = statistics_of().arrays()
    arrays.pop(name)
    write_arrays(run / "profile.npz", arrays if value is None else arrays | {name: value})
    with pytest.raises(RecordError, match="torn or edited"):
        accept(tmp_path / "baselines", run)


def test_nan_in_a_record_is_not_accepted(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    text = (run / "profile.json").read_text(encoding="utf-8")
    (run / "profile.json").write_text(text.replace('"schema": 1', '"schema": 1, "x": NaN'))
    with pytest.raises(RecordError, match="torn or edited"):
        accept(tmp_path / "baselines", run)


def test_a_disk_that_fills_while_accepting_leaves_the_old_pair(tmp_path: Path) -> None:
    store = tmp_path / "baselines"
    accept(store, a_run(tmp_path / "first"))
    before = contents(store)
    second = a_run(tmp_path / "second", seed=1)
    with largest_file(100), pytest.raises(OutputError, match="unharmed"):
        accept(store, second)
    assert contents(store) == before

"""Baselines: profiles are read with checks, sealed and stored atomically."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.build_profiles import (
    a_profile,
    edited,
    old_arrays,
    plain_record,
    provenance,
    save_run,
)
from support.disk import contents, largest_file

from cascade.core.errors import OutputError, RecordError
from cascade.core.records import (
    packed,
    read_arrays,
    read_plain,
    to_json,
    write_arrays,
    write_record,
)
from cascade.core.schema import to_plain
from cascade.gate.accepting import accept
from cascade.gate.baselines import (
    StoredProfile,
    baseline_paths,
    profile_path,
    read_profile,
    seal,
)
from cascade.saturation.records import ProfileRecord


def a_record(seed: int = 0) -> ProfileRecord:
    return a_profile(4, seed=seed).record()


def test_json_has_one_table_row_per_line_and_reads_back(tmp_path: Path) -> None:
    record = plain_record(a_profile(4))
    text = to_json(record)
    assert json.loads(text) == record
    rows = [line for line in text.splitlines() if '"p50"' in line]
    assert len(rows) == len(record["layers"])
    write_record(tmp_path / "a.json", record)
    assert read_plain(tmp_path / "a.json", ProfileRecord) == record


def test_numpy_integers_are_written_as_integers_and_other_objects_raise() -> None:
    assert json.loads(to_json({"layers": [np.int64(29)]})) == {"layers": [29]}
    with pytest.raises(TypeError):
        to_json({"layers": [object()]})


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path / "a.json", {"mean": float("nan")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 1, "kind": "satu', "torn or edited"),
        ('{"schema": 1, "kind": "evaluation"}', "record of kind saturation, got evaluation"),
        ("[1]", "record of kind saturation, got list"),
        (
            '{"schema": 4, "kind": "saturation",'
            ' "provenance": {"versions": {"cascade-exit": "9"}}}',
            "has schema 4, this release reads up to 3; use cascade-exit 9 or a later one",
        ),
        ('{"schema": 4, "kind": "saturation"}', "use cascade-exit of the release that wrote it"),
        ('{"kind": "saturation"}', "has schema None, expected a whole number from 1 to 3"),
        ('{"schema": "2", "kind": "saturation"}', "has schema '2', expected a whole number"),
        ('{"schema": true, "kind": "saturation"}', "has schema True, expected a whole number"),
        ('{"schema": 0, "kind": "saturation"}', "has schema 0, expected a whole number"),
    ],
)
def test_files_that_are_not_records_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(RecordError, match=message):
        read_plain(path, ProfileRecord)


def test_a_missing_file_gives_an_error_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cascade analyze --output"):
        read_plain(tmp_path / "none.json", ProfileRecord)
    with pytest.raises(RecordError, match="expected it next to"):
        read_arrays(tmp_path / "none.npz")


def test_a_torn_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_arrays(path, a_profile(4).arrays())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RecordError, match="is torn"):
        read_arrays(path)


def a_run(folder: Path, seed: int = 0) -> Path:
    return save_run(folder, a_profile(4, seed=seed))


def test_accept_stores_the_run_and_returns_the_previous_baseline(tmp_path: Path) -> None:
    store = tmp_path / "baselines"
    path, before = accept(store, a_run(tmp_path / "first"))
    assert path == store / "tiny/words.saturation.json" == profile_path(store, a_record())
    assert before is None
    first = read_profile(path)
    assert first.record() == a_record()
    assert set(first.arrays()) == set(a_profile(4).arrays())
    _, before = accept(store, a_run(tmp_path / "other", seed=1))
    assert before is not None
    assert before.record() == a_record()
    assert read_profile(path).record() == a_record(1)
    assert sorted(contents(store)) == [
        "tiny",
        "tiny/words.saturation.json",
        "tiny/words.saturation.npz",
        "tiny/words.saturation.parquet",
    ]


def test_accept_replaces_a_torn_baseline(tmp_path: Path) -> None:
    store = tmp_path / "baselines"
    path, _ = accept(store, a_run(tmp_path / "first"))
    path.write_text(path.read_text()[:-50])
    _, before = accept(store, a_run(tmp_path / "other", seed=1))
    assert before is None
    assert read_profile(path).record() == a_record(1)


def test_files_of_two_runs_are_not_accepted_together(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "profile.npz").write_bytes(packed(a_profile(4, seed=1).state))
    with pytest.raises(RecordError, match=r"profile\.npz was changed after it was written"):
        accept(tmp_path / "baselines", run)
    assert not (tmp_path / "baselines").exists()


def test_accepting_an_empty_folder_names_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="make one with"):
        accept(tmp_path / "baselines", tmp_path)


@pytest.mark.parametrize("name", ["../../out", "a/b", "a\\b", "", ".", ".."])
@pytest.mark.parametrize("part", ["model", "corpus"])
def test_a_name_that_leads_out_of_the_folder_is_refused(
    tmp_path: Path, part: str, name: str
) -> None:
    profile = a_profile(4, about=provenance(**{f"{part}__name": name}))
    with pytest.raises(RecordError, match="expected the provenance to name model and corpus"):
        accept(tmp_path / "deep/baselines", save_run(tmp_path / "run", profile))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_baseline_without_a_name_has_no_path() -> None:
    for names in ({"model": None, "corpus": "words"}, {"model": "tiny", "corpus": None}):
        with pytest.raises(RecordError, match=r"expected the provenance to name .*, got None"):
            baseline_paths(Path("baselines"), "saturation", **names)


@pytest.mark.parametrize("name", [None, 3])
@pytest.mark.parametrize("part", ["model", "corpus"])
def test_a_name_that_is_not_text_is_refused(tmp_path: Path, part: str, name: Any) -> None:
    profile = a_profile(4)

    def edit(record: dict[str, Any]) -> None:
        record["provenance"][part]["name"] = name

    run = save_run(tmp_path / "run", profile, edited(profile, edit, sealed=True))
    words = rf"torn or edited \(expected .*provenance\.{part}\.name"
    if (part, name) == (
        "model",
        None,
    ):  # allowed for a model in memory, but such a profile has no path
        words = "expected the provenance to name model and corpus, got None"
    with pytest.raises(RecordError, match=words):
        accept(tmp_path / "deep/baselines", run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def number(record: dict[str, Any]) -> None:
    record["layers"][1]["mean"] += 1e-6


#: Manual edits of a record. Even sealed again, the result is not a valid profile.
EDITS: dict[str, Any] = {
    "a number": number,
    "a layer missing": lambda record: record["layers"].pop(),
    "a layer twice": lambda record: record["layers"].append(record["layers"][0]),
    "no layers": lambda record: record.pop("layers"),
    "another table": lambda record: record.update(layers=[1, 2]),
    "an older schema": lambda record: record.update(schema=1),
    "no provenance": lambda record: record.pop("provenance"),
    "no corpus": lambda record: record["provenance"].pop("corpus"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_manual_edit_is_detected(tmp_path: Path, name: str) -> None:
    run = save_run(tmp_path / "run", a_profile(4), edited(a_profile(4), EDITS[name], sealed=False))
    with pytest.raises(
        RecordError, match=r"profile\.json was changed after it was written \(expected hash"
    ):
        read_profile(run)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a number", "from different runs"),
        ("a layer missing", "from different runs"),
        ("a layer twice", "got layer 1 twice"),
        ("no layers", "has no table of layers"),
        ("another table", "has no table of layers"),
        ("no provenance", "has no provenance of its model"),
        ("no corpus", "has no provenance of its corpus"),
    ],
)
def test_an_edit_that_was_sealed_again_is_checked_against_the_arrays(
    tmp_path: Path, name: str, message: str
) -> None:
    run = save_run(tmp_path / "run", a_profile(4), edited(a_profile(4), EDITS[name], sealed=True))
    with pytest.raises(RecordError, match=message):
        read_profile(run)


@pytest.mark.parametrize("name", ["hash", "arrays_hash"])
def test_a_missing_seal_is_detected(tmp_path: Path, name: str) -> None:
    record = edited(a_profile(4), lambda record: record.pop(name), sealed=False)
    with pytest.raises(RecordError, match=r"was changed after it was written|to be named hash"):
        read_profile(save_run(tmp_path / "run", a_profile(4), record))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", None),
        ("total", np.array(["x"] * 4)),
        ("rows_hash", None),
        ("sequence_fingerprint", None),
    ],
)
def test_arrays_that_are_not_statistics_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    profile = a_profile(4)
    arrays = {key: part for key, part in profile.state.items() if key != name}
    arrays |= {} if value is None else {name: value}
    run = save_run(
        tmp_path / "run", StoredProfile(seal(profile.content, arrays), arrays, profile.rows)
    )
    with pytest.raises(RecordError, match="torn or edited"):
        read_profile(run)


def test_a_missing_fingerprint_is_refused(tmp_path: Path) -> None:
    profile = a_profile(4)
    arrays = profile.state | {"sequence_fingerprint": profile.state["sequence_fingerprint"][:-1]}
    run = save_run(
        tmp_path / "run", StoredProfile(seal(profile.content, arrays), arrays, profile.rows)
    )
    with pytest.raises(RecordError, match="torn, edited or of another run"):
        read_profile(run)


def test_nan_in_a_record_is_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    text = (run / "profile.json").read_text(encoding="utf-8")
    (run / "profile.json").write_text(text.replace('"schema": 3', '"schema": 3, "x": NaN'))
    with pytest.raises(RecordError, match="contains NaN"):
        accept(tmp_path / "baselines", run)


def test_a_missing_npz_gives_an_error_with_its_name(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run / "profile.npz").unlink()
    with pytest.raises(RecordError, match=r"no file .*profile\.npz; expected it next to"):
        read_profile(run)


def test_unsealed_records_of_schema_1_are_still_read(tmp_path: Path) -> None:
    old = a_profile(4)
    sealed = ("hash", "arrays_hash", "noise")
    content = {k: v for k, v in plain_record(old).items() if k not in sealed} | {"schema": 1}
    run = save_run(tmp_path / "run", old, content)
    (run / "profile.npz").write_bytes(packed(old_arrays(old)))
    (run / "profile.parquet").unlink()
    found = read_profile(run)
    assert to_plain(found.record()) == content
    assert np.array_equal(found.rows.all().statistics(), old.rows.all().statistics())
    assert found.arrays().keys() == old.arrays().keys() - {"rows_hash"}
    number(content)
    save_run(tmp_path / "edited", old, content)
    (tmp_path / "edited/profile.npz").write_bytes(packed(old_arrays(old)))
    with pytest.raises(RecordError, match="from different runs"):
        read_profile(tmp_path / "edited")


def test_accept_keeps_unknown_keys(tmp_path: Path) -> None:
    profile = a_profile(4)
    record = edited(profile, lambda record: record.update(novel="of a later release"), sealed=True)
    run = save_run(tmp_path / "run", profile, record)
    path, _ = accept(tmp_path / "baselines", run)
    assert path.read_bytes() == (run / "profile.json").read_bytes()
    assert read_profile(path).record() == read_profile(run).record()


def test_a_full_disk_leaves_the_previous_baseline_unharmed(tmp_path: Path) -> None:
    store = tmp_path / "baselines"
    accept(store, a_run(tmp_path / "first"))
    before = contents(store)
    second = a_run(tmp_path / "second", seed=1)
    with largest_file(100), pytest.raises(OutputError, match="unharmed"):
        accept(store, second)
    assert contents(store) == before


def test_concurrent_writers_leave_one_complete_baseline(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / f"run{seed}", seed) for seed in range(4)]
    store = tmp_path / "baselines"
    with ThreadPoolExecutor(8) as pool:
        # Whichever writer comes last, all files must be from the same run.
        for done in [pool.submit(accept, store, run) for run in runs * 12]:
            done.result()
    left = read_profile(profile_path(store, a_record()))
    assert left.record() in [a_record(seed) for seed in range(4)]
    assert len(contents(store)) == 4

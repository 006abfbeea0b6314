"""Broken and foreign shards: each is refused by name. A full disk leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.build_profiles import similarities_of
from support.build_shards import planned, write
from support.disk import contents, largest_file
from support.records import edit_sealed

from cascade.core.errors import OutputError, RecordError
from cascade.core.provenance import library_versions
from cascade.shards.measuring import measure_shard
from cascade.shards.merging import merge
from cascade.shards.plan import Plan

VALUES = similarities_of(8)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    found = planned(tmp_path / "plan", VALUES, [2, 4, 6])
    for number in range(4):
        write(found, VALUES, number)
    return found


def flipped(path: Path) -> None:
    """Change one byte of a column of means, which Parquet stores without a checksum."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    content[place] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def edited(folder: Path) -> None:
    path = folder / "shard.json"
    path.write_text(path.read_text().replace('"seconds": 0.5', '"seconds": 0.6'))


def from_another_shard(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copy(folder.parent / "00001" / name, folder / name)  # type: ignore[return-value]


def of_other_versions(folder: Path) -> None:
    versions = library_versions() | {"torch": "1.0"}
    edit_sealed(folder / "shard.json", lambda record: record.update(versions=versions))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of the rows": (lambda at: flipped(at / "rows.parquet"), "00002/rows.parquet is torn"),
    "rows truncated": (lambda at: truncated(at / "rows.parquet"), "00002/rows.parquet is torn"),
    "no rows": (lambda at: (at / "rows.parquet").unlink(), "no rows .*00002/rows.parquet"),
    "rows of another shard": (from_another_shard("rows.parquet"), "00002/rows.parquet is torn"),
    "state truncated": (lambda at: truncated(at / "state.npz"), "00002/state.npz is torn"),
    "state of another shard": (from_another_shard("state.npz"), "00002/state.npz was changed"),
    "no state": (lambda at: (at / "state.npz").unlink(), "no file .*00002/state.npz"),
    "record edited": (edited, "00002/shard.json was changed after it was written"),
    "record truncated": (lambda at: truncated(at / "shard.json"), "00002/shard.json is torn"),
    "no record": (lambda at: (at / "shard.json").unlink(), "no record .*00002/shard.json"),
    "record of another shard": (
        from_another_shard("shard.json"),
        "00002/shard.json is shard 1 of sequences 2 to 3, expected shard 2 of 4 to 5",
    ),
    "of another plan": (
        lambda at: edit_sealed(at / "shard.json", lambda r: r.update(plan_hash="sha256:other")),
        "00002/shard.json is of another plan",
    ),
    "of another version": (of_other_versions, "00002/shard.json was measured with torch 1.0"),
    "of a newer release": (
        lambda at: edit_sealed(at / "shard.json", lambda record: record.update(schema=99)),
        "00002/shard.json has schema 99",
    ),
}


@pytest.mark.parametrize(("break_it", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_or_foreign_shard_is_refused_by_name(
    plan: Plan, tmp_path: Path, break_it: Callable[[Path], object], words: str
) -> None:
    break_it(plan.shard_folder(2))
    for use in (lambda: merge(plan, tmp_path / "run"), lambda: measure_shard(plan, 2)):
        with pytest.raises(RecordError, match=words) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_refusal_says_what_to_do(plan: Plan, tmp_path: Path) -> None:
    truncated(plan.shard_folder(2) / "state.npz")
    with pytest.raises(RecordError) as caught:
        merge(plan, tmp_path / "run")
    folder = plan.shard_folder(2)
    assert f"remove {folder} and run `cascade measure-shard {plan.folder} --shard 2`" in str(
        caught.value
    )


def test_a_shard_of_another_model_is_of_another_plan(plan: Plan, tmp_path: Path) -> None:
    other = planned(tmp_path / "other", VALUES, [2, 4, 6], batch_size=1)
    write(other, VALUES, 2)
    shutil.rmtree(plan.shard_folder(2))
    shutil.copytree(other.shard_folder(2), plan.shard_folder(2))
    with pytest.raises(RecordError, match="is of another plan"):
        merge(plan, tmp_path / "run")


def test_a_complete_shard_is_not_written_again(plan: Plan) -> None:
    before = contents(plan.folder)
    assert not write(plan, similarities_of(8, seed=5), 2)
    assert contents(plan.folder) == before


@pytest.mark.parametrize("size", [100, 1500, 2500])
def test_a_full_disk_leaves_no_shard_and_the_next_try_completes_it(
    tmp_path: Path, size: int
) -> None:
    plan = planned(tmp_path / "plan", VALUES, [2, 4, 6])
    with largest_file(size), pytest.raises(OutputError, match="cannot write") as caught:
        write(plan, VALUES, 0)
    assert "00000" in str(caught.value)
    assert contents(plan.folder / "shards") == {}
    assert write(plan, VALUES, 0)


def test_the_files_of_a_shard_are_readable_by_others(plan: Plan) -> None:
    for path in (plan.shard_folder(0), *plan.shard_folder(0).iterdir()):
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_the_record_of_a_shard_names_its_plan_and_machine(plan: Plan) -> None:
    record = json.loads((plan.shard_folder(3) / "shard.json").read_text())
    assert (record["kind"], record["number"], record["first"], record["end"]) == ("shard", 3, 6, 8)
    assert record["plan_hash"] == plan.hash
    assert record["machine"]["threads"] >= 1
    assert "engine" not in record

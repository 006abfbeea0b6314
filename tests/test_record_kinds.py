"""Every kind of record can be read by its name, and is described in the docs."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

import pytest
from support.paths import DOCS
from support.records_page import records_page

import cascade
from cascade.core.errors import RecordError
from cascade.core.schema import StoredRecord
from cascade.record_kinds import KINDS, json_schema, read_record, record_type


def kinds_of(base: type[StoredRecord]) -> set[type[StoredRecord]]:
    """Return the classes below a class that are records of a kind, not bases of others."""
    found = {each for each in base.__subclasses__() if "KIND" in vars(each)}
    return found.union(*(kinds_of(each) for each in base.__subclasses__()))


def test_every_stored_record_of_the_package_is_a_known_kind() -> None:
    for found in pkgutil.walk_packages(cascade.__path__, "cascade."):
        if "__main__" not in found.name:
            importlib.import_module(found.name)
    classes = {each for each in kinds_of(StoredRecord) if each.__module__[:8] == "cascade."}
    assert {record_type(kind) for kind in KINDS} == classes
    assert {kind: record_type(kind).KIND for kind in KINDS} == {kind: kind for kind in KINDS}


def test_an_unknown_kind_names_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"a kind of record among .*evaluation.*, got 'x'"):
        record_type("x")


def test_a_record_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"kind": "evaluation", "schema": 1}))
    with pytest.raises(RecordError, match="expected a record of kind calibration, got evaluation"):
        read_record(path, kind="calibration")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_json_schema_with_its_kind_and_schema(kind: str) -> None:
    schema = json_schema(kind)
    own = schema["$defs"][record_type(kind).__name__]["properties"]
    # A saved cascade has always had its kind first.
    first = ["kind", "schema"] if kind == "cascade" else ["schema", "kind"]
    assert list(own)[:2] == first
    assert own["kind"]["enum"] == [kind]


def test_the_reference_of_records_is_what_the_types_say(request: pytest.FixtureRequest) -> None:
    path = DOCS / "reference/records.md"
    if request.config.getoption("--force-regen", default=False):
        path.write_text(records_page(), encoding="utf-8")
    assert path.read_text(encoding="utf-8") == records_page(), (
        "docs/reference/records.md is not what the types say; make it again with "
        "`pytest tests/test_record_kinds.py --force-regen`"
    )

"""Long contexts in pytest: regenerated, checked, and turned off."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.plugin_project import INI, failure, mended, properties, ran
from support.tiny_models import save_checkpoint

from cascade.core.schema import known
from cascade.gate.baselines import read_profile
from cascade.saturation.records import LongContext

#: A conftest that freezes positions beyond 128, as a project plants a fault.
FROZEN = """
import pytest
from support.long_faults import frozen_beyond

@pytest.fixture(scope="session")
def cascade_model(cascade_model):
    with frozen_beyond(128)(cascade_model):
        yield cascade_model
"""
ONLY = ("-m", "saturation")


@pytest.fixture
def long_project(project: pytest.Pytester) -> pytest.Pytester:
    """A project whose model has 512 positions, with its baseline."""
    folder = save_checkpoint(project.path / "long", max_position_embeddings=512)
    project.path.joinpath("pytest.ini").write_text(INI.format(model=folder))
    ran(project, *ONLY, "--regen-all").assert_outcomes(passed=1, deselected=1)
    return project


def long_context() -> LongContext | None:
    (path,) = Path("baselines").glob("*/*.saturation.json")
    return known(read_profile(path).record().long_context)


def test_a_fault_planted_in_a_conftest_fails_unless_long_contexts_are_not_checked(
    long_project: pytest.Pytester,
) -> None:
    ran(long_project, *ONLY).assert_outcomes(passed=1, deselected=1)
    long_project.makeconftest(FROZEN)
    done = ran(long_project, *ONLY, "--junitxml", "junit.xml", "--cascade-report", "out")
    done.assert_outcomes(failed=1, deselected=1)
    assert failure(done).startswith("FAIL: positions beyond 128 differ from the baseline; ")
    (found,) = properties("junit.xml")
    assert found["cascade_worst_cell"] == "positions 129 to 192 layer 1"
    for name in ("report.md", "report.html"):
        page = Path("out", name).read_text(encoding="utf-8")
        assert "by ranges of positions" in page
        assert "129 to 192" in page
    off = ran(long_project, *ONLY, "--cascade-no-long-context")
    off.assert_outcomes(passed=1, deselected=1)
    mended(long_project)
    ran(long_project, *ONLY).assert_outcomes(passed=1, deselected=1)


def test_regenerating_keeps_the_length_of_the_baseline(long_project: pytest.Pytester) -> None:
    expected = LongContext(length=512, sequences=2, ranges=8)
    assert long_context() == expected
    again = ("--regen-all", "--cascade-no-long-context")
    ran(long_project, *ONLY, *again).assert_outcomes(passed=1, deselected=1)
    assert long_context() == expected

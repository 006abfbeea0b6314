"""Baselines are looked up in the project first, then among those that ship with the package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from support.commands import Run
from support.paths import ROOT

from cascade import __version__
from cascade.core.errors import RecordError
from cascade.gate import baseline_lookup
from cascade.gate.baseline_lookup import described, find_baseline, is_shipped, shipped_baselines
from cascade.gate.baselines import read_profile
from cascade.models.checkpoints.weights import model_name

NAMES = {"model": "tiny", "corpus": "texts"}
FILE = Path("tiny/texts.saturation.json")
REFERENCE = Path("smollm2-135m-instruct-q4_1/embedded.saturation.json")


def touched(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with one baseline; return the folder of its baselines."""
    touched(tmp_path / "site-packages/cascade/data/baselines" / FILE)
    touched(tmp_path / "site-packages/cascade/data/baselines/tiny/texts.budgets.json")
    monkeypatch.setattr(baseline_lookup, "PACKAGE", tmp_path / "site-packages/cascade")
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "site-packages/cascade/data/baselines"


def test_without_a_local_baseline_the_shipped_one_is_found(package: Path) -> None:
    found = find_baseline(None, "saturation", **NAMES)
    assert found == package / FILE
    assert is_shipped(found)
    assert described(found) == f"{found} (shipped with cascade {__version__})"


def test_a_local_baseline_comes_before_the_shipped_one(package: Path) -> None:
    own = touched(Path("baselines") / FILE)
    found = find_baseline(None, "saturation", **NAMES)
    assert found == own
    assert described(found) == str(own)
    elsewhere = touched(Path("kept") / FILE)
    assert find_baseline(None, "saturation", **NAMES, local=Path("kept")) == elsewhere


def test_a_local_folder_without_this_baseline_does_not_hide_the_shipped_one(package: Path) -> None:
    touched(Path("baselines/other/texts.saturation.json"))
    assert find_baseline(None, "saturation", **NAMES) == package / FILE


def test_only_the_folder_that_the_user_names_is_searched(package: Path) -> None:
    named = Path("named")
    assert find_baseline(named, "saturation", **NAMES) == named / FILE
    touched(Path("baselines") / FILE)
    assert find_baseline(named, "saturation", **NAMES) == named / FILE


def test_a_missing_baseline_has_the_path_in_the_local_folder(package: Path) -> None:
    found = find_baseline(None, "saturation", model="other", corpus="texts")
    assert found == Path("baselines/other/texts.saturation.json")
    # Budgets need fitted heads, which do not ship.
    budgets = find_baseline(None, "budgets", **NAMES)
    assert budgets == Path("baselines/tiny/texts.budgets.json")


@pytest.mark.parametrize("name", ["", "..", "a/b", None])
def test_a_name_that_leads_out_of_the_folder_is_refused(package: Path, name: str | None) -> None:
    with pytest.raises(RecordError, match="expected the provenance to name model and corpus"):
        find_baseline(None, "saturation", model=name, corpus="texts")


def test_a_folder_next_to_an_installed_package_is_not_taken_for_a_source_tree(
    package: Path,
) -> None:
    shutil.rmtree(package)
    touched(package.parents[2] / "baselines" / FILE)
    assert shipped_baselines() is None
    assert find_baseline(None, "saturation", **NAMES) == Path("baselines") / FILE
    touched(package.parents[2] / "pyproject.toml")
    assert shipped_baselines() == package.parents[2] / "baselines"


def test_the_reference_baseline_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = model_name("smollm2-135m")
    path = find_baseline(None, "saturation", model=name, corpus="embedded")
    assert is_shipped(path)
    assert read_profile(path).record() == read_profile(ROOT / "baselines" / REFERENCE).record()


# --- The command -----------------------------------------------------------------------------


@pytest.fixture
def gated(run: Run, models: Path) -> Run:
    """Run `cascade gate` on the tiny model and the corpus at hand."""
    given = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--seq-len", 16)
    return lambda *options: run("gate", *given, *options)


@pytest.fixture
def shipped(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Ship a baseline of the tiny model with the package; return its folder of baselines."""
    given = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--seq-len", 16)
    assert run("analyze", *given, "--output", "run").status == 0
    folder = tmp_path / "cascade/data/baselines"
    assert run("accept", "run", "--baselines", folder).status == 0
    monkeypatch.setattr(baseline_lookup, "PACKAGE", tmp_path / "cascade")
    return folder


def test_the_gate_uses_the_shipped_baseline_from_any_folder_and_says_so(
    gated: Run, shipped: Path
) -> None:
    done = gated()
    assert done.status == 0, done.err
    assert done.out.startswith("PASS")
    assert f"Baseline: {shipped / FILE} (shipped with cascade {__version__})" in done.err
    shutil.copytree(shipped, "baselines")
    done = gated()
    assert done.status == 0
    assert f"Baseline: baselines/{FILE}\n" in done.err


def test_a_missing_baseline_is_reported_before_the_model_is_loaded(
    gated: Run, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("cascade.models.loading.load", load)
    for options in (("--baselines", "named"), ("--corpus", "embedded"), ("--baseline", "no.json")):
        done = gated(*options)
        assert (done.status, done.out) == (2, "")
        assert len(done.err.strip().splitlines()) == 1
        assert re.match("cascade: no (baseline .*|record no.json); make one with", done.err)

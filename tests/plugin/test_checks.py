"""The check of profiles: the life cycle of a baseline, and what is not comparable."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.build_profiles import (
    a_profile,
)
from support.commands import TEXTS
from support.disk import contents
from support.plugin_project import (
    BASELINE,
    BROKEN_CACHE,
    STORED,
    broken,
    failure,
    mended,
    properties,
    ran,
    typed,
)

from cascade.core.records import packed
from cascade.gate import baseline_lookup
from cascade.gate.baselines import read_profile
from cascade.gate.budgets import SLACK
from cascade.models import loading

# --- Life cycle of a baseline ---------------------------------------------------------------------


def test_life_cycle_of_a_baseline(project: pytest.Pytester) -> None:
    only = ("-m", "saturation")
    missing = ran(project, *only, "--cascade-report", "out")
    missing.assert_outcomes(failed=1, deselected=1)
    assert failure(missing).startswith(f"no baseline {BASELINE}; create it with `cascade analyze ")
    assert len(failure(missing).splitlines()) == 1
    report = json.loads(Path("out/report.json").read_text())
    assert report["verdict"] == "FAIL"
    (entry,) = report["missing"]
    assert entry["path"] == str(BASELINE)
    assert re.fullmatch("cascade analyze .* && cascade accept RUN .*", entry["command"])
    assert not Path("baselines").exists()

    made = ran(project, *only, "--force-regen")
    made.assert_outcomes(failed=1, deselected=1)
    assert (
        failure(made)
        == f"regenerated {BASELINE} (--force-regen); review it, commit it, and run again"
    )
    whole = read_profile(project.path / BASELINE)
    record = whole.record()
    assert record.noise
    assert record.noise.repeat < 1e-6
    assert record.provenance.corpus.records == len(TEXTS)
    assert "--force-regen" in str(record.provenance.command)

    ran(project, *only).assert_outcomes(passed=1, deselected=1)

    broken(project)
    changed = ran(project, *only)
    changed.assert_outcomes(failed=1, deselected=1)
    assert failure(changed).startswith("FAIL: drift in ")
    assert "one layer: layer 3: the weights of" in failure(changed)

    again = ran(project, *only, "--force-regen")
    again.assert_outcomes(failed=1, deselected=1)
    assert "Compared with the previous baseline:\nFAIL: drift" in failure(again)
    assert "layer 3 is the first that moved" in failure(again)
    ran(project, *only).assert_outcomes(passed=1, deselected=1)
    mended(project)
    ran(project, *only).assert_outcomes(failed=1, deselected=1)


def test_a_broken_kv_cache_fails_unless_only_the_prefill_is_checked(
    guarded: pytest.Pytester,
) -> None:
    guarded.makeconftest(BROKEN_CACHE)
    only = ("-m", "saturation")
    done = ran(guarded, *only, "--junitxml", "junit.xml", "--cascade-report", "out")
    done.assert_outcomes(failed=1, deselected=1)
    assert failure(done).startswith("FAIL: decoding differs from the prefill from layer 3 on; ")
    (found,) = properties("junit.xml")
    assert (found["cascade_verdict"], found["cascade_worst_cell"]) == ("FAIL", "decoding layer 3")
    (entry,) = json.loads(Path("out/report.json").read_text())["comparisons"]
    assert entry["attribution"]["cause"] == "decoding"
    assert "Decoding compared with the prefill" in Path("out/report.md").read_text()
    ran(guarded, *only, "--cascade-prefill-only").assert_outcomes(passed=1, deselected=1)


def test_the_shipped_baseline_is_used_and_never_written_to(
    project: pytest.Pytester, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = project.path / "site/cascade"
    shutil.copytree(made, package / "data/baselines")
    monkeypatch.setattr(baseline_lookup, "PACKAGE", package)
    before = contents(package)
    only = ("-m", "saturation")
    kept = ran(project, *only)
    kept.assert_outcomes(passed=1, deselected=1)
    shipped = package / "data" / BASELINE
    kept.stdout.fnmatch_lines([f"Baseline: *{BASELINE} (shipped with cascade *)"])
    assert shipped.exists()
    named = ran(project, *only, "--cascade-baselines", "baselines")
    named.assert_outcomes(failed=1, deselected=1)
    assert failure(named).startswith(f"no baseline {BASELINE}")

    broken(project)
    again = ran(project, *only, "--force-regen")
    assert failure(again).startswith(f"regenerated {BASELINE}")
    own = ran(project, *only)
    own.assert_outcomes(passed=1, deselected=1)
    assert "shipped with" not in str(own.stdout)
    assert contents(package) == before


@pytest.mark.parametrize(("marker", "path"), [("saturation", BASELINE), ("budgets", STORED)])
def test_a_missing_baseline_is_reported_before_the_model_is_loaded(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, marker: str, path: Path
) -> None:
    def refuse(source: str, **_: object) -> None:
        raise AssertionError(f"{source} was loaded")

    monkeypatch.setattr(loading, "load", refuse)
    done = ran(project, "-m", marker)
    done.assert_outcomes(failed=1, deselected=1)
    assert failure(done).startswith(f"no baseline {path}; create it with `cascade ")


def test_a_torn_baseline_is_reported_before_the_model_is_loaded(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, **_: object) -> None:
        raise AssertionError(f"{source} was loaded")

    torn(BASELINE)
    monkeypatch.setattr(loading, "load", refuse)
    assert str(BASELINE) in failure(ran(guarded, "-m", "saturation"))


def test_an_overridden_model_is_loaded_to_find_its_baseline(
    guarded: pytest.Pytester, models: Path
) -> None:
    Path("baselines/tiny").rename("baselines/other")
    guarded.makeconftest(
        f"""
        import pytest
        from cascade.models.loading import load

        @pytest.fixture(scope="session")
        def cascade_model():
            return load({str(models / "other")!r})
        """
    )
    done = ran(guarded, "-m", "saturation")
    assert failure(done).startswith("NOT COMPARABLE: expected model.weights_hash")


def test_life_cycle_of_budgets(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SLACK, "seconds_ratio", 50.0)  # this test is not about time
    only = ("-m", "budgets", "--cascade-exit-layer", "3")
    missing = ran(project, *only)
    missing.assert_outcomes(failed=1, deselected=1)
    assert failure(missing).startswith(f"no baseline {STORED}; create it with `cascade evaluate ")
    made = ran(project, *only, "--force-regen")
    made.assert_outcomes(failed=1, deselected=1)
    (group,) = json.loads(STORED.read_text())["groups"]
    assert [point["exit_layer"] for point in group["points"]] == [3, 3, 3]
    ran(project, *only).assert_outcomes(passed=1, deselected=1)

    broken(project, 1.3)
    changed = ran(project, *only)
    changed.assert_outcomes(failed=1, deselected=1)
    assert re.match(
        r"FAIL: .*: \d+ budgets of 3 operating points (and lossless decoding )?exceeded",
        failure(changed),
    )
    assert "exit_share budget at least" in failure(changed)
    assert "To inspect: cascade evaluate" in failure(changed)
    again = ran(project, *only, "--force-regen")
    again.assert_outcomes(failed=1, deselected=1)
    assert "Compared with the previous budgets:" in failure(again)
    assert "exit_share budget" in failure(again)


def test_the_suggested_commands_create_a_missing_baseline(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SLACK, "seconds_ratio", 50.0)  # this test is not about time
    for marker, point in (("saturation", ""), ("budgets", "3:cosine:0.8")):
        said = failure(ran(project, "-m", marker))
        lines = re.findall("`(cascade [^`]*)`", said)
        assert len(lines) == 2
        for line in lines:
            line = line.replace("RUN", marker).replace("LAYER:cosine:THRESHOLD", point)
            assert typed(line, monkeypatch) == 0
        assert ran(project, "-m", marker).parseoutcomes()["passed"] == 1


def test_force_regen_keeps_valid_baselines_and_passes(guarded: pytest.Pytester) -> None:
    before = contents(guarded.path / "baselines")
    ran(guarded, "--force-regen").assert_outcomes(passed=2)
    assert contents(guarded.path / "baselines") == before


def test_regen_all_rewrites_all_baselines_and_passes(guarded: pytest.Pytester) -> None:
    broken(guarded)
    before = contents(guarded.path / "baselines")
    ran(guarded, "--regen-all", "--cascade-report", "out").assert_outcomes(passed=2)
    after = contents(guarded.path / "baselines")
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before if before[name] is not None)
    record = json.loads(Path("out/report.json").read_text())
    assert record["verdict"] == "INCONCLUSIVE"  # they have not been reviewed yet
    assert record["regenerated"] == [str(STORED), str(BASELINE)]
    ran(guarded, "-m", "saturation").assert_outcomes(passed=1, deselected=1)
    # Like pytest-regressions, this rewrites valid baselines too.
    ran(guarded, "--regen-all", "-k", "saturation").assert_outcomes(passed=1, deselected=1)
    command = read_profile(guarded.path / BASELINE).record().provenance.command
    assert str(command).endswith("--regen-all -k saturation")


def test_the_profile_uses_the_edges_of_a_regenerated_baseline(
    guarded: pytest.Pytester,
) -> None:
    broken(guarded)
    guarded.makepyfile(
        test_my_saturation=f"""
        from pathlib import Path

        import numpy as np
        from cascade import read_profile

        def test_it(saturation_baseline, cascade_profile):
            edges = []
            for _ in range(2):
                stored = read_profile(Path("{BASELINE}")).arrays()["edges"]
                assert np.array_equal(cascade_profile.arrays()["edges"], stored)
                edges.append(stored)
                saturation_baseline.check(cascade_profile)
            assert not np.array_equal(*edges)
        """
    )
    done = ran(guarded, "--regen-all", "test_my_saturation.py")
    done.assert_outcomes(passed=1)


def test_regenerating_measures_all_of_a_corpus_that_grew(guarded: pytest.Pytester) -> None:
    with Path("texts.jsonl").open("a") as file:
        file.write('{"text": "One more text, longer than a sequence of sixteen characters."}\n')
    only = ("-m", "saturation")
    ran(guarded, *only).assert_outcomes(passed=1, deselected=1)
    before = len(read_profile(guarded.path / BASELINE).rows)
    ran(guarded, *only, "--force-regen").assert_outcomes(failed=1, deselected=1)
    stored = read_profile(guarded.path / BASELINE)
    assert stored.record().provenance.corpus.records == len(TEXTS) + 1
    assert len(stored.rows) > before
    ran(guarded, *only).assert_outcomes(passed=1, deselected=1)


def test_regenerating_replaces_a_torn_baseline_but_refuses_torn_budgets(
    guarded: pytest.Pytester,
) -> None:
    for path in (BASELINE, STORED):
        path.write_text(path.read_text()[:-40])
    done = ran(guarded, "--regen-all")
    done.assert_outcomes(passed=1, failed=1)
    # The stored operating points are lost, so the file cannot be regenerated.
    assert "texts-confirm.budgets.json is torn or edited" in failure(done)
    read_profile(guarded.path / BASELINE)


@pytest.mark.parametrize("option", ["--force-regen", "--regen-all"])
def test_regenerating_is_refused_when_ci_is_set(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    broken(guarded, 1.3)
    before = contents(guarded.path / "baselines")
    monkeypatch.setenv("CI", "true")
    for marker in ("saturation", "budgets"):
        done = ran(guarded, option, "-m", marker, "--cascade-report", "out")
        done.assert_outcomes(failed=1, deselected=1)
        assert failure(done).startswith(f"{option} is not allowed when CI is set, ")
        assert len(failure(done).splitlines()) == 1
        assert json.loads(Path("out/report.json").read_text())["verdict"] == "NOT COMPARABLE"
    assert contents(guarded.path / "baselines") == before
    monkeypatch.setenv("CI", "false")
    ran(guarded, option, "-m", "saturation")
    assert contents(guarded.path / "baselines") != before


# --- What cannot be compared ----------------------------------------------------------------------


def torn(path: Path) -> None:
    path.write_text(path.read_text()[:-60])


def edited_by_hand(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace('"mean": 0.', '"mean": 0.1', 1))


def newer(path: Path) -> None:
    record = json.loads(path.read_text())
    record |= {"schema": 9}
    record["provenance"]["versions"]["cascade-exit"] = "7.1"
    path.write_text(json.dumps(record))


def without_npz(path: Path) -> None:
    path.with_suffix(".npz").unlink()


def another_runs_npz(path: Path) -> None:
    path.with_suffix(".npz").write_bytes(packed(a_profile(4).state))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (torn, "texts.saturation.json is torn or edited"),
        (edited_by_hand, "texts.saturation.json was changed after it was written (expected hash"),
        (newer, "has schema 9, this release reads up to 3; use cascade-exit 7.1 or a later one"),
        (without_npz, "no file "),
        (another_runs_npz, "texts.saturation.npz was changed after it was written"),
    ],
)
def test_a_damaged_baseline_gives_a_one_line_error_and_is_not_changed(
    guarded: pytest.Pytester, damage: Callable[[Path], None], words: str
) -> None:
    damage(guarded.path / BASELINE)
    before = contents(guarded.path / "baselines")
    done = ran(guarded, "-m", "saturation", "--cascade-report", "out")
    done.assert_outcomes(failed=1, deselected=1)
    assert words in failure(done)
    assert len(failure(done).splitlines()) == 1
    record = json.loads(Path("out/report.json").read_text())
    assert record["verdict"] == "NOT COMPARABLE"
    assert words in record["comparisons"][0]["headline"]
    assert contents(guarded.path / "baselines") == before


def test_another_checkpoint_gives_a_one_line_error_with_the_remedy(
    guarded: pytest.Pytester, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models / "other", guarded.path / "tiny")
    only = ("--cascade-model", "tiny", "-m")
    (said,) = failure(ran(guarded, *only, "budgets")).splitlines()
    assert "expected model.weights_hash sha256:" in said
    (said,) = failure(ran(guarded, *only, "saturation")).splitlines()
    assert said.startswith("NOT COMPARABLE: expected model.weights_hash sha256:")
    assert "review the new checkpoint, then accept a separate baseline for it" in said
    # Measure, compare (status 1, because it moved), accept.
    lines = re.findall("`(cascade [^`]*)`", said)
    assert [typed(line, monkeypatch) for line in lines] == [0, 1, 0]
    ran(guarded, *only, "saturation").assert_outcomes(passed=1, deselected=1)
    made = ran(guarded, *only, "budgets", "--force-regen")
    assert failure(made).startswith(f"regenerated {STORED}")
    assert "weights_hash" in failure(made)


def test_nan_or_a_missing_model_gives_a_one_line_error(
    guarded: pytest.Pytester,
) -> None:
    broken(guarded, "float('inf')")
    done = ran(guarded, "-m", "saturation")
    done.assert_outcomes(failed=1, deselected=1)
    assert "layer 3 is the first to give NaN" in failure(done)
    assert len(failure(done).splitlines()) == 1
    mended(guarded)
    (guarded.path / "empty").mkdir()
    shutil.copytree("baselines/tiny", "baselines/empty")
    only = ("-m", "saturation", "--cascade-model", "empty", "--cascade-report", "out")
    done = ran(guarded, *only)
    done.assert_outcomes(failed=1, deselected=1)
    assert len(failure(done).splitlines()) == 1
    assert json.loads(Path("out/report.json").read_text())["verdict"] == "NOT COMPARABLE"

"""The findings of a session: reports, unused baselines and several processes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace
from support.build_profiles import (
    a_profile,
    profile_of,
    provenance,
    similarities_of,
    write_profile,
)
from support.plugin_project import (
    BASELINE,
    STORED,
    broken,
    properties,
    ran,
)

from cascade.core.schema import from_plain
from cascade.gate.baselines import read_profile
from cascade.gate.comparison import Comparison
from cascade.gate.records import (
    GateRun,
    MissingBaseline,
    NamedComparison,
    SessionRecord,
    session_record,
)
from cascade.plugin.results import Findings, write_reports
from cascade.plugin.settings import (
    Settings,
)

# --- Reports --------------------------------------------------------------------------------------


def test_a_session_writes_json_markdown_html_and_a_job_summary(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(guarded)
    summary = guarded.path / "summary.md"
    summary.write_text("From the previous step.\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    for _ in range(2):  # a second session overwrites the first one's report
        done = ran(
            guarded, "--cascade-report", "out", "--junitxml", "junit.xml", "-m", "saturation"
        )
        done.assert_outcomes(failed=1, deselected=1)
    names = ["report.html", "report.json", "report.md"]
    assert sorted(path.name for path in Path("out").iterdir()) == names
    record = json.loads(Path("out/report.json").read_text())
    assert (record["kind"], record["verdict"]) == ("report", "FAIL")
    (comparison,) = record["comparisons"]
    assert (comparison["name"], comparison["path"]) == ("tiny/texts", str(BASELINE))
    assert comparison["attribution"]["layer"] == "3"
    assert comparison["gate"]["looks"] == [{"tokens": 16, "verdict": "FAIL"}]
    markdown = Path("out/report.md").read_text()
    assert "FAIL" in markdown.splitlines()[0]
    written = summary.read_text()
    assert written.startswith("From the previous step.\n")
    assert written.count(markdown.splitlines()[0]) == 2
    assert "layer 3 is the first that moved" in Path("out/report.html").read_text()
    done.stdout.fnmatch_lines(
        [
            "*= cascade =*",
            "FAIL: tiny/texts: drift in *",
            "Wrote out/report.html",
            "Wrote summary.md",
        ]
    )
    (values,) = properties("junit.xml")
    assert values["cascade_verdict"] == "FAIL"
    assert re.match(r"layer 3 mean [+-]\d\.\de-0\d \(-?\+?\d+", values["cascade_worst_cell"])
    assert values["cascade_tokens"] == "16"


def test_a_job_summary_stays_below_the_size_limit(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran(guarded, "-m", "saturation", "--cascade-report", "out")
    record = from_plain(json.loads(Path("out/report.json").read_text()), SessionRecord)
    (comparison,) = record.comparisons
    many = [replace(comparison, name=f"model-{number}") for number in range(2000)]
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    assert write_reports(Settings(), session_record(many)) == ["summary.md"]
    assert 10_000 < Path("summary.md").stat().st_size < 100_000


def test_an_unwritable_report_fails_the_session(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(guarded.path))
    done = ran(guarded, "-m", "saturation")
    done.assert_outcomes(passed=1, deselected=1)
    done.stdout.fnmatch_lines(["No report: cannot write * (from GITHUB_STEP_SUMMARY): *"])
    assert done.ret == pytest.ExitCode.TESTS_FAILED


def test_no_report_is_written_if_nothing_was_compared(project: pytest.Pytester) -> None:
    project.makepyfile(test_other="def test_other(): pass")
    done = ran(project, "test_other.py", "--cascade-report", "out")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["No report: no test compared anything with a baseline"])
    assert not Path("out").exists()


# --- Unused baselines -----------------------------------------------------------------------------

#: Tests of stored measurements, which need no model.
STORED_PROFILE = f"""
from pathlib import Path
from cascade import read_profile

def test_saturation(saturation_baseline):
    saturation_baseline.check(read_profile(Path("{BASELINE}")))
"""
STORED_EVALUATION = f"""
import json
from pathlib import Path

def test_budgets(exit_budget):
    (group,) = json.loads(Path("{STORED}").read_text())["groups"]
    exit_budget.check({{**group}})
"""


def unused(project: pytest.Pytester, *arguments: object) -> list[str]:
    shutil.rmtree("out", ignore_errors=True)
    ran(project, "--cascade-report", "out", *arguments)
    found: list[str] = json.loads(Path("out/report.json").read_text())["unused"]
    return found


def test_only_unused_baselines_are_listed(guarded: pytest.Pytester) -> None:
    guarded.makepyfile(test_my_saturation=STORED_PROFILE, test_my_budgets=STORED_EVALUATION)
    other = [Path("baselines/old/texts.saturation.json"), Path("baselines/old/texts.budgets.json")]
    other[0].parent.mkdir()
    for path in other:
        path.write_text("whatever")
    assert unused(guarded) == sorted(map(str, other))
    done = ran(guarded)
    done.stdout.fnmatch_lines(["*baselines/old/texts.saturation.json*"])
    # Only baselines of the kind whose tests were run are listed.
    assert unused(guarded, "-m", "saturation") == [str(other[0])]
    assert unused(guarded, "-m", "budgets") == [str(other[1])]
    assert unused(guarded, ".") == sorted(map(str, other))
    guarded.makepyfile(test_more=STORED_PROFILE.replace("test_saturation", "test_more"))
    # A test that was not run might have used the others.
    assert unused(guarded, "-k", "not more") == [str(other[1])]
    assert unused(guarded, "--deselect", "test_more.py::test_more") == [str(other[1])]
    assert unused(guarded, "test_my_saturation.py::test_saturation") == []
    assert unused(guarded, "test_my_saturation.py") == []
    skipped = STORED_PROFILE.replace("def ", "@pytest.mark.skip\ndef ")
    guarded.makepyfile(test_more=f"import pytest\n{skipped}")
    assert unused(guarded) == [str(other[1])]
    worse = STORED_EVALUATION.replace("**group", "**group, 'points': []")
    guarded.makepyfile(test_my_budgets=worse)
    # The budgets' test comes first and fails, so the others are not run.
    assert unused(guarded, "-x") == [str(other[1])]
    assert unused(guarded, "--lf") == []


def test_marked_tests_without_a_check_list_no_unused_baselines(
    guarded: pytest.Pytester,
) -> None:
    guarded.makepyfile(
        test_my_saturation="import pytest\n@pytest.mark.saturation\ndef test_mine(): pass"
    )
    assert unused(guarded, "test_my_budgets.py", "test_my_saturation.py") == []
    assert unused(guarded) == []


# --- Several processes ----------------------------------------------------------------------------

#: Tests for several workers, on stored files, so that no worker imports torch.
WORKERS = """
from pathlib import Path
import pytest
from cascade import read_profile

@pytest.mark.parametrize("number", range(6))
def test_it(saturation_baseline, number):
    saturation_baseline.check(read_profile(Path(f"{number}.json")))
"""


def test_findings_of_workers_are_one_report(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    summary = project.path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    Path("test_my_budgets.py").unlink()
    project.makepyfile(test_my_saturation=WORKERS)
    for number in range(6):
        about = provenance(corpus__name=f"words{number}")
        moved = profile_of(similarities_of(8, shift=0.01 * (number == 4)), about=about)
        write_profile(Path(f"{number}.json"), moved)
        stored = Path(f"baselines/tiny/words{number}.saturation.json")
        write_profile(stored, a_profile(8, about=about))
    stored.with_name("unused.saturation.json").write_text("{}")
    options = ("-n", 2, "--cascade-report", "out", "--junitxml", "junit.xml")
    done = ran(project, *options)
    done.assert_outcomes(passed=5, failed=1)
    record = json.loads(Path("out/report.json").read_text())
    assert record["verdict"] == "FAIL"
    found = {part["name"]: part["verdict"] for part in record["comparisons"]}
    assert found == {f"tiny/words{n}": "FAIL" if n == 4 else "PASS" for n in range(6)}
    assert record["unused"] == ["baselines/tiny/unused.saturation.json"]
    assert summary.read_text().count("CASCADE: FAIL") == 1
    verdicts = sorted(values["cascade_verdict"] for values in properties("junit.xml"))
    assert verdicts == ["FAIL", *["PASS"] * 5]
    # An invalid marker is reported too.
    project.makepyfile("import pytest\n@pytest.mark.saturation(3)\ndef test_bad(): pass")
    done = ran(project, "-n", 1, "-k", "test_bad")
    done.stdout.fnmatch_lines(["*test_bad: marker saturation takes no positional argument, got 3*"])
    assert done.ret == pytest.ExitCode.TESTS_FAILED


def test_two_workers_regenerating_one_baseline_leave_a_complete_one(
    project: pytest.Pytester,
) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    Path("test_my_budgets.py").unlink()
    project.makepyfile(test_my_saturation=WORKERS.replace("range(6)", "range(12)"))
    for number in range(12):  # different profiles of one model and corpus
        write_profile(Path(f"{number}.json"), a_profile(8, seed=number))
    done = ran(project, "-n", 2, "--regen-all", "--cascade-report", "out")
    done.assert_outcomes(passed=12)
    stored = Path("baselines/tiny/words.saturation.json")
    kept = read_profile(stored).record()
    assert kept in [read_profile(Path(f"{number}.json")).record() for number in range(12)]
    assert sorted(p.name for p in stored.parent.iterdir()) == [
        f"{stored.stem}.{end}" for end in ("json", "npz", "parquet")
    ]
    record = json.loads(Path("out/report.json").read_text())
    assert record["regenerated"] == [str(stored)]


def test_equal_findings_of_two_processes_count_once() -> None:
    record = replace(Comparison(None).record(), headline="no drift", verdict="PASS")
    comparison = NamedComparison.of(record, name="a/b", path="b.json")
    one, other = Findings(), Findings()
    for findings, test in ((one, "a"), (other, "bb")):
        gate = GateRun(steps=[], budget_tokens=0, seconds=len(test), noise=None)
        findings.comparisons.append(replace(comparison, gate=gate))
        findings.missing.append(MissingBaseline(path="c.json", command="make it"))
        findings.note_selected("saturation", "both")
        findings.note_ran("saturation", test)
    one.regenerated.append("c.json")
    total = Findings()
    for findings in (one, other):
        total.absorb(findings.dump())
    assert total.selected == {"saturation": ["both"]}
    assert total.ran == {"saturation": ["a", "bb"]}
    assert [kept.gate for kept in total.comparisons] == [
        *(one.comparisons[0].gate, other.comparisons[0].gate)
    ]
    session = total.record()
    assert session is not None
    assert len(session.comparisons) == 1
    assert session.missing == []  # one of them regenerated it
    assert Findings().record() is None

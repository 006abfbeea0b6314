"""`--cascade-baselines` with an address: read when a test needs it, named, never written to."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.plugin_project import BASELINE, broken, failure, ran

from cascade.gate.remote import baselines
from cascade.gate.remote.copies import copy_folder, up_to_date
from cascade.gate.remote.records import BaselinesCopy

FILE = "tiny/texts.saturation.json"


@pytest.fixture
def url(project: pytest.Pytester, made: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of stored baselines outside of the project; the cache has no copy of them."""
    shutil.copytree(made, project.path / "elsewhere")
    monkeypatch.setenv("CASCADE_CACHE", str(project.path / "cache"))
    return f"file://{project.path}/elsewhere"


def test_both_kinds_of_baselines_are_read_from_an_address(
    project: pytest.Pytester, url: str
) -> None:
    options = (f"--cascade-baselines={url}/", "--cascade-report=out", "-v")
    done = ran(project, *options)
    done.assert_outcomes(passed=2)
    text = str(done.stdout)
    assert f"; baselines in {url}; quick gate" in text
    (revision,) = set(re.findall(rf"Baselines of {url}, revision (\S+) \(checked now\)", text))
    record = json.loads(Path("out/report.json").read_text())
    for part in (*record["comparisons"], *record["budgets"]):
        assert part["path"].startswith(f"{url}/tiny/texts")
        assert part["remote"]["url"] == url
        assert part["remote"]["revision"].startswith(revision)
    assert record["unused"] == []
    html = Path("out/report.html").read_text()
    assert html.count(f"revision {revision}") == 2


def test_the_ini_key_takes_an_address_as_it_is(project: pytest.Pytester, url: str) -> None:
    Path("pytest.ini").write_text(f"{Path('pytest.ini').read_text()}cascade_baselines = {url}\n")
    done = ran(project, "-m", "saturation", "-v")
    done.assert_outcomes(passed=1, deselected=1)
    done.stdout.fnmatch_lines([f"*baselines in {url};*", f"Baselines of {url}, revision *"])


def test_nothing_is_read_where_no_test_needs_it(project: pytest.Pytester) -> None:
    project.makepyfile(test_plain="def test_plain(): pass")
    options = ("--cascade-baselines=file:///nowhere", "-v")
    ran(project, *options, "test_plain.py").assert_outcomes(passed=1)
    assert ran(project, *options, "--collect-only").ret == 0


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("file:///nowhere", "cannot read baselines from file:///nowhere: it cannot be reached"),
        ("nowhere://me:secret@a", "cannot read nowhere://***@a: fsspec does not know nowhere://"),
        ("hf://datasets/ORG/NAME@v1", "ORG/NAME@v1: HF_HUB_OFFLINE is set, and the cache has no"),
    ],
)
def test_an_address_that_fails_is_one_line_and_status_4(
    project: pytest.Pytester,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    words: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = ran(project, f"--cascade-baselines={address}")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in done.stderr.lines if line.startswith("ERROR: ")]
    assert line.startswith("ERROR: --cascade-baselines: ")
    assert words in line
    assert "secret" not in f"{done.stdout}{done.stderr}"


def test_an_address_that_is_gone_is_replaced_by_its_copy_and_the_header_says_so(
    project: pytest.Pytester, url: str
) -> None:
    options = (f"--cascade-baselines={url}", "-m", "saturation", "--cascade-report=out", "-v")
    ran(project, *options).assert_outcomes(passed=1, deselected=1)
    shutil.rmtree("elsewhere")
    done = ran(project, *options)
    done.assert_outcomes(passed=1, deselected=1)
    lines = [line for line in done.stdout.lines if line.startswith(f"Baselines of {url}: it can")]
    assert len(lines) == 2  # below the header, and in the summary
    assert "the copy of 2" in lines[0]
    (comparison,) = json.loads(Path("out/report.json").read_text())["comparisons"]
    assert comparison["remote"]["checked"] is False


def test_a_refused_baseline_fails_its_test_and_leaves_the_copy(
    project: pytest.Pytester, url: str
) -> None:
    options = (f"--cascade-baselines={url}", "-m", "saturation")
    ran(project, *options).assert_outcomes(passed=1, deselected=1)
    before = (copy_folder(url) / FILE).read_bytes()
    Path("elsewhere", FILE).write_bytes(before[:300])
    done = ran(project, *options)
    text = failure(done)
    assert len(text.splitlines()) == 1
    assert text.startswith(f"{url}/{FILE} is torn")
    assert (copy_folder(url) / FILE).read_bytes() == before


def test_a_failure_names_the_address_in_its_remedies(project: pytest.Pytester, url: str) -> None:
    broken(project)
    text = failure(ran(project, f"--cascade-baselines={url}", "-m", "saturation"))
    assert f"--baselines {url} --full" in text
    assert "cascade accept RUN --baselines baselines" in text


def test_a_missing_baseline_names_the_address(project: pytest.Pytester, url: str) -> None:
    for path in Path("elsewhere/tiny").glob("texts.saturation.*"):
        path.unlink()
    text = failure(ran(project, f"--cascade-baselines={url}", "-m", "saturation"))
    assert text.startswith(f"no baseline {url}/{FILE}; create it with ")
    assert "--force-regen" not in text


@pytest.mark.parametrize("option", ["--force-regen", "--regen-all"])
def test_nothing_is_regenerated_at_an_address(
    project: pytest.Pytester, url: str, option: str
) -> None:
    def stored() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in Path("elsewhere").rglob("*.*")}

    before = stored()
    broken(project)
    text = failure(ran(project, f"--cascade-baselines={url}", "-m", "saturation", option))
    assert text.startswith(f"{option} does not write to {url}; run it with a local folder")
    assert stored() == before
    assert not Path(BASELINE).exists()


def test_workers_of_xdist_use_what_the_session_read(
    project: pytest.Pytester, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    asked = []

    def once(address: str) -> BaselinesCopy:
        found = up_to_date(address)
        asked.append(address)
        shutil.rmtree("elsewhere")  # a worker that asks again finds nothing
        return found

    monkeypatch.setattr(baselines, "up_to_date", once)
    done = ran(project, "-n", 2, "-pxdist", f"--cascade-baselines={url}", "--cascade-report=out")
    done.assert_outcomes(passed=2)
    assert asked == [url]
    record = json.loads(Path("out/report.json").read_text())
    parts = [part["remote"] for part in (*record["comparisons"], *record["budgets"])]
    assert [part["checked"] for part in parts] == [True, True]
    assert f"Baselines of {url}, revision" in str(done.stdout)


def test_workers_of_xdist_fail_in_one_line_where_the_address_fails(
    project: pytest.Pytester, url: str
) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    options = ("-n", 1, "-pxdist", "--cascade-baselines=file:///nowhere", "-m", "saturation")
    worker, *lines = failure(ran(project, *options)).splitlines()
    assert worker.startswith("[gw0]")
    assert len(lines) == 1
    assert lines[0].startswith(
        "cannot read baselines from file:///nowhere: it cannot be reached: there is no such"
    )


def test_older_budgets_are_checked_with_a_note(project: pytest.Pytester, url: str) -> None:
    (path,) = Path("elsewhere").rglob("*.budgets.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: record[name] for name in record if name != "hash"}))
    done = ran(project, f"--cascade-baselines={url}", "-m", "budgets")
    done.assert_outcomes(passed=1, deselected=1)
    words = f"{url}/tiny/{path.name}: the budgets are of an earlier release; not checked: whether"
    assert any(line.startswith(words) for line in done.stdout.lines)


def test_a_report_takes_no_address(project: pytest.Pytester) -> None:
    done = ran(project, "--cascade-report=s3://me:secret@bucket/a")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "expected a local path, got s3://***@bucket/a for --cascade-report" in str(done.stderr)

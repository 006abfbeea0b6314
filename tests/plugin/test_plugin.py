"""The plugin: what a stranger's project sees of it, from the first run to a report."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.build_profiles import a_profile, profile_of, provenance, save_run, similarities_of
from support.commands import TEXTS
from support.disk import contents
from support.paths import ROOT

from cascade import cli, plugin
from cascade.core.provenance import provenance_of
from cascade.core.records import packed, to_json
from cascade.corpora.blocks import load_blocks
from cascade.decoding.early_exit import PROPAGATIONS
from cascade.evaluation.operating_points import OperatingPoint
from cascade.exits.head_fitting import fit_heads
from cascade.gate.baselines import read_profile
from cascade.gate.budgets import SLACK, accept_budgets
from cascade.gate.drift import compare
from cascade.gate.remeasuring import evaluate_points, first_points
from cascade.gate.renewal import measure_whole, replace_budgets, store_profile
from cascade.gate.session import session_record
from cascade.models.loading import DTYPES, load
from cascade.plugin import settings
from cascade.plugin.results import Findings, write_reports
from cascade.plugin.settings import Settings, marked
from cascade.report.gate.page import report_page

#: Without the entry point, as in a source tree, the plugin is named.
PLUGIN = (
    ()
    if any(point.value == "cascade.plugin" for point in entry_points(group="pytest11"))
    else ("-p", "cascade.plugin")
)

INI = """
[pytest]
addopts = --strict-markers --strict-config
filterwarnings = error
cascade_model = {model}
cascade_corpus = texts.jsonl
cascade_seq_len = 16
"""

#: The whole of what a stranger writes.
SATURATION = """
def test_saturation(saturation_baseline, cascade_profile):
    saturation_baseline.check(cascade_profile)
"""
BUDGETS = """
def test_budgets(exit_budget, cascade_evaluation):
    exit_budget.check(cascade_evaluation)
"""

#: A model that another release, or a refactoring, computes differently: its weights' hash is the
#: baseline's.
BROKEN = """
import pytest

@pytest.fixture(scope="session")
def cascade_model(cascade_model):
    cascade_model.layers[2].mlp.down_proj.weight.data.mul_({factor})
    return cascade_model
"""

BASELINE = Path("baselines/tiny/texts.saturation.json")
STORED = Path("baselines/tiny/texts-confirm.budgets.json")

Done = pytest.RunResult
Project = Callable[..., Done]


def ran(pytester: pytest.Pytester, *arguments: object) -> Done:
    # Hypothesis' plugin would be imported anew by every inner session, for more than a second.
    return pytester.runpytest_inprocess(*PLUGIN, "-p", "no:hypothesispytest", *map(str, arguments))


@pytest.fixture
def project(
    made: Path, pytester: pytest.Pytester, models: Path, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    """A stranger's project: an ini file, a corpus, two tests, no baselines yet."""
    # `made` comes first: an inner session forgets every module that it was the first to import, so
    # that the next one would import it anew.
    assert made.is_dir()
    for name in ("CI", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CASCADE_CACHE", str(models / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    pytester.path.joinpath("pytest.ini").write_text(INI.format(model=models / "tiny"))
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    pytester.path.joinpath("texts.jsonl").write_text("".join(lines))
    # Not named as one of our own modules, which this process may have imported.
    pytester.makepyfile(test_my_saturation=SATURATION, test_my_budgets=BUDGETS)
    return pytester


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """Baselines of the tiny model, as `--force-regen` makes them."""
    folder = tmp_path_factory.mktemp("made")
    corpus = folder / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stack = load(str(models / "tiny"))
        blocks = load_blocks(str(corpus), stack.tokenizer, seq_len=16)
        store_profile(folder / "baselines", measure_whole(stack, blocks))
        record = evaluate_points(stack, first_points(stack, blocks, 3), blocks)
        stored = read_profile(folder / BASELINE)
        comparison = {"name": "tiny", "path": "tiny"} | compare(stored, stored).record()
        report_page(session_record([comparison]))
    finally:
        torch.set_num_threads(threads)
    # What a point takes in time is not this file's subject.
    for row in record["points"]:
        row |= {"seconds_ratio": 50.0, "seconds_ratio_interval": None}
    replace_budgets(folder / STORED, [record])
    return folder / "baselines"


@pytest.fixture
def guarded(project: pytest.Pytester, made: Path) -> pytest.Pytester:
    """The same project, its baselines stored."""
    shutil.copytree(made, project.path / "baselines")
    return project


def marked_test(test: str, marker: str, name: str) -> str:
    return f"@pytest.mark.{marker}\n{test.strip().replace('def test', f'def test_{name}')}\n"


def broken(project: pytest.Pytester, factor: float | str = 1.01) -> None:
    project.makeconftest(BROKEN.format(factor=factor))


def mended(project: pytest.Pytester) -> None:
    (project.path / "conftest.py").unlink()


def failure(done: Done) -> str:
    """Return what the one failing test, or its fixture, said."""
    text = str(done.stdout)
    (found,) = re.findall(
        r"^_{3,} .*\b(?:test_\w+).*? _{3,}\n(.*?)(?=^[=_]{3,})", text, re.M | re.S
    )
    return str(found).strip()


# --- The life of a baseline ------------------------------------------------------------------


def test_a_baseline_is_missed_made_kept_broken_and_made_anew(project: pytest.Pytester) -> None:
    only = ("-m", "saturation")
    missing = ran(project, *only, "--cascade-report", "out")
    missing.assert_outcomes(failed=1, deselected=1)
    assert failure(missing).startswith(f"no baseline {BASELINE}; make one with `cascade analyze ")
    assert len(failure(missing).splitlines()) == 1
    record = json.loads(Path("out/report.json").read_text())
    assert record["verdict"] == "FAIL"
    (entry,) = record["missing"]
    assert entry["path"] == str(BASELINE)
    assert re.fullmatch("cascade analyze .* && cascade accept RUN .*", entry["command"])
    assert not Path("baselines").exists()

    made = ran(project, *only, "--force-regen")
    made.assert_outcomes(failed=1, deselected=1)
    assert (
        failure(made)
        == f"made {BASELINE} anew (--force-regen); review it, commit it, and run again"
    )
    whole = read_profile(project.path / BASELINE)
    assert whole.record()["noise"]["repeat"] < 1e-6
    assert whole.record()["provenance"]["corpus"]["records"] == len(TEXTS)
    assert "--force-regen" in whole.record()["provenance"]["command"]

    ran(project, *only).assert_outcomes(passed=1, deselected=1)

    broken(project)
    changed = ran(project, *only)
    changed.assert_outcomes(failed=1, deselected=1)
    assert failure(changed).startswith("FAIL: drift: ")
    assert "layer 3 is the first that moved" in failure(changed)

    again = ran(project, *only, "--force-regen")
    again.assert_outcomes(failed=1, deselected=1)
    assert "Against the baseline before:\nFAIL: drift" in failure(again)
    assert "layer 3 is the first that moved" in failure(again)
    ran(project, *only).assert_outcomes(passed=1, deselected=1)
    mended(project)
    ran(project, *only).assert_outcomes(failed=1, deselected=1)


def test_budgets_live_the_same_life(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SLACK, "seconds_ratio", 50.0)  # time is not what this test is about
    only = ("-m", "budgets", "--cascade-exit-layer", "3")
    missing = ran(project, *only)
    missing.assert_outcomes(failed=1, deselected=1)
    assert failure(missing).startswith(f"no baseline {STORED}; make one with `cascade evaluate ")
    made = ran(project, *only, "--force-regen")
    made.assert_outcomes(failed=1, deselected=1)
    (group,) = json.loads(STORED.read_text())["groups"]
    assert [point["exit_layer"] for point in group["points"]] == [3, 3, 3]
    ran(project, *only).assert_outcomes(passed=1, deselected=1)

    broken(project, 1.3)
    changed = ran(project, *only)
    changed.assert_outcomes(failed=1, deselected=1)
    assert re.match(r"FAIL: .*: not kept: \d+ of the budgets of 3 points", failure(changed))
    assert "exit_share budget at least" in failure(changed)
    assert "To look closer: cascade evaluate" in failure(changed)
    again = ran(project, *only, "--force-regen")
    again.assert_outcomes(failed=1, deselected=1)
    assert "Against the budgets before:" in failure(again)
    assert "exit_share budget" in failure(again)


def test_the_commands_that_a_missing_baseline_names_make_it(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SLACK, "seconds_ratio", 50.0)  # time is not what this test is about
    for marker, point in (("saturation", ""), ("budgets", "3:cosine:0.8")):
        said = failure(ran(project, "-m", marker))
        lines = re.findall("`(cascade [^`]*)`", said)
        assert len(lines) == 2
        for line in lines:
            line = line.replace("RUN", marker).replace("LAYER:cosine:THRESHOLD", point)
            assert typed(line, monkeypatch) == 0
        assert ran(project, "-m", marker).parseoutcomes()["passed"] == 1


def test_force_regen_leaves_what_still_holds_and_passes(guarded: pytest.Pytester) -> None:
    before = contents(guarded.path / "baselines")
    ran(guarded, "--force-regen").assert_outcomes(passed=2)
    assert contents(guarded.path / "baselines") == before


def test_regen_all_writes_everything_and_passes(guarded: pytest.Pytester) -> None:
    broken(guarded)
    before = contents(guarded.path / "baselines")
    ran(guarded, "--regen-all", "--cascade-report", "out").assert_outcomes(passed=2)
    after = contents(guarded.path / "baselines")
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before if before[name] is not None)
    record = json.loads(Path("out/report.json").read_text())
    assert record["verdict"] == "INCONCLUSIVE"  # nobody has reviewed them yet
    assert record["regenerated"] == [str(STORED), str(BASELINE)]
    ran(guarded, "-m", "saturation").assert_outcomes(passed=1, deselected=1)
    # Also what still holds, as pytest-regressions does.
    ran(guarded, "--regen-all", "-k", "saturation").assert_outcomes(passed=1, deselected=1)
    command = read_profile(guarded.path / BASELINE).record()["provenance"]["command"]
    assert command.endswith("--regen-all -k saturation")


def test_a_profile_is_that_of_the_new_baseline_once_there_is_one(
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


def test_a_corpus_that_grew_is_measured_whole_when_made_anew(guarded: pytest.Pytester) -> None:
    with Path("texts.jsonl").open("a") as file:
        file.write('{"text": "One more text, longer than a sequence of sixteen characters."}\n')
    only = ("-m", "saturation")
    ran(guarded, *only).assert_outcomes(passed=1, deselected=1)
    before = len(read_profile(guarded.path / BASELINE).arrays()["sequence"])
    ran(guarded, *only, "--force-regen").assert_outcomes(failed=1, deselected=1)
    stored = read_profile(guarded.path / BASELINE)
    assert stored.record()["provenance"]["corpus"]["records"] == len(TEXTS) + 1
    assert len(stored.arrays()["sequence"]) > before
    ran(guarded, *only).assert_outcomes(passed=1, deselected=1)


def test_a_torn_baseline_is_made_anew_but_torn_budgets_are_asked_for(
    guarded: pytest.Pytester,
) -> None:
    for path in (BASELINE, STORED):
        path.write_text(path.read_text()[:-40])
    done = ran(guarded, "--regen-all")
    done.assert_outcomes(passed=1, failed=1)
    # Which points they held nobody knows any more.
    assert "texts-confirm.budgets.json is torn or edited" in failure(done)
    read_profile(guarded.path / BASELINE)


@pytest.mark.parametrize("option", ["--force-regen", "--regen-all"])
def test_nothing_is_made_anew_where_ci_is_set(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    broken(guarded, 1.3)
    before = contents(guarded.path / "baselines")
    monkeypatch.setenv("CI", "true")
    for marker in ("saturation", "budgets"):
        done = ran(guarded, option, "-m", marker, "--cascade-report", "out")
        done.assert_outcomes(failed=1, deselected=1)
        assert failure(done).startswith(f"{option} is refused where CI is set: ")
        assert len(failure(done).splitlines()) == 1
        assert json.loads(Path("out/report.json").read_text())["verdict"] == "NOT COMPARABLE"
    assert contents(guarded.path / "baselines") == before
    monkeypatch.setenv("CI", "false")
    ran(guarded, option, "-m", "saturation")
    assert contents(guarded.path / "baselines") != before


# --- What cannot be compared -----------------------------------------------------------------


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
        (edited_by_hand, "texts.saturation.json was changed after it was made (hash is"),
        (newer, "has schema 9, this release reads up to 2; use cascade-exit 7.1 or a later one"),
        (without_npz, "no file "),
        (another_runs_npz, "texts.saturation.npz was changed after it was made"),
    ],
)
def test_a_damaged_baseline_fails_in_one_line_and_is_left_as_it_is(
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


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (torn, "torn or edited"),
        (lambda path: path.write_text('{"schema": 1, "kind": "budgets"}'), "groups"),
        (lambda path: path.write_text('{"schema": 4, "kind": "budgets"}'), "has schema 4"),
    ],
)
def test_damaged_budgets_fail_in_one_line(
    guarded: pytest.Pytester, damage: Callable[[Path], Any], words: str
) -> None:
    damage(guarded.path / STORED)
    done = ran(guarded, "-m", "budgets", "--cascade-report", "out")
    done.assert_outcomes(failed=1, deselected=1)
    assert words in failure(done)
    assert len(failure(done).splitlines()) == 1
    (budget,) = json.loads(Path("out/report.json").read_text())["budgets"]
    assert (budget["verdict"], budget["points"]) == ("NOT COMPARABLE", 0)
    assert words in budget["reason"]


def typed(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command as a user would who copied it from a message; return its exit status."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code is None or isinstance(caught.value.code, int)
    return caught.value.code or 0


def test_another_checkpoint_is_said_in_one_line_with_what_to_do(
    guarded: pytest.Pytester, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models / "other", guarded.path / "tiny")
    only = ("--cascade-model", "tiny", "-m")
    (said,) = failure(ran(guarded, *only, "budgets")).splitlines()
    assert "weights_hash is sha256:" in said
    (said,) = failure(ran(guarded, *only, "saturation")).splitlines()
    assert said.startswith("NOT COMPARABLE: model.weights_hash is sha256:")
    assert "another checkpoint: review it, then accept a baseline of its own" in said
    # Measure, see what moved (status 1: it did), accept.
    lines = re.findall("`(cascade [^`]*)`", said)
    assert [typed(line, monkeypatch) for line in lines] == [0, 1, 0]
    ran(guarded, *only, "saturation").assert_outcomes(passed=1, deselected=1)
    made = ran(guarded, *only, "budgets", "--force-regen")
    assert failure(made).startswith(f"made {STORED} anew")
    assert "weights_hash" in failure(made)


def test_a_model_that_gives_nan_or_is_not_there_fails_in_one_line(
    guarded: pytest.Pytester,
) -> None:
    broken(guarded, "float('inf')")
    done = ran(guarded, "-m", "saturation")
    done.assert_outcomes(failed=1, deselected=1)
    assert "layer 3 is the first to give NaN" in failure(done)
    assert len(failure(done).splitlines()) == 1
    mended(guarded)
    (guarded.path / "empty").mkdir()
    only = ("-m", "saturation", "--cascade-model", "empty", "--cascade-report", "out")
    done = ran(guarded, *only)
    done.assert_outcomes(errors=1, deselected=1)
    assert len(failure(done).splitlines()) == 1
    assert json.loads(Path("out/report.json").read_text())["verdict"] == "NOT COMPARABLE"


# --- Budgets ---------------------------------------------------------------------------------


def groups() -> Any:
    return json.loads(STORED.read_text())


def test_only_the_points_at_the_exit_layer_are_held(guarded: pytest.Pytester) -> None:
    stored = groups()
    (group,) = stored["groups"]
    group["points"][0] |= {"exit_layer": 2}  # its budget is another layer's, and is not kept
    STORED.write_text(json.dumps(stored))
    only = ("-m", "budgets")
    assert "layer 2" in failure(ran(guarded, *only))
    ran(guarded, *only, "--cascade-exit-layer", 3).assert_outcomes(passed=1, deselected=1)
    assert "layer 2" in failure(ran(guarded, *only, "--cascade-exit-layer", 2))
    done = failure(ran(guarded, *only, "--cascade-exit-layer", 1))
    assert "has no point at exit layer 1 with propagation any; it has layers 2, 3" in done
    done = ran(guarded, *only, "--cascade-exit-layer", 9)
    done.assert_outcomes(errors=1, deselected=1)
    assert failure(done) == "expected an exit layer in 1..4, got 9"
    guarded.makepyfile(
        test_my_budgets="import pytest\n"
        + marked_test(BUDGETS, "budgets(exit_layer=3)", "here")
        + marked_test(BUDGETS, "budgets(propagation='ridge')", "ridge")
    )
    done = ran(guarded, *only)
    done.assert_outcomes(passed=1, failed=1, deselected=1)
    assert "no point at exit layer any with propagation ridge" in failure(done)


def test_budgets_of_fitted_heads_are_measured_with_those_heads(
    guarded: pytest.Pytester, models: Path
) -> None:
    stack = load(str(models / "tiny"))
    blocks = load_blocks("texts.jsonl", stack.tokenizer, seq_len=16)
    heads = fit_heads(stack, blocks, (3,), provenance=provenance_of(stack, blocks, None))
    heads.save(STORED.parent / "texts.heads.safetensors")
    points = [OperatingPoint(3, "cosine", 0.8, "given")]
    record = evaluate_points(stack, points, blocks, heads=heads, propagation="ridge")
    record["points"][0] |= {"seconds_ratio": 50.0, "seconds_ratio_interval": None}
    accept_budgets(Path("baselines"), record)
    done = ran(guarded, "-m", "budgets", "--cascade-report", "out")
    done.assert_outcomes(passed=1, deselected=1)
    (budget,) = json.loads(Path("out/report.json").read_text())["budgets"]
    assert (budget["verdict"], budget["points"]) == ("PASS", 4)
    (STORED.parent / "texts.heads.safetensors").unlink()
    assert "no exit heads sha256:" in failure(ran(guarded, "-m", "budgets"))


def test_records_of_ones_own_are_held_to_the_same_budgets(guarded: pytest.Pytester) -> None:
    guarded.makepyfile(
        test_my_budgets="""
        import pytest

        def test_one(exit_budget, cascade_evaluation):
            exit_budget.check(cascade_evaluation[0])

        def test_several(exit_budget, cascade_evaluation):
            assert len(cascade_evaluation) == len(cascade_evaluation[:]) == 1
            assert cascade_evaluation[0]["kind"] == "evaluation"
            exit_budget.check(list(cascade_evaluation))

        def test_worse(exit_budget, cascade_evaluation):
            worse = dict(cascade_evaluation[0])
            worse["points"] = [row | {"agreement": 0.0} for row in worse["points"]]
            with pytest.raises(pytest.fail.Exception, match="agreement budget at least"):
                exit_budget.check(worse)

        def test_nothing(exit_budget):
            with pytest.raises(pytest.fail.Exception, match="expected cascade_evaluation"):
                exit_budget.check([])
        """
    )
    ran(guarded, "-m", "budgets").assert_outcomes(passed=4, deselected=1)


# --- The profile -----------------------------------------------------------------------------


def test_the_profile_is_that_of_the_quick_gate_or_of_everything(
    guarded: pytest.Pytester, models: Path
) -> None:
    guarded.makepyfile(
        test_my_saturation="""
        import numpy as np

        from cascade import analyze, load_blocks

        def test_profile(cascade_model, cascade_profile, pytestconfig):
            blocks = load_blocks("texts.jsonl", cascade_model.tokenizer, seq_len=16)
            full = pytestconfig.getoption("cascade_full")
            record, arrays = cascade_profile.record(), cascade_profile.arrays()
            assert record["kind"] == "saturation"
            assert cascade_profile.statistics.layers == ("1", "2", "3", "4", "4+norm")
            count = len(blocks.ids) if full else 32
            assert record["layers"][0]["count"] == 16 * count
            assert len(arrays["sequence"]) == len(cascade_profile.sequence_fingerprints) == count
            assert cascade_profile.provenance["model"]["name"] == "tiny"
            assert cascade_profile.noise is None
            if full:
                whole = analyze(cascade_model, blocks).statistics.mean()
                assert np.array_equal(cascade_profile.statistics.mean(), whole)

        def test_check(saturation_baseline, cascade_profile, cascade_model):
            saturation_baseline.check(cascade_profile)
            cascade_model.layers[0] = None  # nothing is measured a second time
            saturation_baseline.check(cascade_profile)
            cascade_profile.record()
        """
    )
    for options in ((), ("--cascade-full",)):
        ran(guarded, *options, "test_my_saturation.py").assert_outcomes(passed=2)
    # Also where the gate has stopped long before, or refused to compare.
    guarded.makepyfile(
        test_my_saturation=f"""
        import numpy as np
        from pathlib import Path
        from cascade import read_profile

        def test_profile(cascade_profile):
            assert cascade_profile.record()["layers"][0]["count"] == 512
            stored = read_profile(Path("{BASELINE}")).arrays()
            assert np.array_equal(cascade_profile.arrays()["edges"], stored["edges"])
            assert set(cascade_profile.sequence_fingerprints) < set(stored["sequence_fingerprint"])
        """
    )
    broken(guarded)
    ran(guarded, "test_my_saturation.py").assert_outcomes(passed=1)
    shutil.copytree(models / "other", guarded.path / "tiny")
    ran(guarded, "test_my_saturation.py", "--cascade-model=tiny").assert_outcomes(passed=1)


def test_the_gate_takes_as_few_tokens_as_decide(guarded: pytest.Pytester) -> None:
    guarded.makepyfile(
        test_my_saturation=f"import pytest\n{SATURATION}"
        + marked_test(SATURATION, "saturation(tokens=40)", "few")
        + marked_test(SATURATION, "saturation(full=True)", "all")
    )

    def tokens(*options: object) -> list[str]:
        ran(guarded, "test_my_saturation.py", "--junitxml", "junit.xml", *options)
        return [values["cascade_tokens"] for values in properties("junit.xml")]

    whole = str(16 * len(read_profile(guarded.path / BASELINE).arrays()["sequence"]))
    assert tokens() == ["512", "32", whole]
    assert tokens("--cascade-tokens", 100) == ["96", "32", whole]
    assert tokens("--cascade-full") == [whole, whole, whole]
    broken(guarded)
    assert tokens() == ["16", "16", whole]  # the first sequence decides


def test_a_profile_of_ones_own_is_held_to_its_baseline(project: pytest.Pytester) -> None:
    # Read from files, as another test or another machine left them.
    for name, seed in (("tiny", 0), ("moved", 0)):
        run = save_run(project.path / name, a_profile(12, seed=seed))
        shutil.copy(run / "profile.json", project.path / f"{name}.json")
        shutil.copy(run / "profile.npz", project.path / f"{name}.npz")
    moved = profile_of(similarities_of(12, shift=0.01))
    Path("moved.json").write_text(to_json(moved.content))
    Path("moved.npz").write_bytes(packed(moved.state))
    stored = Path("baselines/tiny/words.saturation.json")
    stored.parent.mkdir(parents=True)
    shutil.copy("tiny.json", stored)
    shutil.copy("tiny.npz", stored.with_suffix(".npz"))
    project.makepyfile(
        test_my_saturation="""
        from pathlib import Path
        import pytest
        from cascade import read_profile

        @pytest.mark.parametrize("name", ["tiny", "moved"])
        def test_it(saturation_baseline, name):
            saturation_baseline.check(read_profile(Path(name + ".json")))
        """
    )
    done = ran(project, "test_my_saturation.py")
    done.assert_outcomes(passed=1, failed=1)
    assert failure(done).startswith("FAIL: drift")


def test_what_is_inconclusive_passes_unless_strict(project: pytest.Pytester) -> None:
    stored = Path("baselines/tiny/words.saturation.json")
    for path, seed, prints in ((stored, 0, 0), (Path("new.json"), 1, 100)):
        path.parent.mkdir(parents=True, exist_ok=True)
        profile = a_profile(3, seed=seed, fingerprints=np.arange(3) + prints)
        path.write_text(to_json(profile.content))
        path.with_suffix(".npz").write_bytes(packed(profile.state))
    test = """
    from pathlib import Path
    import pytest
    from cascade import read_profile

    def test_it(saturation_baseline):
        saturation_baseline.check(read_profile(Path("new.json")))

    @pytest.mark.saturation(strict={strict})
    def test_marked(saturation_baseline):
        saturation_baseline.check(read_profile(Path("new.json")))
    """
    project.makepyfile(test_my_saturation=test.format(strict=True))
    done = ran(project, "test_my_saturation.py")
    done.assert_outcomes(passed=1, failed=1)
    assert failure(done).startswith("INCONCLUSIVE: undecided")
    project.makepyfile(test_my_saturation=test.format(strict=False))
    done = ran(project, "test_my_saturation.py", "--cascade-strict")
    done.assert_outcomes(passed=1, failed=1)


def test_a_failure_says_what_became_of_the_exit_layer_and_what_to_run(
    guarded: pytest.Pytester, models: Path
) -> None:
    broken(guarded)
    only = ("-m", "saturation", "--cascade-exit-layer")
    said = failure(ran(guarded, *only, 3))
    assert "Exit layer 3 has moved: calibrate its threshold again (mean similarity exp" in said
    assert f"To look closer: cascade gate --model {models / 'tiny'} --corpus texts.jsonl" in said
    assert "To accept what is meant: cascade analyze" in said
    assert "&& cascade accept RUN --baselines baselines" in said
    assert "Exit layer 2 has not moved" in failure(ran(guarded, *only, 2))


# --- Settings --------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_ini_file_and_the_head_says_what_counts(
    guarded: pytest.Pytester, models: Path
) -> None:
    ini = Path("pytest.ini")
    ini.write_text(ini.read_text() + "cascade_tokens = 40\ncascade_full = true\n")
    done = ran(guarded, "-m", "saturation", "-v")
    done.assert_outcomes(passed=1, deselected=1)
    done.stdout.fnmatch_lines(
        [
            f"cascade: {models / 'tiny'}, float32 on cpu; corpus texts.jsonl; baselines in "
            "baselines; whole corpus"
        ]
    )
    done = ran(
        guarded,
        *("-m", "saturation", "-o", "cascade_full=false", "--cascade-tokens", 33),
        *("--cascade-baselines", "elsewhere", "--cascade-exit-layer", 2, "--cascade-split", "a"),
    )
    done.assert_outcomes(failed=1, deselected=1)
    line = "*corpus texts.jsonl (a); baselines in elsewhere; quick gate of 33 tokens, exit layer 2"
    done.stdout.fnmatch_lines([line])


def test_paths_in_the_ini_file_lie_beside_it_and_others_where_the_user_is(
    guarded: pytest.Pytester, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models / "tiny", guarded.path / "tiny")
    Path("baselines").rename("kept")
    Path("pytest.ini").write_text(INI.format(model="tiny") + "cascade_baselines = kept\n")
    below = guarded.path / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    root = ("--rootdir", "..", "-c", "../pytest.ini", "..")
    ran(guarded, "-m", "saturation", *root).assert_outcomes(passed=1, deselected=1)
    done = ran(guarded, "-m", "saturation", "--cascade-baselines", "kept", *root)
    assert failure(done).startswith("no baseline kept/tiny/texts.saturation.json")
    ran(guarded, "-m", "saturation", "--cascade-baselines", "../kept", *root).assert_outcomes(
        passed=1, deselected=1
    )


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--cascade-tokens=0", "expected --cascade-tokens to be a whole number of at least 1"),
        ("--cascade-tokens=many", "got 'many'"),
        ("--cascade-seq-len=1", "at least 2, got '1'"),
        ("--cascade-exit-layer=-3", "at least 1, got '-3'"),
        ("--cascade-dtype=int8", "expected --cascade-dtype among float32, bfloat16, float16"),
        ("--cascade-model=", "expected a value for --cascade-model, got an empty one"),
        ("--cascade-report=texts.jsonl", "--cascade-report: cannot write"),
        ("-ocascade_tokens=1.5", "expected cascade_tokens to be a whole number of at least 1"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_before_any_test(
    project: pytest.Pytester, option: str, words: str
) -> None:
    done = ran(project, option)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in done.errlines if "ERROR" in line]
    assert words in line
    assert "test_my_saturation" not in str(done.stdout)


def test_other_projects_are_told_nothing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(): pass")
    done = ran(pytester)
    done.assert_outcomes(passed=1)
    assert "cascade:" not in str(done.stdout)
    assert "= cascade =" not in str(done.stdout)
    # Where nothing is set but a test asks, the head cannot know; the line comes with the tests.
    pytester.makepyfile(SATURATION)
    done = ran(pytester, "--collect-only")
    done.stdout.fnmatch_lines(["cascade: smollm2-135m, float32 on cpu; corpus embedded; *"])


def test_items_of_other_plugins_are_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest

        class Item(pytest.Item):
            def runtest(self): pass

        class File(pytest.File):
            def collect(self):
                yield Item.from_parent(self, name="item")

        def pytest_collect_file(parent, file_path):
            if file_path.suffix == ".txt":
                return File.from_parent(parent, path=file_path)
        """
    )
    pytester.maketxtfile("text")
    ran(pytester).assert_outcomes(passed=1)


def test_settings_and_options_are_the_same() -> None:
    assert [field.name for field in dataclasses.fields(Settings)] == list(settings._HELP)
    # Spelled out there, since these rooms import torch.
    assert tuple(DTYPES) == settings._DTYPES
    assert PROPAGATIONS == settings._PROPAGATIONS


# --- Markers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ("saturation(token=3)", "marker saturation has no argument 'token'; it knows tokens, full"),
        ("saturation(3)", "marker saturation takes no positional argument, got 3; it knows tokens"),
        ("saturation(tokens=0)", "expected tokens to be a whole number of at least 1, got 0"),
        ("saturation(tokens=True)", "expected tokens to be a whole number"),
        ("saturation(full=1)", "expected full to be True or False, got 1"),
        ("budgets(layer=3)", "marker budgets has no argument 'layer'; it knows exit_layer, prop"),
        ("budgets(propagation='melted')", "expected propagation to be one of frozen, ridge, exact"),
    ],
)
def test_a_marker_with_arguments_that_nothing_reads_is_refused_by_name(
    pytester: pytest.Pytester, marker: str, words: str
) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.{marker}\ndef test_it(): pass")
    done = ran(pytester, "--strict-markers")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in done.errlines if "ERROR" in line]
    assert f"::test_it: {words}" in line or f"::test_it: marker {marker[:7]}" in line
    assert words in line
    assert done.parseoutcomes() == {}


def test_markers_are_known_and_put_on_tests_that_use_a_fixture(
    pytester: pytest.Pytester,
) -> None:
    done = ran(pytester, "--markers")
    done.stdout.fnmatch_lines(
        ["@pytest.mark.saturation(tokens, full, strict): *", "@pytest.mark.budgets(exit_layer, *"]
    )
    pytester.makepyfile(
        f"""
        import pytest
        {textwrap.indent(SATURATION, " " * 8).strip()}
        {textwrap.indent(BUDGETS, " " * 8).strip()}
        @pytest.mark.saturation
        @pytest.mark.budgets(exit_layer=3)
        def test_marked(): pass

        def test_other(): pass
        """
    )
    for expression, count in (("saturation", 2), ("budgets", 2), ("not saturation", 2)):
        done = ran(pytester, "--strict-markers", "--collect-only", "-q", "-m", expression)
        assert len([line for line in done.outlines if "::test_" in line]) == count


def test_the_nearest_marker_wins(pytester: pytest.Pytester) -> None:
    items = pytester.getitems(
        """
        import pytest

        pytestmark = pytest.mark.saturation(tokens=1, strict=True)

        @pytest.mark.saturation(tokens=2)
        class TestIt:
            @pytest.mark.saturation(full=True)
            def test_it(self): pass
        """
    )
    assert marked(items[0], "saturation") == {"tokens": 2, "full": True, "strict": True}
    assert marked(items[0], "budgets") == {}


# --- Reports ---------------------------------------------------------------------------------


def properties(path: str) -> list[dict[str, str]]:
    """Return the properties of every test case of a JUnit file."""
    return [
        {entry.attrib["name"]: entry.attrib["value"] for entry in case.iter("property")}
        for case in ElementTree.parse(path).iter("testcase")
    ]


def test_a_session_leaves_one_report_in_every_form(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(guarded)
    summary = guarded.path / "summary.md"
    summary.write_text("Of the step before.\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    for _ in range(2):  # a second session writes over the first one's report
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
    assert written.startswith("Of the step before.\n")
    assert written.count(markdown.splitlines()[0]) == 2
    assert "layer 3 is the first that moved" in Path("out/report.html").read_text()
    done.stdout.fnmatch_lines(
        ["*= cascade =*", "FAIL: tiny/texts: drift: *", "Wrote out/report.html", "Wrote summary.md"]
    )
    (values,) = properties("junit.xml")
    assert values["cascade_verdict"] == "FAIL"
    assert re.match(r"layer 3 mean [+-]\d\.\de-0\d \(-?\+?\d+", values["cascade_worst_cell"])
    assert values["cascade_tokens"] == "16"


def test_a_job_summary_stays_below_what_a_host_takes(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran(guarded, "-m", "saturation", "--cascade-report", "out")
    (comparison,) = json.loads(Path("out/report.json").read_text())["comparisons"]
    many = [comparison | {"name": f"model-{number}"} for number in range(2000)]
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    assert write_reports(Settings(), session_record(many)) == ["summary.md"]
    assert 10_000 < Path("summary.md").stat().st_size < 100_000


def test_a_report_that_cannot_be_written_fails_the_session_and_says_so(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(guarded.path))
    done = ran(guarded, "-m", "saturation")
    done.assert_outcomes(passed=1, deselected=1)
    done.stdout.fnmatch_lines(["No report: cannot write *, which GITHUB_STEP_SUMMARY names: *"])
    assert done.ret == pytest.ExitCode.TESTS_FAILED


def test_no_report_is_written_where_nothing_was_compared(project: pytest.Pytester) -> None:
    project.makepyfile(test_other="def test_other(): pass")
    done = ran(project, "test_other.py", "--cascade-report", "out")
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines(["No report: no test held anything to a baseline"])
    assert not Path("out").exists()


# --- Baselines that nobody uses --------------------------------------------------------------


#: What was measured before, as it is stored: nothing has to be loaded.
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


def test_baselines_that_no_test_used_are_listed_and_no_others(guarded: pytest.Pytester) -> None:
    guarded.makepyfile(test_my_saturation=STORED_PROFILE, test_my_budgets=STORED_EVALUATION)
    other = [Path("baselines/old/texts.saturation.json"), Path("baselines/old/texts.budgets.json")]
    other[0].parent.mkdir()
    for path in other:
        path.write_text("whatever")
    assert unused(guarded) == sorted(map(str, other))
    done = ran(guarded)
    done.stdout.fnmatch_lines(["*baselines/old/texts.saturation.json*"])
    # Only of the kind whose tests were run.
    assert unused(guarded, "-m", "saturation") == [str(other[0])]
    assert unused(guarded, "-m", "budgets") == [str(other[1])]
    assert unused(guarded, ".") == sorted(map(str, other))
    guarded.makepyfile(test_more=STORED_PROFILE.replace("test_saturation", "test_more"))
    # A test that was left out might have used them.
    assert unused(guarded, "-k", "not more") == [str(other[1])]
    assert unused(guarded, "--deselect", "test_more.py::test_more") == [str(other[1])]
    assert unused(guarded, "test_my_saturation.py::test_saturation") == []
    assert unused(guarded, "test_my_saturation.py") == []
    skipped = STORED_PROFILE.replace("def ", "@pytest.mark.skip\ndef ")
    guarded.makepyfile(test_more=f"import pytest\n{skipped}")
    assert unused(guarded) == [str(other[1])]
    worse = STORED_EVALUATION.replace("**group", "**group, 'points': []")
    guarded.makepyfile(test_my_budgets=worse)
    # The budgets' test comes first, and fails: the others were not run.
    assert unused(guarded, "-x") == [str(other[1])]
    assert unused(guarded, "--lf") == []


def test_tests_that_only_carry_the_marker_say_nothing_about_baselines(
    guarded: pytest.Pytester,
) -> None:
    guarded.makepyfile(
        test_my_saturation="import pytest\n@pytest.mark.saturation\ndef test_mine(): pass"
    )
    assert unused(guarded, "test_my_budgets.py", "test_my_saturation.py") == []
    assert unused(guarded) == []


# --- Several processes -----------------------------------------------------------------------

#: Two tests for two workers, on files alone: neither has to import torch.
WORKERS = """
from pathlib import Path
import pytest
from cascade import read_profile

@pytest.mark.parametrize("number", range(6))
def test_it(saturation_baseline, number):
    saturation_baseline.check(read_profile(Path(f"{number}.json")))
"""


def test_what_workers_found_is_one_report(
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
        Path(f"{number}.json").write_text(to_json(moved.content))
        Path(f"{number}.npz").write_bytes(packed(moved.state))
        stored = Path(f"baselines/tiny/words{number}.saturation.json")
        stored.parent.mkdir(parents=True, exist_ok=True)
        profile = a_profile(8, about=about)
        stored.write_text(to_json(profile.content))
        stored.with_suffix(".npz").write_bytes(packed(profile.state))
    stored.with_name("nobody.saturation.json").write_text("{}")
    options = ("-n", 2, "--cascade-report", "out", "--junitxml", "junit.xml")
    done = ran(project, *options)
    done.assert_outcomes(passed=5, failed=1)
    record = json.loads(Path("out/report.json").read_text())
    assert record["verdict"] == "FAIL"
    found = {part["name"]: part["verdict"] for part in record["comparisons"]}
    assert found == {f"tiny/words{n}": "FAIL" if n == 4 else "PASS" for n in range(6)}
    assert record["unused"] == ["baselines/tiny/nobody.saturation.json"]
    assert summary.read_text().count("CASCADE: FAIL") == 1
    verdicts = sorted(values["cascade_verdict"] for values in properties("junit.xml"))
    assert verdicts == ["FAIL", *["PASS"] * 5]
    # And a marker that is refused is said there, too.
    project.makepyfile("import pytest\n@pytest.mark.saturation(3)\ndef test_bad(): pass")
    done = ran(project, "-n", 1, "-k", "test_bad")
    done.stdout.fnmatch_lines(["*test_bad: marker saturation takes no positional argument, got 3*"])
    assert done.ret == pytest.ExitCode.TESTS_FAILED


def test_two_workers_that_make_one_baseline_leave_a_whole_one(project: pytest.Pytester) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    Path("test_my_budgets.py").unlink()
    project.makepyfile(test_my_saturation=WORKERS.replace("range(6)", "range(12)"))
    for number in range(12):  # of one model and corpus, all different
        profile = a_profile(8, seed=number)
        Path(f"{number}.json").write_text(to_json(profile.content))
        Path(f"{number}.npz").write_bytes(packed(profile.state))
    done = ran(project, "-n", 2, "--regen-all", "--cascade-report", "out")
    done.assert_outcomes(passed=12)
    stored = Path("baselines/tiny/words.saturation.json")
    kept = read_profile(stored).record()
    assert kept in [read_profile(Path(f"{number}.json")).record() for number in range(12)]
    assert sorted(p.name for p in stored.parent.iterdir()) == [stored.name, f"{stored.stem}.npz"]
    record = json.loads(Path("out/report.json").read_text())
    assert record["regenerated"] == [str(stored)]


def test_what_two_processes_found_counts_once() -> None:
    comparison = {"name": "a/b", "path": "b.json", "headline": "no drift", "verdict": "PASS"}
    one, other = Findings(), Findings()
    for findings, test in ((one, "a"), (other, "b")):
        findings.comparisons.append(comparison | {"gate": {"seconds": len(test)}})
        findings.missing.append({"path": "c.json", "command": "make it"})
        findings.note("selected", "saturation", "both")
        findings.note("ran", "saturation", test)
    one.comparisons[0] |= {"gate": {"seconds": 2}}
    one.regenerated.append("c.json")
    total = Findings()
    for findings in (one, other):
        total.absorb(findings.dump())
    assert total.selected == {"saturation": ["both"]}
    assert total.ran == {"saturation": ["a", "b"]}
    record = total.record()
    assert record is not None
    assert len(record["comparisons"]) == 1
    assert record["missing"] == []  # one of them made it
    assert Findings().record() is None


# --- A project without tests, and without use for any of this --------------------------------


def test_a_project_with_no_test_file_runs_the_suite(guarded: pytest.Pytester, models: Path) -> None:
    for name in ("pytest.ini", "test_my_saturation.py", "test_my_budgets.py"):
        Path(name).unlink()
    given = ("--pyargs", "cascade.suite", "--cascade-model", models / "tiny")
    given = (*given, "--cascade-corpus", "texts.jsonl", "--strict-markers")
    done = ran(guarded, *given, "-m", "saturation")
    done.assert_outcomes(passed=1, deselected=1)
    ran(guarded, *given).assert_outcomes(passed=2)
    shutil.copytree(models / "other", guarded.path / "tiny")
    done = ran(guarded, *given, "--cascade-model", "tiny", "-m", "saturation")
    done.assert_outcomes(failed=1, deselected=1)
    assert failure(done).startswith("NOT COMPARABLE: model.weights_hash is sha256:")


def twelve_lines(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]


def test_the_twelve_lines_of_the_docs_are_twelve_and_run_what_there_is(
    project: pytest.Pytester,
) -> None:
    text = twelve_lines("docs/gate.md")
    assert text == twelve_lines("README.md")
    assert len(text.splitlines()) == 12
    workflow = yaml.safe_load(text)
    runs = [step["run"] for step in workflow["jobs"]["gate"]["steps"] if "run" in step]
    (command,) = [run for run in runs if run.startswith("pytest ")]
    # The very line, but for the model: it fails for want of a baseline, and reports that.
    arguments = shlex.split(command)[1:]
    Path("pytest.ini").unlink()
    given = (f"--cascade-model={project.path / 'nowhere'}", "--cascade-corpus=texts.jsonl")
    done = ran(project, *arguments, *given)
    done.assert_outcomes(errors=1, deselected=1)
    assert json.loads(Path("report/report.json").read_text())["verdict"] == "NOT COMPARABLE"


def test_the_docs_know_every_option_marker_argument_and_fixture() -> None:
    text = (ROOT / "docs/gate.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--cascade-[\w-]+)` ", text, re.MULTILINE)
    options = [f"--cascade-{f.name.replace('_', '-')}" for f in dataclasses.fields(Settings)]
    assert rows == options
    for name, arguments in settings.MARKERS.items():
        assert f"@pytest.mark.{name}(" in text
        assert all(f"{argument}=" in text for argument in arguments)
    for name in ("saturation", "budgets"):
        test = SATURATION if name == "saturation" else BUDGETS
        assert f"```python\n{test.strip()}\n```" in text
    for fixture in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE):
        assert callable(getattr(plugin, fixture))


def test_our_own_workflow_runs_tox_and_keeps_the_report() -> None:
    text = (ROOT / ".github/workflows/cascade.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"tox", "tox -e gate"} <= {step.get("run") for step in steps}
    (upload,) = [s for s in steps if s.get("uses", "").startswith("actions/upload-artifact")]
    assert upload["with"]["path"] == "report/"
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    assert "--pyargs cascade.suite --cascade-report=report" in tox
    assert "GITHUB_STEP_SUMMARY" in tox


HEAVY = {"torch", "transformers", "datasets", "numpy", "matplotlib", "scipy", "rich"}


@pytest.mark.parametrize("arguments", [["--help"], ["test_it.py"], ["--collect-only", "--markers"]])
def test_a_session_that_does_not_use_it_imports_nothing_heavy(
    tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    # Other plugins of this environment are not the subject.
    code = textwrap.dedent(
        f"""
        import sys, pytest
        status = pytest.main(["-p", "cascade.plugin", "-q", *{arguments}])
        assert "cascade.plugin" in sys.modules
        print("status", int(status), "heavy", sorted({HEAVY} & {{*sys.modules}}))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
    )
    assert done.stdout.strip().endswith("status 0 heavy []")
    assert ("--cascade-model" in done.stdout) == (arguments == ["--help"])

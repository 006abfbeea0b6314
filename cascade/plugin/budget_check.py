"""The check of early exit against its stored budgets."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cascade.core.errors import RecordError
from cascade.plugin.checks import Check
from cascade.plugin.measuring import MeasuredEvaluations, one_line
from cascade.plugin.settings import marked, shown

Record = dict[str, Any]


class BudgetCheck(Check):
    """Holds evaluations of early exit to their budgets (the fixture `exit_budget`)."""

    kind = "budgets"

    def check(self, evaluation: Mapping[str, Any] | Sequence[Record]) -> None:
        """Fail unless every stored point keeps its budgets.

        Args:
            evaluation: `cascade_evaluation`, which measures the stored points; or a record of kind
                `evaluation`, or several.
        """
        __tracebackhide__ = True
        with one_line():
            path = self._path(evaluation)
        with self._noted(path) as option:
            if option is not None:
                self._regenerate(evaluation, path, option)
                return
            if not path.exists():
                self._fail_missing(path)
            overruns, points, tokens = self._overruns(evaluation, path)
        verdict = "FAIL" if overruns else "PASS"
        self._add(path, verdict, points, [asdict(overrun) for overrun in overruns], None)
        worst = f"{overruns[0].point}: {overruns[0].figure}" if overruns else "none"
        self._add_properties(verdict, worst, tokens)
        if overruns:
            pytest.fail(self._message(overruns, points, path), pytrace=False)

    def _path(self, evaluation: Any) -> Path:
        from cascade.gate.baselines import baseline_paths

        if isinstance(evaluation, MeasuredEvaluations):
            return evaluation.path
        first = _records(evaluation)[0]
        about = {"kind": self.kind, "provenance": first["provenance"]}
        return baseline_paths(self.settings.baselines, about)[0]

    def _groups(self, path: Path) -> list[tuple[int, Record]]:
        """Return the groups that this test is about, with their numbers."""
        from cascade.gate.remeasuring import read_groups

        given = marked(self.item, self.kind)
        layer = given.get("exit_layer", self.settings.exit_layer)
        propagation = given.get("propagation")
        everything = read_groups(path)
        kept = []
        for number, group in enumerate(everything):
            if propagation not in (None, group["settings"]["propagation"]):
                continue
            points = [p for p in group["points"] if layer in (None, p["exit_layer"])]
            if points:
                kept.append((number, group | {"points": points}))
        if not kept:
            layers = sorted({p["exit_layer"] for group in everything for p in group["points"]})
            ways = sorted({group["settings"]["propagation"] for group in everything})
            raise RecordError(
                f"{shown(path)} has no point at exit layer {layer or 'any'} with propagation "
                f"{propagation or 'any'}; it has layers {', '.join(map(str, layers)) or 'none'} "
                f"and propagation {', '.join(ways) or 'none'}"
            )
        return kept

    def _overruns(self, evaluation: Any, path: Path) -> tuple[list[Any], int, int]:
        from cascade.gate.budgets import check_budgets

        groups = self._groups(path)
        overruns: list[Any] = []
        tokens = 0
        if isinstance(evaluation, MeasuredEvaluations):
            pairs = [(evaluation.of(number), [group]) for number, group in groups]
        else:
            pairs = [(record, [group for _, group in groups]) for record in _records(evaluation)]
        for record, stored in pairs:
            overruns += check_budgets(record, {"groups": stored})
            tokens += record["provenance"]["corpus"].get("tokens", 0)
        return overruns, sum(len(group["points"]) for _, group in groups), tokens

    def _add(
        self, path: Path, verdict: str, points: int, overruns: Sequence[Record], reason: str | None
    ) -> None:
        self.findings.budgets.append(
            {
                "name": f"{path.parent.name}/{path.name.removesuffix('.budgets.json')}",
                "path": shown(path),
                "verdict": verdict,
                "points": points,
                "overruns": list(overruns),
                "reason": reason,
            }
        )

    def _add_nothing(self, path: Path, reason: str) -> None:
        self._add(path, "NOT COMPARABLE", 0, (), reason)

    def _message(self, overruns: Sequence[Any], points: int, path: Path) -> str:
        commands = dict.fromkeys(_without_output(overrun.command) for overrun in overruns)
        return "\n".join(
            [
                f"FAIL: {shown(path)}: not kept: {len(overruns)} of the budgets of {points} points",
                *(f"{overrun.point}: {overrun.found}" for overrun in overruns),
                "",
                *(f"To look closer: {command}" for command in commands),
                *(
                    f"To accept what is meant: {command} --output RUN && "
                    f"{self.settings.accept_command()}"
                    for command in commands
                ),
            ]
        )

    def _regenerate(self, evaluation: Any, path: Path, option: str) -> None:
        from cascade.gate.budgets import check_budgets
        from cascade.gate.remeasuring import read_groups
        from cascade.gate.renewal import replace_budgets

        if not isinstance(evaluation, MeasuredEvaluations):
            records = _records(evaluation)
        elif path.exists():
            records = [evaluation.of(number) for number in range(len(evaluation.groups))]
        else:
            records = [evaluation.first()]
        lines: list[str] = []
        moved = not path.exists()
        if path.exists():
            stored = {"groups": read_groups(path)}
            for record in records:
                try:
                    lines += map(str, check_budgets(record, stored))
                except RecordError as error:
                    lines.append(str(error))
            moved = bool(lines)
        if option == "--force-regen" and not moved:
            points = sum(len(record["points"]) for record in records)
            self._add(path, "PASS", points, (), None)
            self._add_properties("PASS", "none", 0)
            return
        replace_budgets(path, records)
        if isinstance(evaluation, MeasuredEvaluations):
            evaluation.forget()
        before = ["Against the budgets before:", *lines] if lines else []
        self._regenerated(path, option, "\n".join(before))


def _without_output(command: str) -> str:
    """Return a command line that writes nowhere: where it once wrote, there is a run already."""
    parts = iter(shlex.split(command))
    kept = []
    for part in parts:
        if part == "--output":
            next(parts, None)
        elif part != "--overwrite" and not part.startswith("--output="):
            kept.append(part)
    return shlex.join(kept)


def _records(evaluation: Any) -> list[Record]:
    if isinstance(evaluation, Mapping):
        return [dict(evaluation)]
    records = list(evaluation)
    if not records or not all(isinstance(record, Mapping) for record in records):
        raise RecordError(
            "expected cascade_evaluation, or records of kind evaluation, got "
            f"{type(evaluation).__name__}"
        )
    return records

"""The check of evaluations against stored budgets."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from msgspec.structs import replace

from cascade.core.errors import RecordError
from cascade.core.printable import printable
from cascade.core.schema import known
from cascade.evaluation.records import EvaluationRecord
from cascade.gate.records import BudgetGroup, BudgetOutcome, BudgetSource, Overrun, Verdict
from cascade.plugin.checks import Check
from cascade.plugin.measuring import MeasuredEvaluations, create_command, one_line
from cascade.plugin.settings import budget_options

#: An evaluation, typed or as dictionaries and lists.
Evaluation = EvaluationRecord | Mapping[str, Any]


class BudgetCheck(Check):
    """Checks evaluations of early exit against their budgets (the fixture `exit_budget`)."""

    kind = "budgets"

    def check(
        self, evaluation: Evaluation | Sequence[Evaluation], *, required: bool = True
    ) -> None:
        """Fail the test unless every stored operating point is within its budgets.

        Args:
            evaluation: `cascade_evaluation`, which measures the stored operating points; or one or
                several records of kind `evaluation`.
            required: Whether the test fails in a project that stores no budgets at all; if not, it
                is skipped.
        """
        __tracebackhide__ = True
        with one_line():
            path = self._path(evaluation)
        with self._noted(path) as option:
            if option is not None:
                self._regenerate(evaluation, path, option)
                return
            if not path.exists():
                if not required and not any(self.settings.folder().glob("*/*.budgets.json")):
                    self._skip_missing(path)
                self._fail_missing(path)
            self._note_older(path)
            overruns, points, tokens = self._overruns(evaluation, path)
            overruns += self._lossless(evaluation, path)
        verdict: Verdict = "FAIL" if overruns else "PASS"
        self._add(path, verdict, points, overruns)
        worst = f"{overruns[0].point}: {overruns[0].figure}" if overruns else "none"
        self._add_properties(verdict, worst, tokens)
        if overruns:
            pytest.fail(printable(self._message(overruns, points, path), keep="\n"), pytrace=False)

    def _note_older(self, path: Path) -> None:
        from cascade.gate.older_baselines import budgets_note

        note = budgets_note(path)
        if note is not None:
            line = f"{self.settings.name_of(path)}: {note}"
            self.findings.notes += [line] if line not in self.findings.notes else []

    def _skip_missing(self, path: Path) -> NoReturn:
        line = (
            f"no budgets of early exit in {self.settings.place}; record them with "
            f"{create_command(path, self.settings)}"
        )
        self.findings.notes.append(f"Not checked: {line}")
        pytest.skip(line)

    def _path(self, evaluation: Evaluation | Sequence[Evaluation]) -> Path:
        from cascade.gate.baselines import baseline_paths

        if isinstance(evaluation, MeasuredEvaluations):
            return evaluation.path
        about = _sources(evaluation)[0].provenance
        names = {"model": known(about.model.name), "corpus": about.corpus.name}
        return self.settings.checked(baseline_paths(self.settings.folder(), self.kind, **names)[0])

    def _groups(self, path: Path) -> list[tuple[int, BudgetGroup]]:
        """Return the groups that this test checks, with their numbers."""
        from cascade.gate.budgets import read_budgets

        options = budget_options(self.item, self.settings)
        layer, propagation = options.exit_layer, options.propagation
        everything = read_budgets(path).groups
        kept = []
        for number, group in enumerate(everything):
            if propagation not in (None, group.settings.propagation):
                continue
            points = [point for point in group.points if layer in (None, point.exit_layer)]
            if points:
                kept.append((number, replace(group, points=points)))
        if not kept:
            layers = sorted({point.exit_layer for group in everything for point in group.points})
            propagations = sorted({group.settings.propagation for group in everything})
            raise RecordError(
                f"expected an operating point at {_described(layer, propagation)} in "
                f"{self.settings.name_of(path)}, got layers "
                f"{', '.join(map(str, layers)) or 'none'} and propagation "
                f"{', '.join(propagations) or 'none'}"
            )
        return kept

    def _overruns(
        self, evaluation: Evaluation | Sequence[Evaluation], path: Path
    ) -> tuple[list[Overrun], int, int]:
        """Return the exceeded budgets, the number of checked operating points and of tokens."""
        from cascade.gate.budgets import budget_source, check_budgets

        groups = self._groups(path)
        if isinstance(evaluation, MeasuredEvaluations):
            pairs = [(budget_source(evaluation.of(number)), [group]) for number, group in groups]
        else:
            pairs = [(source, [group for _, group in groups]) for source in _sources(evaluation)]
        overruns: list[Overrun] = []
        tokens = 0
        for source, stored in pairs:
            overruns += check_budgets(source, stored)
            tokens += source.provenance.corpus.tokens
        if isinstance(evaluation, MeasuredEvaluations):
            for number, group in groups:
                overruns += evaluation.generating_differs(number, group)
        return overruns, sum(len(group.points) for _, group in groups), tokens

    def _lossless(self, evaluation: Evaluation | Sequence[Evaluation], path: Path) -> list[Overrun]:
        """Return how lossless decoding falls short of its budget, if there is one.

        A given record is checked as far as it measured lossless decoding.
        """
        from cascade.gate.budgets import read_budgets
        from cascade.gate.lossless_budgets import incomparable_because, lossless_overruns

        budget = known(read_budgets(path).lossless)
        if budget is None:
            return []
        if isinstance(evaluation, MeasuredEvaluations):
            measured = [evaluation.lossless()]
        else:
            measured = [known(source.lossless) for source in _sources(evaluation)]
        overruns: list[Overrun] = []
        for figures in measured:
            if figures is None:
                continue
            because = incomparable_because(budget, figures)
            if because is not None:
                self.findings.notes.append(
                    f"Tokens per pass of lossless decoding not compared with "
                    f"{self.settings.name_of(path)}: "
                    f"{because}"
                )
            overruns += lossless_overruns(budget, figures)
        return overruns

    def _add(
        self,
        path: Path,
        verdict: Verdict,
        points: int,
        overruns: Sequence[Overrun] = (),
        reason: str | None = None,
    ) -> None:
        self.findings.budgets.append(
            BudgetOutcome(
                name=f"{path.parent.name}/{path.name.removesuffix('.budgets.json')}",
                path=self.settings.name_of(path),
                verdict=verdict,
                points=points,
                overruns=list(overruns),
                reason=reason,
                remote=self.settings.origin(),
            )
        )

    def _add_nothing(self, path: Path, reason: str) -> None:
        self._add(path, "NOT COMPARABLE", 0, reason=reason)

    def _message(self, overruns: Sequence[Overrun], points: int, path: Path) -> str:
        from cascade.gate.lossless_budgets import NAME

        where = self.settings.name_of(path)
        commands = dict.fromkeys(_without_output(overrun.command) for overrun in overruns)
        lossless = any(overrun.point == NAME for overrun in overruns)
        return "\n".join(
            [
                f"FAIL: {where}: {len(overruns)} budgets of {points} operating points "
                f"{'and lossless decoding ' * lossless}exceeded",
                *(f"{overrun.point}: {overrun.found}" for overrun in overruns),
                "",
                *(f"To inspect: {command}" for command in commands),
                *(
                    f"To accept an intended change: {command} --output RUN && "
                    f"{self.settings.accept_command()}"
                    for command in commands
                ),
            ]
        )

    def _regenerate(
        self, evaluation: Evaluation | Sequence[Evaluation], path: Path, option: str
    ) -> None:
        from cascade.gate.budgets import budget_source, check_budgets, read_budgets
        from cascade.gate.remeasuring import replace_budgets

        if not isinstance(evaluation, MeasuredEvaluations):
            sources = _sources(evaluation)
        elif path.exists():
            numbers = range(len(evaluation.groups))
            sources = [budget_source(evaluation.of(number)) for number in numbers]
            figures = evaluation.lossless()
            if figures is not None:
                sources = [replace(source, lossless=figures) for source in sources]
        else:
            sources = [budget_source(evaluation.first())]
        lines: list[str] = []
        moved = not path.exists()
        if path.exists():
            stored = read_budgets(path).groups
            for source in sources:
                try:
                    lines += map(str, check_budgets(source, stored))
                except RecordError as error:
                    lines.append(str(error))
            lines += map(str, dict.fromkeys(self._lossless(evaluation, path)))
            moved = bool(lines)
        if option == "--force-regen" and not moved:
            self._add(path, "PASS", sum(len(source.points) for source in sources))
            self._add_properties("PASS", "none", 0)
            return
        replace_budgets(path, sources)
        if isinstance(evaluation, MeasuredEvaluations):
            evaluation.forget()
        before = ["Compared with the previous budgets:", *lines] if lines else []
        self._regenerated(path, option, "\n".join(before))


def _described(layer: int | None, propagation: str | None) -> str:
    """Return the requested layer and propagation in words."""
    where = "any exit layer" if layer is None else f"exit layer {layer}"
    return where if propagation is None else f"{where} with propagation {propagation}"


def _without_output(command: str) -> str:
    """Return a command line without its output folder, which already exists."""
    parts = iter(shlex.split(command))
    kept = []
    for part in parts:
        if part == "--output":
            next(parts, None)
        elif part != "--overwrite" and not part.startswith("--output="):
            kept.append(part)
    return shlex.join(kept)


def _sources(evaluation: Evaluation | Sequence[Evaluation]) -> list[BudgetSource]:
    """Return the fields that budgets need of one or several evaluations."""
    from cascade.gate.budgets import budget_source

    if isinstance(evaluation, EvaluationRecord | Mapping):
        return [budget_source(evaluation)]
    records = list(evaluation)
    if not records or not all(isinstance(one, EvaluationRecord | Mapping) for one in records):
        raise RecordError(
            "expected cascade_evaluation, or records of kind evaluation, got "
            f"{type(evaluation).__name__}"
        )
    return [budget_source(record) for record in records]

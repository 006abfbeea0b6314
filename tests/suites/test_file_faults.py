"""Every command that writes, failed or killed at its file operations: the old result or the new.

In the manner of SQLite's tests: one harness fails each file operation of a command in turn, then
reads everything back and runs the same command again.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.commands import DRAWN
from support.disk import contents
from support.file_faults import KINDS, Attempt, Fault, attempt

from cascade import Cascade, cli, load, load_hard_tokens
from cascade.core.records import read_typed
from cascade.core.run_folder import COMMITTED
from cascade.evaluation.records import EvaluationRecord
from cascade.exits.fitted_heads import load_heads
from cascade.gate.baselines import read_profile
from cascade.gate.records import SessionRecord

#: Faults that are tried for each command by default, besides those around the switch.
_TRIED = 6

ON_TEXTS = ("--corpus", "texts.jsonl", "--seq-len", "16")


@dataclass(frozen=True)
class Case:
    """A command that writes.

    Attributes:
        old: The commands that leave an older result.
        new: The command that is failed; run again, it has to succeed.
        read: Reads the result with all checks; a value that differs between old and new.
    """

    old: tuple[tuple[str, ...], ...]
    new: tuple[str, ...]
    read: Callable[[Path], Any]


def tokens_of_profile(path: str) -> Callable[[Path], Any]:
    return lambda models: read_profile(path).record().provenance.corpus.tokens


def _analyze(tokens: int, *more: str) -> tuple[str, ...]:
    return ("analyze", *ON_TEXTS, "--max-tokens", str(tokens), "--overwrite", *more)


_HARD = ("collect-hard", *ON_TEXTS, "--output", "hard", "--overwrite")
_TRAIN = ("train", *ON_TEXTS, "--hard-ratio", "0.5", "--epochs", "1", "--output", "staged")
_FIT = ("fit-heads", *ON_TEXTS, "--output", "h.safetensors", "--overwrite")
_EVALUATE = ("evaluate", *ON_TEXTS, "--max-tokens", "320", "--output", "run", "--overwrite")

CASES = {
    "analyze": Case(
        (_analyze(160, "--output", "run"),),
        _analyze(320, "--output", "run"),
        tokens_of_profile("run"),
    ),
    "accept": Case(
        (
            _analyze(160, "--output", "run"),
            ("accept", "run"),
            _analyze(320, "--output", "run"),
        ),
        ("accept", "run"),
        tokens_of_profile("baselines/tiny/texts.saturation.json"),
    ),
    "fit-heads": Case(
        ((*_FIT, "--layers", "2"),),
        (*_FIT, "--layers", "2,3"),
        lambda models: load_heads("h.safetensors", load(str(models / "tiny"))).layers,
    ),
    "evaluate": Case(
        ((*_EVALUATE, "--point", "2:cosine:0.5"),),
        (*_EVALUATE, "--point", "3:cosine:0.5"),
        lambda models: (
            read_typed(Path("run/evaluation.json"), EvaluationRecord).points[0].exit_layer
        ),
    ),
    "collect-hard": Case(
        ((*_HARD, "--hard-ratio", "0.5", "--max-tokens", "320"),),
        (*_HARD, "--hard-ratio", "0.4", "--max-tokens", "480"),
        lambda models: len(load_hard_tokens("hard")),
    ),
    "train": Case(
        ((*_TRAIN, "--overwrite"),),
        (*_TRAIN, "--overwrite", "--lr", "3e-3"),
        lambda models: (
            Cascade.from_pretrained("staged", load(str(models / "tiny")))
            .stages[0]
            .provenance.config.learning_rate
        ),
    ),
    "gate": Case(
        (
            ("analyze", *ON_TEXTS, "--output", "run"),
            ("accept", "run"),
            ("gate", *ON_TEXTS, "--output", "out"),
        ),
        ("gate", *ON_TEXTS, "--output", "out", "--full", "--overwrite"),
        lambda models: str(
            read_typed(Path("out/report.json"), SessionRecord).comparisons[0].command
        ),
    ),
}


@pytest.fixture
def command(
    here: Path, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Callable[[], int]]:
    """Return a function that prepares a command; drawings are stand-ins, which take no time."""
    for name, size in DRAWN.items():
        text = name.ljust(size)
        monkeypatch.setattr(f"cascade.report.saturation.{name}", lambda *a, text=text, **b: text)

    def prepared(*arguments: str) -> Callable[[], int]:
        name, *rest = arguments
        model = () if name in ("accept",) else ("--model", str(models / "tiny"))

        def run() -> int:
            monkeypatch.setattr(sys, "argv", ["cascade", name, *model, *rest])
            try:
                cli.main()
            except SystemExit as end:
                return end.code if isinstance(end.code, int) else 0
            return 0

        return run

    return prepared


def leftovers(folder: Path) -> list[str]:
    """Return hidden files and folders, which no finished command leaves."""
    return [name for name in contents(folder) if any(p[0] == "." for p in Path(name).parts)]


@contextlib.contextmanager
def _copied(template: Path, here: Path) -> Iterator[None]:
    for entry in here.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    shutil.copytree(template, here, dirs_exist_ok=True)
    yield


def _faults(operations: int, switch: list[int], *, everything: bool) -> list[Fault]:
    """Return the faults to try: all of them, or some with a fixed seed and all around a switch."""
    every = [Fault(number, kind) for number in range(1, operations + 1) for kind in KINDS]
    if everything:
        return every
    near = {number for place in switch for number in range(place - 1, place + 4)}
    chosen = [fault for fault in every if fault.operation in near and fault.kind == "kill"]
    rest = [fault for fault in every if fault not in chosen]
    return chosen + random.Random(0).sample(rest, min(_TRIED, len(rest)))


def _check(case: Case, done: Attempt, fault: Fault, models: Path, old: Any, new: Any) -> str:
    """Assert what has to hold after a fault; return which result was left."""
    if fault.kind == "kill":
        assert done.status == 137
    elif done.status != 0:  # 0 where the operation was not needed
        assert done.status == 2, (fault, done)
        lines = [line for line in done.err.splitlines() if line.startswith("cascade: ")]
        assert len(lines) == 1, (fault, done.err)
        assert "Traceback" not in done.err, (fault, done.err)
    found = case.read(models)
    assert found in (old, new), fault
    return "new" if found == new else "old"


@pytest.mark.parametrize("name", CASES)
def test_a_fault_at_any_file_operation_leaves_the_old_result_or_the_new(
    name: str, command: Callable[..., Callable[[], int]], here: Path, models: Path, tmp_path: Path
) -> None:
    _try(name, command, here, models, tmp_path / "template", everything=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_fault_at_every_file_operation(
    name: str,
    command: Callable[..., Callable[[], int]],
    here: Path,
    models: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    counts = _try(name, command, here, models, tmp_path / "template", everything=True)
    path = Path(__file__).with_suffix("") / f"{name}.json"
    if request.config.getoption("force_regen"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(counts, indent=1) + "\n")
    assert json.loads(path.read_text())["faults"] > 0


def _try(
    name: str,
    command: Callable[..., Callable[[], int]],
    here: Path,
    models: Path,
    template: Path,
    *,
    everything: bool,
) -> dict[str, int]:
    case = CASES[name]
    for arguments in case.old:
        assert attempt(command(*arguments), here, None).status in (0, 1), arguments
    old = case.read(models)
    shutil.copytree(here, template)
    again = command(*case.new)
    whole = attempt(again, here, None)
    assert whole.status == 0, whole.err
    new = case.read(models)
    assert old != new
    assert leftovers(here) == []
    counts = {"operations": whole.operations, "faults": 0, "old": 0, "new": 0}
    switch = [whole.operations * 3 // 4]
    for fault in _faults(whole.operations, switch, everything=everything):
        with _copied(template, here):
            done = attempt(again, here, fault)
            left = _check(case, done, fault, models, old, new)
            counts["faults"] += 1
            counts[left] += 1
            repeated = attempt(again, here, None)
            assert repeated.status == 0, (fault, repeated.err)
            assert case.read(models) == new, fault
            assert leftovers(here) == [], fault
            assert not (here / COMMITTED).exists()
    return counts

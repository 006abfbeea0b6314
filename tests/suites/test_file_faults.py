"""Every command that writes, failed or killed at its file operations: the old result or the new.

In the manner of SQLite's tests: one harness fails each file operation of a command in turn, then
reads everything back and runs the same command again. `support.file_faults` says what can happen
at an operation. Some faults are tried by default, all of them by `-m slow`.
"""

from __future__ import annotations

import functools
import json
import pkgutil
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer.main
from matplotlib.figure import Figure
from safetensors import safe_open
from support.commands import DRAWN
from support.file_faults import (
    DEATHS,
    Attempt,
    Fault,
    Operation,
    attempt,
    contents,
    kinds_of,
)
from support.paths import DOCS
from support.plugin_project import BASELINE, INI, PLUGIN, SATURATION

from cascade import Cascade, cli, load, load_drafter, load_hard_tokens
from cascade.core.errors import CascadeError
from cascade.core.files import xxh3_of
from cascade.core.reading import read_arrays, read_json
from cascade.core.records import read_typed
from cascade.core.run_folder import COMMITTED, recover
from cascade.evaluation.records import EvaluationRecord
from cascade.evaluation.search.records import SearchRecord
from cascade.exits.fitted_heads import load_heads
from cascade.gate.baselines import read_profile
from cascade.gate.budgets import read_budgets
from cascade.gate.history.records import HistoryRecord
from cascade.gate.records import NoiseRecord, SessionRecord
from cascade.saturation.records import NoiseFloor
from cascade.stages.hard_tokens import plan
from cascade.stages.hard_tokens.dataset import WORK

#: Faults that are tried for each command by default, besides those of every command.
_TRIED = 2

#: Hidden folders that a refused command may leave for the next one: a complete result, and work
#: to continue.
_KEPT = (COMMITTED, WORK)

Command = Callable[[], int]
Words = tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """A command that writes.

    Attributes:
        new: The command that is failed; run again, it has to succeed.
        read: Reads the result with all checks; a value that differs between old and new. What
            it gives where there is no result, as a string, is a result as well.
        old: The commands that leave an older result.
        prepare: Lays out more files before the commands run.
        between: Changes files between the commands of `old` and the one that is failed.
        interrupted: The last command of `old` is killed after it first did this: an event and a
            part of a path. Then the command that is failed has to continue.
        files: A pattern of the files that belong together.
        ends: The exit statuses of success.
    """

    new: Words
    read: Callable[[Path], Any]
    old: tuple[Words, ...] = ()
    prepare: Callable[[Path, Path], None] = lambda here, models: None
    between: Callable[[Path], None] = lambda here: None
    interrupted: tuple[str, str] | None = None
    files: str = r"here/.*"
    ends: tuple[int, ...] = (0,)


# --- What is read back ----------------------------------------------------------------------


def or_none(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Read a result that there may not be yet."""

    def found(models: Path) -> Any:
        try:
            return read(models)
        except FileNotFoundError:
            return "nothing"
        except CascadeError as error:
            if re.search(r"\bno (record|dataset|cascade)\b|is not finished", str(error)):
                return "nothing"
            raise

    return found


def profile(path: str) -> Callable[[Path], Any]:
    return lambda models: read_profile(path).record().provenance.corpus.tokens


def command_of(path: str, kind: Any) -> Callable[[Path], Any]:
    return lambda models: read_typed(Path(path), kind).provenance.command


def session(path: str) -> Callable[[Path], Any]:
    def read(models: Path) -> Any:
        for noise in _cached("noise/*.json"):
            assert read_typed(noise, NoiseRecord).sequences == 4
        read_typed(Path(path), SessionRecord)
        return read_json(Path(path))["hash"]

    return read


def _cached(pattern: str) -> list[Path]:
    found = sorted(Path("../cache").glob(pattern))
    return [path for path in found if not path.name.startswith(".")]


def dequantized(models: Path) -> Any:
    """Return the names of the whole copies of GGUF files in the cache."""
    for folder in _cached("weights/*"):
        files = read_json(folder / "cascade.json")["files"]
        assert {path.name for path in folder.iterdir()} == {*files, "cascade.json"}
        assert all(xxh3_of(folder / name) == digest for name, digest in files.items())
    return [folder.name for folder in _cached("weights/*")]


def stage(models: Path) -> Any:
    loaded = Cascade.from_pretrained("staged", load(str(models / "tiny")))
    return loaded.stages[0].provenance.config.learning_rate


def drafter(models: Path) -> Any:
    return load_drafter("drafted", load(str(models / "tiny"))).record.config.steps


def exported(models: Path) -> Any:
    recover(Path("exported"))
    with safe_open("exported/model.safetensors", "pt") as file:
        assert "fc.weight" in set(file.keys())
    return read_json(Path("exported/config.json"))["speculators_config"]["verifier"]


# --- What is run ------------------------------------------------------------------------------

ON_TEXTS = ("--corpus", "texts.jsonl", "--seq-len", "16")
OVER = ("--output", "run", "--overwrite")


def _analyze(tokens: int, *more: str) -> Words:
    return ("analyze", *ON_TEXTS, "--max-tokens", str(tokens), *more)


def _words(text: str) -> Words:
    return tuple(text.split())


_FIT = ("fit-heads", *ON_TEXTS, "--output", "h.safetensors", "--overwrite")
_EVALUATE = (
    *("evaluate", *ON_TEXTS, "--max-tokens", "160", "--only-points", "--no-lossless"),
    *OVER,
)
_SEARCH = ("search-exit", *ON_TEXTS, "--max-tokens", "160", "--layers", "2,3", *OVER)
_CALIBRATE = ("calibrate", *ON_TEXTS, "--layer", "3", *OVER)
_EXPLAIN = ("explain", *ON_TEXTS, "--max-tokens", "160", *OVER)
_CORPORA = ("compare-corpora", "texts.jsonl", "others.jsonl", "--seq-len", "16", *OVER)
_MODELS = ("compare-models", "{models}/tiny", *ON_TEXTS, "--max-tokens", "160", *OVER)
_FEW = (*ON_TEXTS, "--num-samples", "10")
_HARD = ("collect-hard", *_FEW, "--batch-size", "4", "--output", "hard")
_TRAIN = ("train", *_FEW, "--hard-ratio", "0.5", "--epochs", "1", "--output", "staged")
_DRAFT = (
    *("train-drafter", "--corpus", "texts.jsonl", "--tokens", "60", "--max-new-tokens", "6"),
    *("--batch-size", "4", "--vocabulary", "50", "--output", "drafted"),
)
_EAGLE = (*_DRAFT, "--steps", "1", "--architecture", "eagle3")
_EXPORT = ("export-drafter", "drafted", "--output", "exported", "--overwrite", "--verifier")
_BENCH = ("bench", "collect-hard", "--tokens", "160", "--seq-len", "16", *OVER)
_GGUF = _words("generate --model {models}/tiny.gguf --prompt Number --no-compare")
_GATE = ("gate", *ON_TEXTS, "--output", "out")
_ACCEPTED = (_analyze(160, *OVER), ("accept", "run"))


def other_texts(here: Path, models: Path) -> None:
    rows = [{"text": f"{n:09}" * 5} for n in range(40)]
    (here / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def stored_findings(here: Path, models: Path) -> None:
    shutil.copytree(DOCS / "findings", here / "docs/findings")
    for picture in (here / "docs/findings").glob("*.svg"):
        picture.write_text("old")
    (here / "docs/findings.md").write_text("old")


def project(here: Path, models: Path) -> None:
    """Lay out a project that uses the plugin."""
    (here / "pytest.ini").write_text(INI.format(model=models / "tiny"))
    (here / "test_my_saturation.py").write_text(SATURATION)


def fewer_texts(here: Path) -> None:
    lines = (here / "texts.jsonl").read_text().splitlines(keepends=True)
    (here / "texts.jsonl").write_text("".join(lines[:20]))


def without_noise(here: Path) -> None:
    for path in (here.parent / "cache/noise").iterdir():
        path.unlink()


CASES: Mapping[str, Case] = {
    "analyze": Case(_analyze(320, *OVER), profile("run"), (_analyze(160, *OVER),)),
    "analyze --npz": Case(
        _analyze(320, "--npz", "x.npz", "--overwrite"),
        lambda models: sum(each.size for each in read_arrays(Path("x.npz")).values()),
        (_analyze(160, "--npz", "x.npz"),),
    ),
    "accept (a profile)": Case(
        ("accept", "run"), profile(str(BASELINE)), (*_ACCEPTED, _analyze(320, *OVER))
    ),
    "accept (budgets)": Case(
        ("accept", "run"),
        lambda models: [
            point.exit_layer
            for path in Path("baselines").rglob("*.budgets.json")
            for group in read_budgets(path).groups
            for point in group.points
        ],
        (
            (*_EVALUATE, "--point", "2:cosine:0.5"),
            ("accept", "run"),
            (*_EVALUATE, "--point", "3:cosine:0.5"),
        ),
    ),
    "gate": Case(
        (*_GATE, "--full", "--overwrite"),
        session("out/report.json"),
        (*_ACCEPTED, _GATE),
        between=without_noise,
        files="here/out/.*",
    ),
    "compare": Case(
        _words("compare run other --independent --output out --overwrite"),
        session("out/report.json"),
        (
            _analyze(160, *OVER),
            _analyze(160, "--output", "other"),
            _words("compare run other --output out"),
        ),
    ),
    "history": Case(
        _words("history run --output out --overwrite --seed 1"),
        lambda models: read_typed(Path("out/history.json"), HistoryRecord).command,
        (_analyze(160, *OVER), _words("history run --output out")),
        files="here/out/.*",
    ),
    "fit-heads": Case(
        (*_FIT, "--layers", "2,3"),
        lambda models: load_heads("h.safetensors", load(str(models / "tiny"))).layers,
        ((*_FIT, "--layers", "2"),),
    ),
    "calibrate": Case(
        (*_CALIBRATE, "--risk", "0.05"),
        lambda models: read_json(Path("run/calibration.json"))["provenance"]["command"],
        (_CALIBRATE,),
    ),
    "evaluate": Case(
        (*_EVALUATE, "--point", "3:cosine:0.5"),
        command_of("run/evaluation.json", EvaluationRecord),
        ((*_EVALUATE, "--point", "2:cosine:0.5"),),
    ),
    "search-exit": Case(
        (*_SEARCH, "--agreement", "0.4"),
        command_of("run/exit-search.json", SearchRecord),
        ((*_SEARCH, "--agreement", "0.5"),),
    ),
    "explain": Case(
        (*_EXPLAIN, "--layer", "3"),
        lambda models: read_json(Path("run/explanation.json"))["provenance"]["command"],
        ((*_EXPLAIN, "--layer", "2"),),
    ),
    "compare-corpora": Case(
        (*_CORPORA, "--layer", "3"),
        lambda models: read_json(Path("run/corpora.json"))["provenance"]["command"],
        ((*_CORPORA, "--layer", "2"),),
        prepare=other_texts,
    ),
    "compare-models": Case(
        (*_MODELS, "--copy", "int8"),
        lambda models: read_json(Path("run/models.json"))["provenance"]["command"],
        ((*_MODELS, "--copy", "bf16"),),
    ),
    "findings": Case(
        ("findings",),
        lambda models: recover(Path("docs")) or Path("docs/findings.md").read_text()[:40],
        prepare=stored_findings,
    ),
    "bench": Case(
        (*_BENCH, "--rounds", "3"),
        lambda models: read_json(Path("run/bench.json"))["provenance"]["command"],
        ((*_BENCH, "--rounds", "2"),),
    ),
    "collect-hard": Case(
        (*_HARD, "--hard-ratio", "0.4", "--overwrite"),
        lambda models: load_hard_tokens("hard").record.provenance.command,
        ((*_HARD, "--hard-ratio", "0.5"),),
    ),
    "collect-hard (continued)": Case(
        (*_HARD, "--hard-ratio", "0.5"),
        or_none(lambda models: load_hard_tokens("hard").record.provenance.command),
        ((*_HARD, "--hard-ratio", "0.5"),),
        interrupted=("os.rename", "data-00001"),
    ),
    "train": Case(
        (*_TRAIN, "--overwrite", "--lr", "3e-3"),
        stage,
        (_TRAIN,),
        files=r"here/staged/(cascade_config|stage).*",
    ),
    "train (continued)": Case(
        (*_TRAIN, "--resume"),
        or_none(stage),
        (_TRAIN,),
        interrupted=("os.rename", "/cascade.json"),
        files=r"here/staged/(cascade_config|stage).*",
    ),
    "train-drafter": Case(
        (*_DRAFT, "--steps", "2", "--overwrite"),
        drafter,
        ((*_DRAFT, "--steps", "1"),),
        files=r"here/drafted/[^/]*",
    ),
    "train-drafter (continued)": Case(
        (*_DRAFT, "--steps", "2", "--resume"),
        or_none(drafter),
        ((*_DRAFT, "--steps", "2"),),
        interrupted=("os.rename", "step-000002"),
        files=r"here/drafted/[^/]*",
    ),
    "export-drafter": Case(
        (*_EXPORT, "other"), exported, (_EAGLE, (*_EXPORT, "one")), files=r"here/exported/[^/]*"
    ),
    "generate (a GGUF file)": Case((*_GGUF, "--max-new-tokens", "2"), dequantized),
    "cache clear": Case(
        _words("cache clear --yes"), dequantized, ((*_GGUF, "--max-new-tokens", "2"),)
    ),
    "pytest --force-regen": Case(
        _words("pytest --force-regen"),
        profile(str(BASELINE)),
        (_words("pytest --force-regen"),),
        prepare=project,
        between=fewer_texts,
        files="here/baselines/.*",
        ends=(0, 1),
    ),
    "pytest --cascade-report report": Case(
        _words("pytest --cascade-report report"),
        session("report/report.json"),
        (_words("pytest --force-regen"), _words("pytest --cascade-report report")),
        prepare=project,
        between=fewer_texts,
        files="here/report/.*",
        ends=(0, 1),
    ),
}

#: What takes time and touches no files: measuring and drawing. A command that is run again
#: repeats what the first run got, instead of computing the same once more.
_REPEATED = (
    "cascade.core.provenance.library_versions",
    "cascade.models.loading.load",
    "cascade.saturation.profile.analyze",
    "cascade.gate.remeasuring.with_noise",
    "cascade.exits.head_fitting.fit_heads",
    "cascade.evaluation.calibration.calibrate",
    "cascade.evaluation.exit_evaluation.evaluate",
    "cascade.evaluation.search.exit_search.search_exits",
    "cascade.studies.explanations.layer_explanation.explain",
    "cascade.studies.comparisons.corpus_comparison.compare_corpora",
    "cascade.studies.comparisons.compared_models.measure_model",
    "cascade.benchmarks.hard_tokens.benchmark_hard_tokens",
    "cascade.report.common.sections.print_sections",
    "cascade.report.exits.calibration.print_calibration",
    "cascade.report.exits.evaluation.evaluation_report",
    "cascade.report.exits.search.exit_search_report",
    "cascade.report.gate.page.report_page",
    "cascade.report.gate.markdown.report_markdown",
    "cascade.report.gate.terminal.print_comparison",
    "cascade.report.saturation.terminal.print_profile",
    "cascade.report.studies.corpora.corpora_report",
    "cascade.report.studies.models.models_report",
    "cascade.report.studies.explanation.explanation_report",
    "cascade.report.studies.findings.findings_markdown",
    "cascade.report.studies.findings.findings_pictures",
)


# --- The harness --------------------------------------------------------------------------------


@pytest.fixture
def watched(here: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that holds the working folder and the cache; drawings take no time."""
    for name, size in DRAWN.items():
        monkeypatch.setattr(f"cascade.report.saturation.{name}", _stand_in(name, size))
    # Of another command is another picture, or it could not be told which one is there.
    draw = lambda self, file, **rest: file.write(f"<svg>{sys.argv[1:]}</svg>")  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", draw)
    # A pool of threads does not outlive a fork.
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
    # The noise floor is measured, and cached, on another machine than the baseline's.
    noise = NoiseFloor(repeat=4e-6, exact=1e-6, variants={}, sequences=4)
    monkeypatch.setattr("cascade.gate.quick_gate.measure_noise", lambda *a: noise)
    monkeypatch.setattr("cascade.gate.quick_gate.environment_differences", lambda *a: ["a"])
    clock = SimpleNamespace(perf_counter=lambda: 0.0)
    monkeypatch.setattr("cascade.gate.quick_gate.time", clock)
    monkeypatch.setattr("cascade.gate.decoding_check.time", clock)
    monkeypatch.setattr(plan, "SHARD_BYTES", 1 << 14)
    monkeypatch.setattr("cascade.report.common.axes._similarity_ticks", lambda low, high: [])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("CI", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    for name in _REPEATED:
        monkeypatch.setattr(name, _Repeated(name, pkgutil.resolve_name(name)))
    folder = here.parent / "watched"
    folder.mkdir()
    here.rename(folder / "here")
    monkeypatch.chdir(folder / "here")
    (folder / "cache").mkdir()
    monkeypatch.setenv("CASCADE_CACHE", str(folder / "cache"))
    return folder


def _stand_in(name: str, size: int) -> Callable[..., str]:
    return lambda record, *rest, **more: f"{name} {record.provenance.corpus}".ljust(size)


class _Repeated:
    """A function that gives again what it gave in the first run of the same command."""

    command: Words = ()

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function
        self.calls: Counter[Words] = Counter()
        self.found: dict[tuple[Words, int], Any] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        words = _Repeated.command
        # These write while they measure.
        if "--npz" in words or any(word.endswith(".gguf") for word in words):
            return self.function(*arguments, **named)
        key = (words, self.calls[words])
        self.calls[words] += 1
        if key not in self.found:
            self.found[key] = self.function(*arguments, **named)
        return self.found[key]


def command(words: Words, models: Path) -> Command:
    """Return a command that runs in this process and gives its exit status."""
    words = tuple(word.format(models=models) for word in words)
    if words[0] in _WITH_MODEL:
        words = (*words, "--model", str(models / "tiny"))

    def run() -> int:
        sys.argv = ["cascade", *words]
        _Repeated.command = words
        for name in _REPEATED:
            pkgutil.resolve_name(name).calls.clear()
        if words[0] == "pytest":
            return int(pytest.main([*PLUGIN, "-p", "no:cacheprovider", *words[1:]]))
        try:
            cli.main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0
        return 0

    return run


_WITH_MODEL = (
    *("analyze", "gate", "fit-heads", "calibrate", "evaluate", "search-exit", "explain"),
    *("compare-corpora", "bench", "collect-hard", "train", "train-drafter", "export-drafter"),
)


@dataclass
class Tried:
    """A command, its old and new result, and what its faults have left."""

    case: Case
    run: Command
    watched: Path
    models: Path
    operations: tuple[Operation, ...]
    template: Path
    old: Any
    new: Any
    old_files: dict[str, bytes | None]
    new_files: dict[str, bytes | None]
    counts: Counter[str] = field(default_factory=Counter)
    checked: dict[int, str] = field(default_factory=dict)

    def files(self) -> dict[str, bytes | None]:
        return _files(self.watched, self.case.files)

    def restore(self) -> None:
        _restore(self.template, self.watched)

    def fault(self, fault: Fault) -> None:
        """Run the command with a fault, and check all that has to hold afterwards."""
        self.restore()
        done = attempt(self.run, self.watched, fault)
        where = f"{fault} of {self.operations[fault.operation - 1]}: {done}"
        self._check_end(fault, done, where)
        state = contents([self.watched])
        known = hash(tuple(sorted((name, content or b"") for name, content in state.items())))
        if known not in self.checked:
            self.checked[known] = self._check_state(fault, where)
        self.counts["faults"] += 1
        self.counts[self.checked[known]] += 1
        ended = "killed" if done.status < 0 else "refused" if done.status == 2 else "unharmed"
        self.counts[ended] += 1

    def _check_end(self, fault: Fault, done: Attempt, where: str) -> None:
        if fault.kind in DEATHS and (fault.kind != "torn" or done.status < 0):
            assert done.status < 0, where
            return
        assert "Traceback" not in done.err, where
        if "pytest" in self.case.new:
            assert "INTERNALERROR" not in done.out, where
        elif done.status not in self.case.ends:  # those where the operation was not needed
            assert done.status == 2, where
            lines = [line for line in done.err.splitlines() if line.startswith("cascade: ")]
            assert len(lines) == 1, where
            assert len(lines[0]) > 40, where
            assert "cannot print" not in lines[0], where  # it was a file, and not stdout
        if not self.operations[fault.operation - 1].removes:
            assert _leftovers(self.watched, but=_KEPT) == [], where

    def _check_state(self, fault: Fault, where: str) -> str:
        found = self.case.read(self.models)
        assert found in (self.old, self.new), f"read {found}; {where}"
        files = self.files()
        expected = self.new_files if found == self.new else self.old_files
        differing = [
            name
            for name in {*expected, *files}
            if expected.get(name, 0) != files.get(name, 0) and name not in self.unstable
        ]
        assert differing == [], where
        again = attempt(self.run, self.watched)
        if again.status not in self.case.ends:
            # Without --overwrite, a command that got to its end is refused the second time.
            assert found == self.new, f"again: {again}; {where}"
            assert "--overwrite" not in self.case.new, f"again: {again}; {where}"
            assert "replace it with --overwrite" in again.err, f"again: {again}; {where}"
        assert self.case.read(self.models) == self.new, where
        assert self.files().keys() == self.new_files.keys(), where
        # What could not be removed goes when the next command writes there, if this one need not.
        if not (self.operations[fault.operation - 1].removes and found == self.new):
            assert _leftovers(self.watched) == [], where
        return "new" if found == self.new else "old"

    unstable: frozenset[str] = frozenset()


def _files(watched: Path, pattern: str) -> dict[str, bytes | None]:
    found = contents([watched / "here"])
    return {
        name: content
        for name, content in found.items()
        if re.fullmatch(pattern, name) and not _is_hidden(name)
    }


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def _leftovers(watched: Path, but: Sequence[str] = ()) -> list[str]:
    """Return hidden files and folders, which no finished command leaves."""
    found = contents([watched / "here", watched / "cache"])
    return sorted(
        name for name in found if any(p[0] == "." and p not in but for p in Path(name).parts)
    )


def _restore(template: Path, watched: Path) -> None:
    for folder in (watched / "here", watched / "cache"):
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.copytree(template / folder.name, folder, dirs_exist_ok=True, symlinks=True)


def prepared(case: Case, watched: Path, models: Path) -> Tried:
    """Make the old result of a command, and the new one twice."""
    here = watched / "here"
    case.prepare(here, models)
    for words in case.old:
        status = _warm(words, watched, models)
        assert status in (*case.ends, 0, 1), (words, status)
    if case.interrupted is not None:
        _interrupt(case, watched, models)
    case.between(here)
    template = watched.parent / "template"
    shutil.copytree(watched, template, symlinks=True)
    old, old_files = case.read(models), _files(watched, case.files)
    run = command(case.new, models)
    assert _warm(case.new, watched, models) in case.ends
    _restore(template, watched)
    assert attempt(run, watched).status in case.ends
    first = _files(watched, case.files)
    _restore(template, watched)
    whole = attempt(run, watched)
    assert whole.status in case.ends, whole
    new, new_files = case.read(models), _files(watched, case.files)
    assert old != new
    assert _leftovers(watched) == []
    tried = Tried(
        *(case, run, watched, models, whole.operations, template, old, new, old_files, new_files)
    )
    tried.unstable = frozenset(name for name in new_files if first.get(name) != new_files[name])
    return tried


def _warm(words: Words, watched: Path, models: Path) -> int:
    """Run a command in this process, which then has imported and measured what it needs."""
    run = command(words, models)
    # Test modules are imported once per process.
    return attempt(run, watched).status if words[0] == "pytest" else run()


def _interrupt(case: Case, watched: Path, models: Path) -> None:
    assert case.interrupted is not None
    event, pattern = case.interrupted
    here = watched / "here"
    for entry in here.iterdir():
        if entry.name != "texts.jsonl":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    run = command(case.old[-1], models)
    copy = watched.parent / "copy"
    shutil.copytree(watched, copy, symlinks=True)
    operations = attempt(run, watched).operations
    number = next(
        number
        for number, one in enumerate(operations, start=2)
        if one.event == event and pattern in one.path
    )
    _restore(copy, watched)
    assert attempt(run, watched, Fault(number, "kill")).status < 0


def _chosen(tried: Tried) -> list[Fault]:
    """Return the deaths around every switch, two faults of a write, and some with a fixed seed."""
    operations = list(enumerate(tried.operations, start=1))
    switches = [
        number
        for number, one in operations
        if one.event == "os.rename" and (one.path.endswith(COMMITTED) or number == _last(tried))
    ]
    near = sorted({n + d for n in switches for d in (0, 1, 2)} & {n for n, _ in operations})
    chosen = [Fault(number, ("kill", "power cut")[place % 2]) for place, number in enumerate(near)]
    writes = [number for number, one in operations if one.event == "open" and one.writes]
    if writes:
        middle = writes[len(writes) // 2]
        chosen += [Fault(middle, "torn"), Fault(middle, "full")]
    every = [Fault(number, kind) for number, one in operations for kind in kinds_of(one)]
    rest = [fault for fault in every if fault not in chosen]
    return chosen + random.Random(0).sample(rest, min(_TRIED, len(rest)))


def _last(tried: Tried) -> int:
    renames = [n for n, one in enumerate(tried.operations, start=1) if one.event == "os.rename"]
    return renames[-1] if renames else len(tried.operations)


#: Those of pytest write by the same functions as `accept` and `gate`, and each child loads pytest.
#: What `train` writes is written by the continued training as well.
BY_DEFAULT = [name for name in CASES if not name.startswith("pytest ") and name != "train"]


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_a_fault_at_a_file_operation_leaves_the_old_result_or_the_new(
    name: str, watched: Path, models: Path
) -> None:
    tried = prepared(CASES[name], watched, models)
    for fault in _chosen(tried):
        tried.fault(fault)


# --- All of them ----------------------------------------------------------------------------------

COUNTS = Path(__file__).with_suffix("") / "counts.json"


def stored_counts() -> dict[str, dict[str, int]]:
    return dict(json.loads(COUNTS.read_text())) if COUNTS.exists() else {}


def _is_tried(name: str, operation: Operation) -> bool:
    """Return whether all faults of an operation are tried, which pytest itself may do as well."""
    if name == "pytest --cascade-report report":
        # Where a baseline cannot be read, the report says so: it is neither the old nor the new.
        return operation.path.startswith("here/report")
    # pytest reads its settings before the plugin runs.
    return not name.startswith("pytest ") or operation.path not in ("here", "here/pytest.ini")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_fault_at_every_file_operation_leaves_the_old_result_or_the_new(
    name: str, watched: Path, models: Path, request: pytest.FixtureRequest
) -> None:
    tried = prepared(CASES[name], watched, models)
    wrong = []
    for number, operation in enumerate(tried.operations, start=1):
        if not _is_tried(name, operation):
            continue
        for kind in kinds_of(operation):
            try:
                tried.fault(Fault(number, kind))
            except AssertionError as error:
                wrong.append(str(error))
    assert wrong == [], "\n\n".join(wrong)
    counts = {
        "operations": len(tried.operations),
        "faults": tried.counts["faults"],
        **{name: tried.counts[name] for name in ("killed", "refused", "unharmed", "old", "new")},
        "states": len(tried.checked),
    }
    if request.config.getoption("force_regen"):
        stored = stored_counts() | {name: counts}
        COUNTS.parent.mkdir(exist_ok=True)
        rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(stored[key])}" for key in stored)
        COUNTS.write_text(f"{{\n{rows}\n}}\n")
    assert counts == stored_counts()[name]


def table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return the counts as the table of docs/reliability.md."""
    columns = ("operations", "faults", "killed", "refused", "unharmed", "old", "new", "states")
    names = [name for name in CASES if name in counts]
    total = {column: sum(counts[name][column] for name in names) for column in columns}
    titles = ("operations", "faults", "killed", "refused", "not needed", "old result", "new result")
    titles = ("command", *titles, "sets of files")
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    for title, row in [*((f"`{name}`", counts[name]) for name in names), ("all", total)]:
        figures = [f"{row[column]:,}" for column in columns]
        lines.append(f"| {title} | {' | '.join(figures)} |")
    return "\n".join(lines)


def test_the_page_on_reliability_has_the_counts_of_the_last_full_run() -> None:
    counts = stored_counts()
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    assert set(counts) <= set(CASES)
    assert table(counts) in page, f"put this into docs/reliability.md:\n{table(counts)}"
    assert all(row["old"] + row["new"] == row["faults"] for row in counts.values())

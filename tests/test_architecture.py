"""The house: imports point one way, and what should be cheap to import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cascade

PACKAGE = Path(cascade.__file__).parent

#: Each room and the rooms that it may import from.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "statistics": set(),
    "structure": set(),
    "similarity": set(),
    "shapes": set(),
    "files": {"errors"},
    "weights": {"errors", "files"},
    "models": {"errors", "lean", "weights"},
    "corpora": {"errors"},
    "baselines": {"errors", "files", "statistics"},
    "attribution": set(),
    "resampling": set(),
    "drift": {"attribution", "baselines", "errors", "resampling", "statistics"},
    "noise": {"models", "saturation"},
    "session": set(),
    "gate": {
        "baselines",
        "corpora",
        "drift",
        "errors",
        "models",
        "noise",
        "saturation",
        "weights",
    },
    "archive": {"errors", "files"},
    "saturation": {"corpora", "errors", "models", "similarity", "statistics", "structure"},
    "exits": {"errors", "similarity"},
    "ridge": set(),
    "lean": set(),
    "skipping": {"errors", "lean", "models"},
    "parts": {"errors", "models", "similarity"},
    "token_classes": set(),
    "residual_stream": {"parts", "similarity"},
    "causes": {"models", "parts", "residual_stream", "similarity"},
    "ablations": {"causes", "models", "parts", "passes"},
    "explanation": {
        "ablations",
        "causes",
        "corpora",
        "errors",
        "models",
        "parts",
        "points",
        "resampling",
        "residual_stream",
        "saturation",
        "structure",
        "token_classes",
    },
    "final_norm": {
        "corpora",
        "errors",
        "models",
        "resampling",
        "saturation",
        "similarity",
    },
    "heads": {"corpora", "errors", "exits", "files", "models", "ridge", "saturation", "shapes"},
    "passes": {"errors", "exits", "heads", "models", "skipping"},
    "generation": {"errors", "exits", "models", "passes", "skipping"},
    "early_exit": {"errors", "exits", "generation", "heads", "models", "passes", "skipping"},
    "verdict": {"errors"},
    "thresholds": {"errors"},
    "exit_curves": {"resampling"},
    "costs": {"skipping"},
    "configurations": {"costs", "errors", "models", "weights"},
    "copies": {"errors", "models"},
    "model_comparison": {
        "configurations",
        "copies",
        "corpora",
        "errors",
        "models",
        "saturation",
        "weights",
    },
    "points": {
        "corpora",
        "costs",
        "early_exit",
        "errors",
        "exits",
        "heads",
        "models",
        "passes",
        "resampling",
        "saturation",
        "skipping",
    },
    "calibration": {
        "baselines",
        "corpora",
        "early_exit",
        "errors",
        "exits",
        "heads",
        "models",
        "passes",
        "points",
        "saturation",
        "shapes",
        "skipping",
        "thresholds",
    },
    "evaluation": {
        "corpora",
        "costs",
        "early_exit",
        "errors",
        "exit_curves",
        "exits",
        "heads",
        "models",
        "points",
        "saturation",
        "thresholds",
        "verdict",
    },
    "corpus_comparison": {
        "corpora",
        "errors",
        "models",
        "resampling",
        "saturation",
        "structure",
        "thresholds",
    },
    "exit_choice": {"errors", "thresholds"},
    "exit_records": {
        "baselines",
        "errors",
        "exit_choice",
        "exit_curves",
        "shapes",
        "verdict",
    },
    "exit_search": {
        "corpora",
        "early_exit",
        "errors",
        "evaluation",
        "exit_choice",
        "exit_curves",
        "exit_records",
        "exits",
        "heads",
        "models",
        "points",
        "saturation",
        "verdict",
    },
    "distillation": {"corpora", "errors", "exits", "heads", "models", "ridge", "saturation"},
    "budgets": {"baselines", "errors", "files", "shapes"},
    "shards": {"files"},
    "hard_dataset": {
        "baselines",
        "corpora",
        "errors",
        "exits",
        "heads",
        "models",
        "shapes",
        "shards",
    },
    "hard_tokens": {
        "baselines",
        "corpora",
        "errors",
        "exits",
        "files",
        "hard_dataset",
        "models",
        "saturation",
        "shards",
        "thresholds",
    },
    "stages": {"errors", "models", "parts"},
    "cascades": {
        "baselines",
        "early_exit",
        "errors",
        "exits",
        "files",
        "generation",
        "heads",
        "models",
        "passes",
        "shapes",
        "skipping",
        "stages",
        "weights",
    },
    "training": {
        "errors",
        "exits",
        "files",
        "hard_dataset",
        "models",
        "passes",
        "saturation",
        "stages",
    },
    "cascade_evaluation": {
        "cascades",
        "corpora",
        "costs",
        "early_exit",
        "errors",
        "exits",
        "saturation",
        "skipping",
    },
    "renewal": {
        "baselines",
        "budgets",
        "corpora",
        "drift",
        "files",
        "gate",
        "models",
        "noise",
        "saturation",
    },
    "rerun": {
        "baselines",
        "corpora",
        "errors",
        "evaluation",
        "exits",
        "heads",
        "models",
        "points",
        "saturation",
        "shapes",
    },
    "suite": set(),
    "suite.test_budgets": set(),
    "suite.test_saturation": set(),
    "cascade": {
        "baselines",
        "calibration",
        "corpora",
        "corpus_comparison",
        "distillation",
        "drift",
        "early_exit",
        "errors",
        "evaluation",
        "explanation",
        "final_norm",
        "exit_search",
        "gate",
        "hard_dataset",
        "hard_tokens",
        "heads",
        "models",
        "saturation",
        "statistics",
        "cascade_evaluation",
        "cascades",
        "copies",
        "model_comparison",
        "training",
    },
    "report.reading": set(),
    "report.terminal": {"report.reading"},
    "report.drawing": {"report.reading"},
    "report.figures": {"report.drawing", "report.reading"},
    "report.document": {"report.drawing"},
    "report.page": {"report.document", "report.figures", "report.reading"},
    "report.sections": {"report.document", "report.terminal"},
    "report.explanation_figures": {"report.drawing", "report.figures", "report.reading"},
    "report.explanation": {"report.explanation_figures", "report.reading", "report.sections"},
    "report.final_norm": {"report.drawing", "report.reading", "report.sections"},
    "report.findings": {
        "report.corpora",
        "report.exit_search",
        "report.explanation",
        "report.final_norm",
        "report.models",
        "report.reading",
        "report.sections",
    },
    "report.benchmarks": {"report.reading", "report.terminal"},
    "report.exits": {"report.reading"},
    "report.calibration": {"report.exits", "report.reading", "report.terminal"},
    "report.pareto": {"report.drawing", "report.reading", "verdict"},
    "report.evaluation": {
        "report.document",
        "report.exits",
        "report.pareto",
        "report.reading",
        "report.terminal",
        "verdict",
    },
    "report.exit_search": {
        "report.drawing",
        "report.exits",
        "report.pareto",
        "report.reading",
        "report.sections",
    },
    "report.drift_reading": {"report.reading", "session"},
    "report.drift": {"report.drift_reading", "report.reading", "report.terminal"},
    "report.drift_markdown": {"report.drift_reading", "report.reading"},
    "report.drift_figures": {
        "report.drawing",
        "report.drift_reading",
        "report.figures",
        "report.reading",
    },
    "report.drift_page": {
        "report.document",
        "report.drift_figures",
        "report.drift_reading",
        "report.reading",
    },
    "report.corpora_figures": {"report.drawing", "report.figures", "report.reading"},
    "report.corpora": {
        "report.corpora_figures",
        "report.exits",
        "report.reading",
        "report.sections",
    },
    "report.model_figures": {"report.drawing", "report.figures", "report.reading"},
    "report.models": {"report.model_figures", "report.reading", "report.sections"},
    "report.cascades": {"report.exits", "report.reading", "report.terminal"},
    "report.hard_tokens": {"report.exits", "report.reading", "report.terminal"},
    "report.generation": {"report.exits", "report.reading", "report.terminal"},
    "report": {
        "report.benchmarks",
        "report.calibration",
        "report.drift",
        "report.drift_markdown",
        "report.drift_page",
        "report.evaluation",
        "report.figures",
        "report.generation",
        "report.cascades",
        "report.hard_tokens",
        "report.page",
        "report.pareto",
        "report.terminal",
    },
    "benchmarks.timing": {"errors"},
    "benchmarks.memory": {"benchmarks.timing"},
    "benchmarks.collect": {
        "benchmarks.memory",
        "benchmarks.timing",
        "corpora",
        "exits",
        "models",
        "saturation",
    },
    "benchmarks.decode": {
        "benchmarks.timing",
        "calibration",
        "corpora",
        "costs",
        "early_exit",
        "errors",
        "exits",
        "generation",
        "heads",
        "models",
        "saturation",
        "thresholds",
    },
    "benchmarks.fit": {
        "benchmarks.collect",
        "benchmarks.timing",
        "corpora",
        "heads",
        "models",
        "saturation",
    },
    "benchmarks.hard_tokens": {
        "benchmarks.timing",
        "corpora",
        "hard_tokens",
        "models",
        "saturation",
    },
    "benchmarks.gate": {
        "baselines",
        "benchmarks.collect",
        "benchmarks.timing",
        "corpora",
        "drift",
        "gate",
        "models",
        "noise",
        "saturation",
    },
    "benchmarks": {
        "benchmarks.collect",
        "benchmarks.decode",
        "benchmarks.fit",
        "benchmarks.gate",
        "benchmarks.hard_tokens",
        "benchmarks.timing",
    },
    "benchmarks.__main__": {"benchmarks.collect"},
    "__main__": {"cli"},
}
#: The rooms on top, which may import everything and which nobody imports.
_BELOW = {
    room
    for room in MAY_IMPORT.keys() - {"__main__", "benchmarks.__main__"}
    if not room.startswith("suite")
}
MAY_IMPORT["plugin.settings"] = set()
MAY_IMPORT["plugin.findings"] = _BELOW | {"plugin.settings"}
MAY_IMPORT["plugin.measuring"] = _BELOW | {"plugin.settings"}
MAY_IMPORT["plugin.checks"] = _BELOW | {"plugin.findings", "plugin.measuring", "plugin.settings"}
MAY_IMPORT["plugin.budget_check"] = MAY_IMPORT["plugin.checks"] | {"plugin.checks"}
MAY_IMPORT["plugin"] = MAY_IMPORT["plugin.budget_check"] | {"plugin.budget_check"}
MAY_IMPORT["cli.app"] = {"errors"}
MAY_IMPORT["cli.showing"] = {"errors", "models"}
MAY_IMPORT["cli.options"] = {"cli.showing"}
MAY_IMPORT["cli.reports"] = {"baselines", "files", "report.sections"}
_COMMANDS = (
    "bench",
    "corpora",
    "exits",
    "explain",
    "findings",
    "gate",
    "measure",
    "models",
    "search",
    "stages",
)
for _command in (f"cli.{name}" for name in _COMMANDS):
    MAY_IMPORT[_command] = _BELOW | {"cli.app", "cli.options", "cli.reports", "cli.showing"}
MAY_IMPORT["cli.exits"] = MAY_IMPORT["cli.exits"] | {"cli.stages"}
MAY_IMPORT["cli.search"] = MAY_IMPORT["cli.search"] | {"cli.exits"}
MAY_IMPORT["cli"] = {"cli.app", *(f"cli.{name}" for name in _COMMANDS)}


def rooms_imported_by(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            top, _, room = node.module.partition(".")
            if top == "cascade":
                found |= {room} if room else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                name.name.partition(".")[2] for name in node.names if name.name[:8] == "cascade."
            }
    return found - {"__version__"}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__").removeprefix("cascade.")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=room_of)
def test_a_room_imports_only_what_lies_below_it(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"give {room} a place in the house"
    assert rooms_imported_by(path) <= MAY_IMPORT[room]


def test_the_allowed_imports_have_no_circle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        free = {room for room, below in MAY_IMPORT.items() if below <= done} - done
        assert free, f"a circle among {sorted(MAY_IMPORT.keys() - done)}"
        done |= free


@pytest.mark.parametrize("module", ["cascade", "cascade.cli", "cascade.plugin"])
def test_importing_the_surface_loads_no_heavy_library(module: str) -> None:
    heavy = {"torch", "transformers", "datasets", "numpy", "matplotlib"}
    code = f"import sys, {module}; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_had() -> None:
    for name in cascade.__all__:
        assert getattr(cascade, name) is not None
    assert set(dir(cascade)) == set(cascade.__all__)
    with pytest.raises(AttributeError, match="no attribute 'analyse'"):
        cascade.__getattr__("analyse")

"""Commands run in place on a tiny model and the corpus at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import DRAWN, Done, Run

from cascade import TokenBlocks, fit_heads, load


@pytest.fixture
def draw(run: Run, models: Path) -> Run:
    """Analyze with the tiny model and the corpus at hand; later options replace these."""

    def draw(*arguments: object) -> Done:
        common = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--seq-len", 32)
        return run("analyze", *common, *arguments)

    return draw


@pytest.fixture
def analyze(draw: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Analyze like `draw`, with stand-ins for the drawings: they take 2 s, all the rest 0.2 s."""

    def stand_in(size: int) -> Callable[..., str]:
        return lambda record, *arrays, **pictures: f"{record.provenance.corpus}".ljust(size)

    for name, size in DRAWN.items():
        monkeypatch.setattr(f"cascade.report.saturation.{name}", stand_in(size))
    return draw


COMMON = ("--corpus", "texts.jsonl", "--seq-len", 16)


@pytest.fixture
def tiny(run: Run, models: Path) -> Callable[..., Any]:
    """Run a command with the tiny model on the corpus at hand."""

    def tiny(command: str, *arguments: object) -> Any:
        corpus = () if command == "generate" else COMMON
        return run(command, "--model", models / "tiny", *corpus, *arguments)

    return tiny


@pytest.fixture(scope="session")
def fitted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of the tiny model's layers 2 and 3."""
    stack = load(str(models / "tiny"))
    ids = np.random.default_rng(0).integers(2, 97, (40, 16)).astype(np.int32)
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    fit_heads(stack, TokenBlocks(ids, "random", "random", 40), [2, 3]).save(path)
    return path

"""Fixtures of the plugin's tests: a user's project, with and without baselines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from support.commands import TEXTS
from support.plugin_project import BASELINE, BUDGETS, INI, SATURATION, STORED

from cascade.corpora.blocks import load_blocks
from cascade.gate.accepting import store_profile
from cascade.gate.baselines import read_profile
from cascade.gate.drift import compare
from cascade.gate.records import NamedComparison, session_record
from cascade.gate.remeasuring import (
    evaluate_points,
    first_points,
    measure_whole,
    replace_budgets,
)
from cascade.models.loading import load
from cascade.report.gate.page import report_page


@pytest.fixture
def project(
    made: Path, pytester: pytest.Pytester, models: Path, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    """A user's project: an ini file, a corpus, two tests, no baselines yet."""
    # `made` comes first: an inner session drops every module that it was the first to import, and
    # the next one would import it again.
    assert made.is_dir()
    for name in ("CI", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CASCADE_CACHE", str(models / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    pytester.path.joinpath("pytest.ini").write_text(INI.format(model=models / "tiny"))
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    pytester.path.joinpath("texts.jsonl").write_text("".join(lines))
    # These names differ from this repository's test modules, which may already be imported.
    pytester.makepyfile(test_my_saturation=SATURATION, test_my_budgets=BUDGETS)
    return pytester


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """Baselines of the tiny model, as created by `--force-regen`."""
    folder = tmp_path_factory.mktemp("made")
    corpus = folder / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stack = load(str(models / "tiny"))
        blocks = load_blocks(str(corpus), stack.tokenizer, seq_len=16)
        store_profile(folder / "baselines", measure_whole(stack, blocks))
        record = evaluate_points(stack, first_points(stack, blocks, 3), blocks)
        stored = read_profile(folder / BASELINE)
        comparison = NamedComparison.of(compare(stored, stored).record(), name="tiny", path="tiny")
        report_page(session_record([comparison]))
    finally:
        torch.set_num_threads(threads)
    # A generous time budget, because these tests are not about time.
    timed = {"seconds_ratio": 50.0, "seconds_ratio_interval": None}
    rows = [replace(row, **timed) for row in record.points]
    replace_budgets(folder / STORED, [replace(record, points=rows)])
    return folder / "baselines"


@pytest.fixture
def guarded(project: pytest.Pytester, made: Path) -> pytest.Pytester:
    """The same project with stored baselines."""
    shutil.copytree(made, project.path / "baselines")
    return project

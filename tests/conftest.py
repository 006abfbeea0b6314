"""Shared fixtures: a tiny checkpoint to break, and running commands in this process."""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.commands import TEXTS, Done, Run
from support.tiny_models import save_checkpoint, save_gguf

from cascade import cli

try:
    from hypothesis import settings
except ModuleNotFoundError:
    # In a checkout, pytest imports this file for `--pyargs cascade.suite` too. That suite needs
    # none of the packages of these tests.
    pass
else:
    # Deadlines would fail on a busy machine; benchmarks measure time, tests do not.
    settings.register_profile("without_deadline", parent=settings.default, deadline=None)
    settings.load_profile("without_deadline")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("saved") / "Tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a checkpoint folder to break."""
    return shutil.copytree(saved, tmp_path / "Broken")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with models: tiny (64 positions), other (other weights) and tiny.gguf."""
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(folder / "tiny")
    save_checkpoint(folder / "other", seed=1)
    save_gguf(folder / "tiny.gguf")
    return folder


#: Markers of suites on the real model, which profit from several threads.
_REAL = ("saturation", "budgets", "cascade", "published", "slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take minutes, so that two workers end at the same time."""
    real = {item.path for item in items if any(map(item.get_closest_marker, _REAL))}
    items.sort(key=lambda item: item.path not in real)


def pytest_collection_finish() -> None:
    """Exempt imported modules from garbage collection, because some libraries collect often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compute on one thread, because tiny models run slower on two."""
    before = torch.get_num_threads()
    if not any(request.node.get_closest_marker(name) for name in _REAL):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder with a corpus, a separate cache and no network."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(models / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", models / "datasets")
    monkeypatch.setenv("CASCADE_CACHE", str(models / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "texts.jsonl").write_text("".join(lines))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command in this process."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["cascade", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        status = caught.value.code or 0
        assert isinstance(status, int)
        done = Done(status, *capfd.readouterr())
        for path in re.findall(r"^Wrote ([^\s,;]+)", done.err, re.MULTILINE):
            assert Path(path).exists(), path
        return done

    return run

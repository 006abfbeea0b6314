"""`cascade env` and `cascade cache`: what they print, and what is cleared."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from support.commands import Run, check_refusal, python


@pytest.fixture
def cache(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    for name, text in (("weights/abc/config.json", "12"), ("noise/1.json", "1")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    monkeypatch.setenv("CASCADE_CACHE", str(folder))
    return folder


def test_env_prints_what_a_bug_report_needs(run: Run, cache: Path) -> None:
    done = run("env")
    assert (done.status, done.err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert rows["torch"] == torch.__version__
    assert rows["threads"] == str(torch.get_num_threads())
    assert rows["cache"] == str(cache)
    assert {"python", "transformers", "platform", "processor", "blas"} <= set(rows)


def test_env_json_is_parseable_and_loads_torch_alone() -> None:
    code = """
import sys
from cascade import cli
sys.argv = ["cascade", "env", "--json"]
try:
    cli.main()
except SystemExit:
    pass
heavy = {"transformers", "datasets", "matplotlib", "huggingface_hub"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = python("-c", code, HF_HUB_CACHE="/models/hub")
    assert done.err == "[]\n"
    found = json.loads(done.out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["model_cache"] == "/models/hub"


def test_cache_lists_names_and_sizes(run: Run, cache: Path) -> None:
    done = run("cache")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[0] == f"{cache}: 0.0 MB in 2 entries"
    assert "weights/abc" in done.out
    found = json.loads(run("cache", "--json").out)
    assert found["bytes"] == 3
    assert [entry["name"] for entry in found["entries"]] == ["weights/abc", "noise/1.json"]


def test_cache_clear_deletes_named_entries(run: Run, cache: Path) -> None:
    done = run("cache", "clear", "noise", "--yes")
    assert (done.status, done.out, done.err) == (0, "", "Deleted 1 entries (0.0 MB)\n")
    assert [path.name for path in cache.rglob("*.json")] == ["config.json"]
    assert run("cache", "clear", "--yes", "--quiet").err == ""
    assert list(cache.rglob("*.json")) == []


def test_cache_clear_without_yes_and_terminal_deletes_nothing(
    run: Run, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    check_refusal(run("cache", "clear"), ["expected --yes"])
    assert len(list(cache.rglob("*.json"))) == 2


def test_cache_clear_rejects_an_unknown_name(run: Run, cache: Path) -> None:
    check_refusal(run("cache", "clear", "models", "--yes"), ["weights/abc", "got 'models'"])

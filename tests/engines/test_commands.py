"""`--engine ray` of commands: the files are those of one process, and a stopped run continues."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from support.commands import Run, check_refusal

from cascade.cli.commands.analyze import RUN_FILES
from cascade.engines import running
from cascade.engines.cluster import Cluster

COMMON = ("--corpus", "texts.jsonl", "--seq-len", 16, "--batch-size", 2)
RAY = ("--engine", "ray", "--workers", 2)


@pytest.fixture
def tiny(run: Run, models: Path, environment: Path) -> Run:
    def tiny(command: str, *arguments: object) -> Any:
        return run(command, "--model", models / "tiny", *COMMON, *arguments)

    return tiny


def profile_of(folder: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((Path(folder) / "profile.json").read_text())
    record["provenance"].pop("engine", None)
    del record["provenance"]["command"]
    del record["hash"]
    return record


def arrays_of(folder: str) -> dict[str, Any]:
    with np.load(Path(folder) / "profile.npz") as arrays:
        return {name: arrays[name].tobytes() for name in arrays.files}


def tensors_of(path: str) -> dict[str, bytes]:
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C arrive when so many shards are done."""
    check, seen = running._check, []

    def stopping(*arguments: Any) -> None:
        check(*arguments)
        seen.append(1)
        if len(seen) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(running, "_check", stopping)


def test_analyze_on_ray_writes_the_files_of_one_process(
    two_workers: Cluster, tiny: Run, here: Path
) -> None:
    assert tiny("analyze", "--output", "alone").status == 0
    done = tiny("analyze", "--output", "together", *RAY, "--shards", 7)
    assert done.status == 0, done.err
    assert re.search(r"^7 shards, [\d,]+ tokens in ", done.err, re.MULTILINE)
    assert sorted(path.name for path in (here / "together").iterdir()) == sorted(RUN_FILES)
    assert profile_of("together") == profile_of("alone")
    assert arrays_of("together") == arrays_of("alone")
    engine = json.loads((here / "together/profile.json").read_text())["provenance"]["engine"]
    assert engine["engines"] == [two_workers.engine]
    assert engine["shards"] == 7


def test_a_stopped_analysis_continues_with_the_same_command(
    two_workers: Cluster, tiny: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("analyze", "--output", "together", *RAY, "--shards", 7)
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        done = tiny(*arguments)
    assert done.status == 130
    found = re.search(r"Stopped; (\d) of 7 shards are kept in together: run the same", done.err)
    assert found
    kept = len(list((here / "together/.cascade-measuring/plan/shards").glob("0*")))
    assert int(found[1]) <= kept < 7
    assert not (here / "together/profile.json").exists()
    other = tiny(*arguments, "--max-tokens", 512)
    check_refusal(other, ["holds unfinished work with other arguments (max_tokens: None, now 512)"])
    done = tiny(*arguments)
    assert done.status == 0, done.err
    assert f"Continuing: {kept} of 7 shards are done already" in done.err
    assert tiny("analyze", "--output", "alone").status == 0
    assert profile_of("together") == profile_of("alone")
    assert sorted(path.name for path in (here / "together").iterdir()) == sorted(RUN_FILES)


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_heads_fitted_on_ray_are_those_of_one_process(
    shards: int, two_workers: Cluster, tiny: Run, here: Path
) -> None:
    options = ("fit-heads", "--layers", "2,3")
    assert tiny(*options, "--output", "alone.safetensors").status == 0
    done = tiny(*options, "--output", "together.safetensors", *RAY, "--shards", shards)
    assert done.status == 0, done.err
    assert tensors_of("together.safetensors") == tensors_of("alone.safetensors")
    assert not list(here.glob(".*fitting"))


def test_stopped_fitting_continues_with_the_same_command(
    two_workers: Cluster, tiny: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("fit-heads", "--layers", "2,3", "--output")
    assert tiny(*options, "alone.safetensors").status == 0
    arguments = (*options, "together.safetensors", *RAY, "--shards", 5)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert tiny(*arguments).status == 130
    sums = here / ".together.safetensors.cascade-fitting/sums"
    kept = {path: path.stat().st_mtime_ns for path in sums.glob("0*.npz")}
    assert 2 <= len(kept) < 5
    done = tiny(*arguments)
    assert f"Continuing: {len(kept)} of 5 shards" in done.err
    assert tensors_of("together.safetensors") == tensors_of("alone.safetensors")


def test_edited_sums_are_refused_by_name(
    two_workers: Cluster, tiny: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("fit-heads", "--layers", "2", "--output", "h.safetensors", *RAY, "--shards", 5)
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        tiny(*arguments)
    file = sorted((here / ".h.safetensors.cascade-fitting/sums").glob("0*.npz"))[0]
    with np.load(file) as stored:
        arrays = dict(stored)
    arrays["2.train.xx.fine"] = arrays["2.train.xx.fine"] + 1
    np.savez(file, **arrays)
    check_refusal(
        tiny(*arguments, "--quiet"), [str(file.name), "its hash does not match its contents"]
    )


def test_hard_tokens_collected_on_ray_are_those_of_one_process(
    two_workers: Cluster, tiny: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade.stages.hard_tokens.plan.SHARD_BYTES", 9e3)
    options = ("collect-hard", "--hard-ratio", "0.5", "--output")
    assert tiny(*options, "alone").status == 0
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        done = tiny(*options, "together", *RAY)
    assert done.status == 130
    assert "together is kept: run the same command again to resume" in done.err
    done = tiny(*options, "together", *RAY)
    assert done.status == 0, done.err
    assert "shards are done already" in done.err
    records = [
        json.loads((here / f / "hard-tokens.json").read_text()) for f in ("alone", "together")
    ]
    assert len(records[0]["files"]) > 8
    assert records[0]["files"] == records[1]["files"]
    assert sorted(path.name for path in (here / "together").iterdir()) == sorted(
        path.name for path in (here / "alone").iterdir()
    )

"""A step that any scheduler calls with a rank measures each shard once, with the same bytes."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.shard_runs import measured_here, merged_files, planned, random_text, saved_model
from support.stacks import one_line
from support.tiny_models import tiny_model

from cascade.core.errors import ModelError
from cascade.engines.steps import MeasureShards
from cascade.models.source import ModelSource
from cascade.shards.merging import missing_shards
from cascade.shards.planning import plan

#: A pipeline of datatrove, as docs/how-to/scale.md shows it, in a process of its own: datatrove
#: changes logging, and starts its tasks with forkserver.
PIPELINE = """
import sys
import warnings

warnings.simplefilter("ignore")
from datatrove.executor import LocalPipelineExecutor

from cascade.engines.steps import MeasureShards
from cascade.models.source import ModelSource

if __name__ == "__main__":
    LocalPipelineExecutor(
        pipeline=[MeasureShards(sys.argv[1], engine="datatrove")],
        tasks=int(sys.argv[3]),
        workers=2,
        logging_dir=sys.argv[2],
    ).run()
"""


@pytest.mark.parametrize("ranks", [1, 3, 9])
def test_ranks_divide_the_shards(ranks: int, tmp_path: Path) -> None:
    stack = saved_model(tmp_path)
    expected = merged_files(
        measured_here(planned(stack, tmp_path / "here", 1), stack), tmp_path / "expected"
    )
    made, seen = planned(stack, tmp_path / "plan", 7), 0
    step = MeasureShards(made.folder)
    for rank in reversed(range(ranks)):
        before = len(missing_shards(made))
        step(rank=rank, world_size=ranks)
        mine = before - len(missing_shards(made))
        assert mine == len(range(rank, 7, ranks))
        seen += mine
    assert seen == 7
    assert merged_files(made, tmp_path / "run") == expected


def test_complete_shards_need_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = saved_model(tmp_path)
    made = measured_here(planned(stack, tmp_path / "plan", 3), stack)
    monkeypatch.setattr(ModelSource, "load", lambda _: pytest.fail("loads a model"))
    MeasureShards(made.folder)(rank=0, world_size=1)


def test_a_model_in_memory_cannot_be_loaded_by_workers(tmp_path: Path) -> None:
    made = plan(
        tiny_model("llama"),
        random_text(),
        tmp_path / "plan",
        shards=2,
        batch_size=2,
        long_context=0,
    )
    with pytest.raises(ModelError) as error:
        MeasureShards(made.folder)()
    assert one_line(error).endswith(
        "was in memory, so no other process can load it; save it first, or pass it as model="
    )


def test_a_changed_checkpoint_is_refused(tmp_path: Path) -> None:
    stack = saved_model(tmp_path)
    made = planned(stack, tmp_path / "plan", 2)
    tiny_model("llama", seed=5).save_pretrained(str(stack.provenance.source))
    with pytest.raises(ModelError) as error:
        MeasureShards(made.folder)()
    assert "give every machine the same checkpoint" in one_line(error)
    assert len(missing_shards(made)) == 2


def test_datatrove_runs_the_step(tmp_path: Path, environment: Path) -> None:
    pytest.importorskip("datatrove", reason="datatrove is not installed")
    stack = saved_model(tmp_path)
    expected = merged_files(
        measured_here(planned(stack, tmp_path / "here", 1), stack), tmp_path / "expected"
    )
    made = planned(stack, tmp_path / "plan", 7)
    script = tmp_path / "pipeline.py"
    script.write_text(PIPELINE)
    done = subprocess.run(
        [sys.executable, script, made.folder, tmp_path / "logs", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert merged_files(made, tmp_path / "run") == expected
    record = json.loads((tmp_path / "run" / "profile.json").read_text())
    assert record["provenance"]["engine"]["engines"] == ["datatrove"]
    assert importlib.metadata.version("datatrove")

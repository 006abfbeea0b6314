"""The commands of stages, run as a user would, on a tiny checkpoint."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.commands import Run
from support.disk import contents

from cascade import load, load_hard_tokens


@pytest.fixture
def collect(run: Run, models: Path) -> Callable[..., Any]:
    """Run `cascade collect-hard` with the tiny model on the corpus at hand."""

    def collect(*arguments: object) -> Any:
        corpus = ("--corpus", "texts.jsonl", "--seq-len", 16)
        return run("collect-hard", "--model", models / "tiny", *corpus, *arguments)

    return collect


def test_a_dataset_is_collected_and_summarized(collect: Run, here: Path, models: Path) -> None:
    done = collect("--hard-ratio", 0.5, "--output", "hard")
    assert done.status == 0, done.err
    found = load_hard_tokens("hard")
    found.check(load(str(models / "tiny")), layer=3, threshold=found.threshold)
    train, held_out = (found.record.splits[split] for split in ("train", "held-out"))
    estimate, written = done.err.strip().splitlines()
    tokens = train.tokens + held_out.tokens
    assert f"Collecting {tokens:,} tokens into hard: about" in estimate
    assert written.endswith("read it with datasets.load_from_disk('hard')")
    assert "similarity at layer 3 (history[2] against history[3]) below" in done.out
    assert "fitted to a hard ratio of 0.5 on the training split" in " ".join(done.out.split())
    assert "output of layer 4, before the final norm" in done.out
    assert f"{train.hard_ratio:.1%}".replace("%", "") in done.out
    assert found.record.provenance.command.startswith("cascade collect-hard --model")
    assert len(datasets.load_from_disk("hard")["train"]) == train.sequences


def test_every_fifth_record_is_held_out(collect: Run, here: Path) -> None:
    assert collect("--hard-ratio", 0.5, "--output", "hard").status == 0
    for part, rest in (("train", {1, 2, 3, 4}), ("held-out", {0})):
        rows = datasets.load_from_disk("hard")[part]["records"]
        assert {number % 5 for row in rows for number in row} == rest


def test_max_tokens_limits_both_splits_together(collect: Run, here: Path) -> None:
    assert collect("--hard-ratio", 0.5, "--output", "hard", "--max-tokens", 800).status == 0
    parts = load_hard_tokens("hard").record.splits
    assert [parts[split].tokens for split in ("train", "held-out")] == [640, 160]


def test_options_select_what_is_collected(collect: Run, here: Path) -> None:
    options = ("--layer", 2, "--threshold", 0.8, "--hard-ratio", 0.01, "--states-dtype", "bfloat16")
    more = ("--batch-size", 8, "--dtype", "bfloat16", "--seed", 3, "--num-samples", 20)
    done = collect("--output", "hard", *options, *more)
    assert done.status == 0, done.err
    found = load_hard_tokens("hard")
    assert (found.layer, found.threshold) == (2, 0.8)
    assert found.record.states.dtype == "bfloat16"
    assert found.record.provenance.model.dtype == "bfloat16"
    corpora = found.record.provenance.corpora
    assert corpora["train"].records + corpora["held-out"].records == 20
    assert "--threshold 0.8 is used" in found.notes[0]
    for note in found.notes:
        assert f"Warning {note}" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected a threshold or a hard ratio, got neither"),
        (("--threshold", 3), "expected a threshold in this range, got 3"),
        (("--hard-ratio", 1), "expected a hard ratio between 0 and 1, got 1.0"),
        (("--hard-ratio", 0.5, "--layer", 9), "expected an exit layer in 1..4, got 9"),
        (("--hard-ratio", 0.5, "--states-dtype", "half"), "states in float16 or bfloat16, got"),
        (("--hard-ratio", 0.5, "--max-tokens", 20), "--max-tokens of at least one block of 16"),
        (("--hard-ratio", 0.5, "--seq-len", 65), "exceed the model's 64 positions"),
        (("--hard-ratio", 0.5, "--output", "texts.jsonl"), "is a file, expected a folder"),
        (("--hard-ratio", 0.5, "--text-column", "body"), "expected the column 'body', got text"),
        (("--hard-ratio", "half"), "see `cascade collect-hard --help`"),
        (("--hard-ratio", 0.5, "--num-samples", 4), "in its held-out split"),
    ],
)
def test_invalid_input_gives_a_one_line_error_and_leaves_no_files(
    collect: Run, here: Path, arguments: tuple[object, ...], message: str
) -> None:
    before = contents(here)
    done = collect("--output", "hard", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1 + ("Collecting" in done.err)
    assert contents(here) == before


def test_an_unwritable_output_is_refused_before_the_model_is_loaded(
    collect: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert collect("--hard-ratio", 0.5, "--output", "hard").status == 0
    monkeypatch.setattr("cascade.models.loading.load", None)
    done = collect("--hard-ratio", 0.5, "--output", "hard")
    assert (done.status, len(done.err.strip().splitlines())) == (2, 1)
    assert "hard already holds a dataset of hard tokens" in done.err
    done = collect("--output", "other")
    assert done.status == 2
    assert "expected a threshold or a hard ratio" in done.err


def test_rerunning_an_interrupted_command_resumes_it(
    collect: Run, here: Path, models: Path
) -> None:
    code = (
        "import time; from cascade import cli; "
        "from cascade.stages.hard_tokens import exit_states, plan; "
        "plan.SHARD_BYTES, plan.MOST_SHARDS = 1, 1000; "
        "states = exit_states.exit_states; "
        "exit_states.exit_states = lambda *a: (time.sleep(0.2), states(*a))[1]; cli.main()"
    )
    options = ("--corpus", "texts.jsonl", "--seq-len", "16", "--batch-size", "4")
    command = ("collect-hard", "--model", str(models / "tiny"), *options, "--hard-ratio", "0.5")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command, "--output", "hard"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list(Path("hard").rglob("data-*.arrow"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped; hard is kept: run the same command again to resume" in err
    done = collect("--batch-size", 4, "--hard-ratio", 0.5, "--output", "hard")
    assert done.status == 2  # here shards have their usual size
    assert "unfinished dataset with other arguments (batches, per_shard: 1, now " in done.err
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--output", "hard"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert load_hard_tokens("hard").layer == 3


def test_the_benchmark_writes_its_record_and_refuses_a_missing_layer(
    run: Run, models: Path, here: Path
) -> None:
    small = ("--tokens", 160, "--seq-len", 16, "--rounds", 2, "--model", models / "tiny")
    command = ("bench", "collect-hard", *small, "--output", "out")
    done = run(*command, "--layer", 7)
    assert done.status == 2
    assert "expected an exit layer in 1..4, got 7" in done.err
    assert not Path("out").exists()
    done = run(*command)
    assert done.status == 0, done.err
    assert json.loads(Path("out/bench.json").read_text())["kind"] == "bench.collect-hard"
    assert "collect/bare" in done.out

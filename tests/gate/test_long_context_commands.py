"""Long contexts on the command line: options, refusals, and what is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import Run, check_refusal
from support.tiny_models import save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with 512 positions."""
    folder = tmp_path_factory.mktemp("long") / "long"
    return save_checkpoint(folder, max_position_embeddings=512)


@pytest.fixture
def options(model: Path, here: Path) -> tuple[object, ...]:
    return ("--model", model, "--corpus", "texts.jsonl", "--seq-len", 16)


def accepted(run: Run, options: tuple[object, ...], *more: object) -> str:
    """Make and accept a baseline; return what the measurement said."""
    done = run("analyze", *options, *more, "--output", "run", "--overwrite")
    assert done.status == 0, done.err
    assert run("accept", "run").status == 0
    return done.err


def test_a_baseline_holds_long_sequences_and_the_gate_compares_one(
    run: Run, options: tuple[object, ...]
) -> None:
    said = accepted(run, options)
    assert "Measured 2 long sequences of 512 tokens in " in said
    (path,) = Path("baselines").glob("*/*.json")
    stored = json.loads(path.read_text())
    assert stored["long_context"] == {"length": 512, "sequences": 2, "ranges": 8}
    assert 0 < stored["noise"]["long"] < 1e-6
    done = run("gate", *options)
    assert done.status == 0
    assert "Long contexts  1 sequence of 512 tokens in 8 ranges" in done.out
    assert "Long contexts" not in run("gate", *options, "--no-long-context").out
    assert "2 sequences of 512 tokens" in run("gate", *options, "--full").out
    assert "2 sequences of 512 tokens" in run("compare", "run", path).out


def test_the_length_can_be_given_or_turned_off(run: Run, options: tuple[object, ...]) -> None:
    assert "Measured 2 long sequences of 256 tokens" in accepted(
        run, options, "--long-context", 256
    )
    assert "256 tokens in 4 ranges" in run("gate", *options).out
    assert "long sequence" not in accepted(run, options, "--long-context", 0)
    done = run("gate", *options)
    assert done.status == 0
    unwrapped = " ".join(done.out.split())
    assert "Not checked long contexts: the baseline has no long sequences: turned" in unwrapped


@pytest.mark.parametrize(
    ("length", "fragments"),
    [
        (513, ["--long-context 513 exceeds the model's 512 positions", "use 512 or less"]),
        (16, ["expected --long-context above the 16 tokens of a sequence, got 16"]),
    ],
)
def test_a_length_that_does_not_fit_is_refused_in_one_line(
    run: Run, options: tuple[object, ...], length: int, fragments: list[str]
) -> None:
    done = run("analyze", *options, "--long-context", length, "--output", "run")
    check_refusal(done, fragments)
    assert not Path("run").exists()


def test_a_corpus_that_is_too_short_is_said_and_refused_only_if_asked(
    run: Run, options: tuple[object, ...]
) -> None:
    few = ("--max-tokens", 320)
    done = run("analyze", *options, *few, "--long-context", 400, "--output", "run")
    check_refusal(done, ["texts.jsonl gives 320 tokens, too few for a sequence of 400"])
    assert not Path("run").exists()
    said = accepted(run, options, *few)
    note = "No long sequences: texts.jsonl gives 320 tokens, too few for a sequence of 512"
    assert note in said
    planned = run("plan", *options, *few, "--output", "PLAN")
    assert (planned.status, planned.err.startswith(note)) == (0, True), planned.err
    assert run("gate", *options).status == 0

"""Options of engines: what is refused before anything is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.commands import Run, check_refusal

NEEDED = {
    "analyze": ("--output", "report"),
    "fit-heads": ("--layers", "2", "--output", "heads.safetensors"),
    "collect-hard": ("--hard-ratio", "0.5", "--output", "hard"),
}


@pytest.fixture(params=NEEDED)
def command(request: pytest.FixtureRequest, models: Path) -> tuple[object, ...]:
    """Return a command on a model that is not there, so that nothing can be read."""
    return (request.param, "--model", models / "absent", *NEEDED[request.param])


def test_without_ray_one_line_says_how_to_install_it(
    command: tuple[object, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run(*command, "--engine", "ray")
    check_refusal(done, ["--engine ray needs the package ray; run `pip install cascade-exit[ray]`"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "dask"), "expected --engine ray, got dask; other schedulers run"),
        (("--workers", "2"), "--workers needs --engine ray; add it, or leave --workers out"),
        (("--address", "auto"), "--address needs --engine ray"),
        (("--gpus-per-worker", "1"), "--gpus-per-worker needs --engine ray"),
        (("--threads", "1"), "--threads needs --engine ray"),
        (("--shards", "3"), "--shards needs --engine ray"),
    ],
)
def test_options_without_their_engine_are_refused(
    command: tuple[object, ...], options: tuple[str, ...], message: str, run: Run
) -> None:
    check_refusal(run(*command, *options), [message])


@pytest.mark.parametrize("value", ["1.5", "inf"])
def test_a_number_of_gpus_that_no_worker_can_have_is_refused(
    value: str, command: tuple[object, ...], run: Run
) -> None:
    pytest.importorskip("ray", reason="the extra cascade-exit[ray] is not installed")
    done = run(*command, "--engine", "ray", "--gpus-per-worker", value)
    check_refusal(done, ["expected --gpus-per-worker of 0, a fraction or a whole number"])


def test_an_analysis_on_ray_needs_an_output_and_writes_no_archive(run: Run, models: Path) -> None:
    pytest.importorskip("ray", reason="the extra cascade-exit[ray] is not installed")
    model = ("--model", models / "absent", "--engine", "ray")
    check_refusal(run("analyze", *model), ["--engine ray keeps the shards in --output"])
    done = run("analyze", *model, "--output", "report", "--npz", "all.npz")
    check_refusal(done, ["--npz cannot be written by --engine ray"])


def test_hard_tokens_have_shards_of_their_own(run: Run, models: Path) -> None:
    pytest.importorskip("ray", reason="the extra cascade-exit[ray] is not installed")
    options = ("--hard-ratio", "0.5", "--output", "hard", "--engine", "ray", "--shards", "3")
    done = run("collect-hard", "--model", models / "absent", *options)
    check_refusal(done, ["--shards is for other commands"])

"""`cascade compare-models` as a user would run it, on tiny checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Run
from support.disk import contents
from support.tiny_models import save_checkpoint

COMMON = ("--corpus", "texts.jsonl", "--seq-len", 16, "--max-tokens", 256)


def read(path: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(Path(path).read_text())
    return record


@pytest.fixture(scope="session")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("deeper") / "Deeper", num_layers=7)


def test_models_copies_and_unmeasured_models_are_compared(
    run: Run, models: Path, deeper: Path, here: Path
) -> None:
    arguments = (models / "tiny", deeper, "--copy", "int8", "--unmeasured", "smollm2-360m")
    done = run("compare-models", *arguments, *COMMON, "--output", "out")
    assert done.status == 0, done.err
    assert "4 models over relative depth" in done.out
    assert "Wrote out/models.html" in done.err
    record = read("out/models.json")
    assert [entry["name"] for entry in record["models"]] == [
        *("tiny", "tiny+int8", "deeper", "smollm2-360m"),
    ]
    assert [entry["measured"] for entry in record["models"]] == [True, True, True, False]
    assert [pair["model"] for pair in record["pairs"]] == ["B", "C"]
    assert record["pairs"][0]["paired"]["sequences"] == 16
    assert record["provenance"]["command"].startswith("cascade compare-models ")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        *("models-operations.svg", "models-profiles.svg", "models.html", "models.json"),
    ]


def test_repeating_the_command_gives_identical_files(run: Run, models: Path, here: Path) -> None:
    found = []
    for _ in range(2):
        done = run(
            *("compare-models", models / "tiny", "--copy", "noise:0.1", *COMMON),
            *("--output", "out", "--overwrite"),
        )
        assert done.status == 0, done.err
        found.append(contents(here / "out"))
    assert found[0] == found[1]
    # Of one size: an older run's picture of sizes would go, and none is made.
    assert not Path("out/models-operations.svg").exists()


def test_the_seed_changes_only_copies_with_noise(run: Run, models: Path, here: Path) -> None:
    means = []
    for seed in (0, 0, 1):
        arguments = ("--copy", "noise:0.1", "--seed", seed, "--output", "out", "--overwrite")
        assert run("compare-models", models / "tiny", *arguments, *COMMON).status == 0
        means.append([row["mean"] for row in read("out/models.json")["models"][1]["layers"]])
    assert means[0] == means[1] != means[2]


def test_without_output_nothing_is_written(run: Run, models: Path, here: Path) -> None:
    before = contents(here)
    done = run("compare-models", models / "tiny", models / "other", *COMMON)
    assert done.status == 0, done.err
    assert contents(here) == before


def test_config_only_needs_no_weights(run: Run, here: Path) -> None:
    done = run(
        *("compare-models", "smollm2-135m", "smollm2-360m", "smollm2-1.7b", "--config-only"),
        *("--output", "out"),
    )
    assert done.status == 0, done.err
    assert "Nothing was measured" in done.out
    assert "1,711,376,384" in done.out
    assert read("out/models.json")["pairs"] == []


def test_a_folder_without_weights_is_described(
    run: Run, models: Path, folder: Path, here: Path
) -> None:
    (folder / "model.safetensors").unlink()
    done = run("compare-models", models / "tiny", folder, *COMMON)
    assert done.status == 0, done.err
    assert "broken (not measured)" in done.out


def test_a_hub_model_can_be_named_by_id_or_short_name(
    run: Run, models: Path, here: Path, deeper: Path
) -> None:
    """The hub's cache, as its client leaves it; the hub itself cannot be reached."""
    for hub_id in ("Some-Org/Deeper", "HuggingFaceTB/SmolLM2-360M-Instruct"):
        model = models / "hub" / f"models--{hub_id.replace('/', '--')}"
        shutil.copytree(deeper, model / "snapshots" / ("b" * 40), dirs_exist_ok=True)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text("b" * 40)
    try:
        done = run(
            *("compare-models", "Some-Org/Deeper", "smollm2-360m", *COMMON, "--output", "out"),
        )
        assert done.status == 0, done.err
        entries = read("out/models.json")["models"]
        assert [entry["name"] for entry in entries] == [
            *("some-org--deeper", "huggingfacetb--smollm2-360m-instruct"),
        ]
        assert entries[1]["provenance"]["model"]["source"] == "smollm2-360m"
        assert entries[1]["provenance"]["model"]["revision"] == "b" * 40
        # What was loaded counts, not what the name is known for.
        assert entries[1]["sizes"]["num_layers"] == 7
    finally:
        shutil.rmtree(models / "hub")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "missing argument 'MODEL'"),
        (("TINY",), "expected at least two models, got 1"),
        (("TINY", "nobody/nothing"), "no model nobody/nothing: no such folder"),
        (("nobody/nothing", "TINY"), "no model nobody/nothing: no such folder"),
        (("TINY", "smollm2-1.7b"), "its sizes alone are known: --unmeasured smollm2-1.7b"),
        (("TINY", "texts.jsonl"), "expected a model folder or a .gguf file"),
        (("TINY", "--unmeasured", "nobody/nothing"), "no configuration of nobody/nothing"),
        (("TINY", "T5"), "encoder-decoder"),
        (("TINY", "NAN"), "decoder layer 2"),
        (("TINY", "--copy", "int3"), "expected a copy such as int8"),
        (("TINY", "--copy", "int8", "--config-only"), "which is not measured; leave out --copy"),
        (("TINY", "OTHER", "--seq-len", 65), "exceed the model's 64 positions"),
        (("TINY", "OTHER", "--seq-len", 60_000), "at least one block of 60000 tokens"),
        (("TINY", "OTHER", "--num-samples", 1, "--seq-len", 60), "gives 52 tokens, expected"),
        (("TINY", "OTHER", "--corpus", "none.jsonl"), "no corpus file none.jsonl"),
        (("TINY", "OTHER", "--dtype", "int8"), "expected --dtype among"),
        (("TINY", "OTHER", "--output", "texts.jsonl"), "texts.jsonl is a file"),
    ],
)
def test_invalid_input_gives_a_one_line_error_and_leaves_no_files(
    run: Run,
    models: Path,
    here: Path,
    folder: Path,
    tmp_path: Path,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    from safetensors.torch import load_file, save_file

    (folder / "config.json").write_text('{"model_type": "t5"}')
    broken = shutil.copytree(models / "tiny", tmp_path / "nan")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    places = {"TINY": models / "tiny", "OTHER": models / "other", "T5": folder, "NAN": broken}
    output = () if "--output" in arguments else ("--output", "out")
    before = contents(here)
    done = run(
        *("compare-models", *COMMON, *output),
        *(places.get(str(each), each) for each in arguments),
    )
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert contents(here) == before


def test_a_missing_model_is_reported_before_anything_is_measured(
    run: Run, models: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade.models.loading.load", None)
    done = run("compare-models", models / "tiny", models / "other", "nobody/nothing", *COMMON)
    assert done.status == 2
    assert "no model nobody/nothing" in done.err


def test_only_one_model_is_in_memory_at_a_time(
    run: Run, models: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    from cascade.models import loading

    load, alive, most = loading.load, [], []

    def watched(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        most.append(sum(reference() is not None for reference in alive))
        stack = load(*arguments, **options)
        alive.append(weakref.ref(stack.model))
        return stack

    monkeypatch.setattr(loading, "load", watched)
    arguments = (models / "tiny", models / "other", "--copy", "int8", "--copy", "bf16")
    assert run("compare-models", *arguments, *COMMON).status == 0
    assert most == [0, 0, 0, 0]

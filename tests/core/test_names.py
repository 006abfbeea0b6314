"""Names of models and corpora in baseline paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cascade.core import names
from cascade.core.names import file_name, hidden_hub_id, path_name, recorded_name, same_source


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("runA/checkpoint-500", "runa--checkpoint-500"),
        ("runA/checkpoint-500/", "runa--checkpoint-500"),
        ("runA/checkpoint-500/.", "runa--checkpoint-500"),
        ("runA/checkpoints/step_100", "runa--checkpoints--step_100"),
        ("bert/epoch=3-step=100", "bert--epoch=3-step=100"),
        ("bert/final", "bert--final"),
        ("bert/best_model", "bert--best_model"),
        ("bert/v2", "bert--v2"),
        ("bert/hf", "bert--hf"),
        ("a/train", "a--train"),
        ("a/train-00000-of-00001", "a--train-00000-of-00001"),
        ("a/Q4_K_M", "a--q4_k_m"),
        ("hub/models--ORG--Name/snapshots/" + 20 * "1f", "org--name"),
        ("runA/tiny-llama", "tiny-llama"),
        ("runA/x", "x"),
        ("runA/.hidden", "hidden"),
        ("runA/model.größe", "model.größe"),
        ("top/checkpoint", "checkpoint"),  # a project's folder has another name in each checkout
    ],
)
def test_general_names_take_their_parents_along(tmp_path: Path, path: str, expected: str) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "top/pyproject.toml").touch()
    assert path_name(f"{tmp_path}/{path}") == expected


def test_the_current_folder_is_named_as_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runA/checkpoint-500").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runA/checkpoint-500")
    assert path_name(".") == path_name("../checkpoint-500/") == "runa--checkpoint-500"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ORG/Name", "org--name"),
        ("con", "_con"),
        ("nul.x", "_nul.x"),
        ("a:b|c", "a-b-c"),
        ("ends. ", "ends"),
        ("...", "unnamed"),
        ("Cafe\u0301", "caf\u00e9"),
        ("日本語", "日本語"),
    ],
)
def test_names_are_files_on_every_system(tmp_path: Path, text: str, expected: str) -> None:
    assert file_name(text) == expected
    (tmp_path / f"{expected}.saturation.json").touch()


@pytest.mark.parametrize("letter", ["a", "語", "é"])
def test_long_names_are_cut_and_stay_different(tmp_path: Path, letter: str) -> None:
    long = [file_name(letter * 80 + end * 80) for end in ("1" + letter, "2" + letter)]
    assert long[0] != long[1]
    for name in long:
        (tmp_path / f".{name}.saturation-12345678.json").touch()
    short = "x" * 100
    assert file_name(short) == short


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("runs/a", "./runs/a/", True),
        ("runs/a", "/home/me/runs/a", True),
        ("../runs/a", "runs/a", True),
        ("runs/a", "runs/b", False),
        ("/x/runs/a", "/y/runs/a", False),
        ("runs/A", "runs/a", False),
        ("ORG/name", "OTHER/name", False),
        ("Cafe\u0301", "caf\u00e9".capitalize(), True),
    ],
)
def test_sources_are_the_same_if_one_is_the_end_of_the_other(
    one: str, other: str, same: bool
) -> None:
    assert same_source(one, other) is same_source(other, one) is same


def test_a_recorded_path_is_named_without_the_disk() -> None:
    assert recorded_name("/gone/runA/checkpoint-500") == "runa--checkpoint-500"
    assert recorded_name("checkpoint-500") == "checkpoint-500"


def test_a_path_that_hides_a_hub_id_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "hub_cache", lambda: tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    os.makedirs("ORG/name")
    assert hidden_hub_id("ORG/name", "model") is None
    os.makedirs("hub/models--ORG--name")
    note = f"ORG/name is the path {tmp_path / 'ORG/name'}, not the model of that id on the hub"
    assert hidden_hub_id("ORG/name", "model") == note
    assert hidden_hub_id("ORG/name", "dataset") is None

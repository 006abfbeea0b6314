"""Every public function that takes a path takes text as well as a `Path`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.build_profiles import a_profile
from support.reference_early_exit import a_stack
from support.tiny_hard_tokens import some_splits
from support.tiny_stages import SHORT, a_cascade, a_reader, some_hard_tokens

import cascade
from cascade.core.files import AnyPath
from cascade.core.records import write_record
from cascade.exits.head_fitting import fit_heads
from cascade.gate.accepting import store_profile


class Named:
    """A path that is neither text nor a `Path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def read_record(path: Callable[[str], AnyPath], folder: Path) -> None:
    write_record(folder / "profile.json", a_profile().record())
    assert cascade.read_record(path("profile.json"), kind="saturation").schema == 3


def read_profile(path: Callable[[str], AnyPath], folder: Path) -> None:
    store_profile(folder, a_profile())
    (stored,) = folder.glob("*/*.json")
    assert cascade.read_profile(path(str(stored.relative_to(folder)))).record().layers


def heads(path: Callable[[str], AnyPath], folder: Path) -> None:
    stack = a_stack("llama")
    fit_heads(stack, some_splits()["train"], [2]).save(path("heads.safetensors"))
    assert cascade.load_heads(path("heads.safetensors"), stack).layers == [2]


def cascades(path: Callable[[str], AnyPath], folder: Path) -> None:
    made = a_cascade("llama")
    made.save_pretrained(path("cascade"))
    found = cascade.Cascade.from_pretrained(path("cascade"), made.base)
    assert len(found.stages) == len(made.stages)


def hard_tokens(path: Callable[[str], AnyPath], folder: Path) -> None:
    config = cascade.CollectingConfig(layer=3, hard_ratio=0.5, batch_size=4)
    made = cascade.collect_hard(a_stack("llama"), some_splits(), path("tokens"), config)
    assert cascade.load_hard_tokens(path("tokens")).record == made.record


def training(path: Callable[[str], AnyPath], folder: Path) -> None:
    tokens = some_hard_tokens(folder / "tokens")
    checkpoints, logs = path("checkpoints"), path("logs")
    cascade.train_stage(a_reader(), tokens, SHORT, checkpoints, steps=1, tensorboard=logs)
    assert (folder / "logs").is_dir()


#: Each uses the public functions of one kind of file: (path of a name, folder) -> None.
USES = [read_record, read_profile, heads, cascades, hard_tokens, training]


@pytest.mark.parametrize("kind", [str, Path, Named])
@pytest.mark.parametrize("use", USES)
def test_a_path_can_be_text_a_path_or_path_like(
    tmp_path: Path, use: Callable[[Callable[[str], AnyPath], Path], None], kind: Any
) -> None:
    def path(name: str) -> AnyPath:
        whole = tmp_path / name
        return str(whole) if kind is str else kind(whole)

    use(path, tmp_path)
    assert os.listdir(tmp_path)


def test_every_public_parameter_that_is_a_path_can_be_text() -> None:
    wrong = []
    for name in cascade.__all__:
        public = getattr(cascade, name)
        members = vars(public).values() if inspect.isclass(public) else [public]
        for member in members:
            function = getattr(member, "__func__", member)
            if not inspect.isfunction(function) or function.__name__.startswith("_"):
                continue
            for parameter in inspect.signature(function).parameters.values():
                names = str(parameter.annotation).replace(" ", "").split("|")
                if "Path" in names:
                    wrong.append(f"{name}: {function.__name__}({parameter})")
    assert wrong == []

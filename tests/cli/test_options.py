"""Groups of options: what typer sees of them, and what a command gets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from support.commands import Run

from cascade.cli import app
from cascade.cli.options import (
    Behind,
    First,
    ModelOptions,
    OutputOptions,
    TextOptions,
    field_names,
    option_groups,
    picked,
)


@dataclass(frozen=True)
class Size:
    """Two options, one of which is required."""

    width: Annotated[int, typer.Option(help="Columns.")]
    height: Annotated[int, typer.Option(help="Rows."), Behind("seed")] = 3


GOT: dict[str, Any] = {}


def draw(
    size: Size,
    output: Annotated[str, typer.Option(help="File."), First()],
    seed: Annotated[int, typer.Option(help="Of draws.")] = 0,
    title: Annotated[str | None, typer.Option(help="Heading.")] = None,
) -> None:
    """Draw."""
    GOT.update(size=size, output=output, seed=seed, title=title)


@pytest.fixture
def command() -> Any:
    small = typer.Typer(add_completion=False)
    small.command("draw")(option_groups(draw))
    return typer.main.get_command(small)


def test_a_groups_fields_are_the_commands_options(command: Any) -> None:
    params = {param.name: param for param in command.params}
    assert set(params) >= {"width", "height", "output", "seed", "title"}
    assert params["width"].required
    assert params["height"].default == 3
    assert params["height"].help == "Rows."
    assert command.help == "Draw."


def test_own_options_come_first_shared_ones_in_their_order_and_placed_ones_behind_another(
    command: Any,
) -> None:
    names = [param.name for param in command.params]
    assert names == ["width", "output", "title", "seed", "height"]


def test_the_command_gets_its_groups(command: Any) -> None:
    arguments = ["--width", "5", "--output", "x", "--height", "7"]
    command.main(arguments, standalone_mode=False)
    assert {"size": Size(width=5, height=7), "output": "x", "seed": 0, "title": None} == GOT


def test_a_group_is_picked_from_others_and_given_values_win() -> None:
    @dataclass(frozen=True)
    class Some:
        model: str
        corpus: str
        seq_len: int

    others = ModelOptions(model="a"), TextOptions(corpus="b", seq_len=7)
    assert picked(Some, *others) == Some("a", "b", 7)
    assert picked(Some, *others, corpus="c") == Some("a", "c", 7)


def test_a_subclass_changes_a_default_in_place() -> None:
    @dataclass(frozen=True)
    class Elsewhere(OutputOptions):
        overwrite: bool = True

    assert field_names(Elsewhere) == field_names(OutputOptions)
    assert Elsewhere().overwrite


@pytest.mark.parametrize("name", [command.name for command in app.registered_commands])
def test_no_command_function_has_more_than_seven_parameters(name: str) -> None:
    (info,) = (each for each in app.registered_commands if each.name == name)
    function = info.callback.__wrapped__  # type: ignore[union-attr]
    assert function.__code__.co_argcount <= 7


def test_evaluating_a_cascade_names_every_option_that_it_does_not_take(run: Run) -> None:
    done = run("evaluate", "--cascade", "c", "--layers", 2, "--split", "train", "--revision", "x")
    assert done.status == 2
    assert re.search(r"leave out --layers, --split, --revision$", done.err.strip())

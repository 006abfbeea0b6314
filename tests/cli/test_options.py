"""Groups of options: how typer sees them, their panels of help, and what a command receives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
import typer
from support.commands import Run

from cascade.cli import app
from cascade.cli.options import (
    PANELS,
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

    panel: ClassVar[str] = "Size"

    width: Annotated[int, typer.Option(help="Columns.")]
    height: Annotated[int, typer.Option(help="Rows.")] = 3


GOT: dict[str, Any] = {}


def draw(
    size: Size,
    output: Annotated[str, typer.Option(help="File.")],
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    title: Annotated[str | None, typer.Option(help="Title.", rich_help_panel="Output")] = None,
    border: Annotated[bool, typer.Option("--border", help="Draw a border.")] = False,
) -> None:
    """Draw."""
    GOT.update(size=size, output=output, seed=seed, title=title, border=border)


def commands() -> list[tuple[str, Any]]:
    """Return every command with its name."""
    found = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return [
        (name, command)
        for each, group in found.items()
        for name, command in getattr(group, "commands", {each: group}).items()
    ]


@pytest.fixture
def command() -> Any:
    small = typer.Typer(add_completion=False)
    small.command("draw")(option_groups(draw))
    return typer.main.get_command(small)


def test_fields_of_a_group_become_options_of_the_command(command: Any) -> None:
    params = {param.name: param for param in command.params}
    assert set(params) >= {"width", "height", "output", "seed", "title", "border"}
    assert params["width"].required
    assert params["height"].default == 3
    assert params["height"].help == "Rows."
    assert command.help == "Draw."


def test_options_are_ordered_by_panel_and_shared_panels_come_last(command: Any) -> None:
    panels = [(param.name, param.rich_help_panel) for param in command.params]
    assert panels == [
        ("width", "Size"),
        ("height", "Size"),
        ("border", "Options"),
        ("seed", "Computation"),
        ("output", "Output"),
        ("title", "Output"),
    ]


def test_every_option_of_every_command_is_in_a_panel_by_topic() -> None:
    for name, command in commands():
        options = [param for param in command.params if param.param_type_name == "option"]
        panels = [param.rich_help_panel for param in options]
        assert None not in panels, name
        shared = [panel for panel in panels if panel in PANELS]
        assert shared == sorted(shared, key=list(PANELS).index), name
        assert panels[len(panels) - len(shared) :] == shared, name


def test_help_of_an_option_is_a_sentence_and_its_default_comes_last() -> None:
    for name, command in commands():
        for param in command.params:
            where = f"{name} {param.name}: {param.help}"
            assert param.help[-1] == ".", where
            assert "without" not in param.help or "(default" not in param.help, where
            if "default:" in param.help:
                assert param.help.endswith(")."), where


def test_help_shows_one_value_of_a_list_and_no_type_of_a_flag() -> None:
    shown = {
        flag: param.metavar
        for _, command in commands()
        for param in command.params
        for flag in param.opts
        if param.param_type_name == "option"
    }
    expected = {"--overwrite": "", "--seed": "<int>", "--hard-ratio": "<float>", "--rule": "<str>"}
    assert {flag: shown[flag] for flag in expected} == expected
    kinds = {"", "<int>", "<float>", "<str>", "<path>", "<path|url>", "<file|key=value>"}
    assert set(shown.values()) == kinds


def test_the_command_receives_its_groups(command: Any) -> None:
    arguments = ["--width", "5", "--output", "x", "--height", "7"]
    command.main(arguments, standalone_mode=False)
    assert {
        "size": Size(width=5, height=7),
        "output": "x",
        "seed": 0,
        "title": None,
        "border": False,
    } == GOT


def test_picked_takes_options_from_other_groups_and_prefers_given_values() -> None:
    @dataclass(frozen=True)
    class Some:
        model: str
        corpus: str
        seq_len: int

    others = ModelOptions(model="a"), TextOptions(corpus="b", seq_len=7)
    assert picked(Some, *others) == Some("a", "b", 7)
    assert picked(Some, *others, corpus="c") == Some("a", "c", 7)


def test_subclass_of_a_group_can_change_a_default() -> None:
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


def test_evaluate_cascade_names_every_option_that_it_does_not_accept(run: Run) -> None:
    done = run("evaluate", "--cascade", "c", "--layers", 2, "--split", "train", "--revision", "x")
    assert done.status == 2
    assert re.search(r"leave out --layers, --split, --revision$", done.err.strip())

"""How each line of the pages is run, or checked: by the first word of a command."""

from __future__ import annotations

import configparser
import contextlib
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from cascade import cli
from support.doc_blocks import ROOT, Command, DocsError

#: Words in capitals that a reader replaces, and what a test puts there. The hub's stand-in has a
#: model of the very name ORG/NAME.
PLACEHOLDERS = {
    "ORG/NAME": "ORG/NAME",
    "MODEL": "smollm2-135m-instruct-q4_1",
    "CORPUS": "embedded",
    "PLAN": "PLAN",
}

#: Without the entry point, as in a source tree, the plugin is named.
PLUGIN = (
    ()
    if any(point.value == "cascade.plugin" for point in entry_points(group="pytest11"))
    else ("-p", "cascade.plugin")
)


def filled_in(command: Command) -> tuple[str, ...]:
    """Return a command's words with its placeholders replaced.

    Raises:
        DocsError: A placeholder is not in `PLACEHOLDERS`.
    """
    return tuple(_filled_in(word, command) for word in command.words)


def _filled_in(word: str, command: Command) -> str:
    def replaced(match: re.Match[str]) -> str:
        if match[0] in PLACEHOLDERS:
            return PLACEHOLDERS[match[0]]
        raise DocsError(f"{command.place}: no placeholder is called {match[0]}: {command.line}")

    if " " in word:  # a prompt
        return word
    return re.sub(r"ORG/NAME|(?<![\w.-])[A-Z]{2,}(?![\w-])", replaced, word)


def tox_settings() -> configparser.ConfigParser:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "tox.ini", encoding="utf-8")
    return settings


def tox_commands(command: Command) -> list[Command]:
    """Return the `cascade` commands that a tox line runs; its other commands are tox's own tests.

    Raises:
        DocsError: An environment that tox.ini does not have, or another option than -e.
    """
    settings = tox_settings()
    match command.words:
        case ("tox",):
            names = settings["tox"]["env_list"].replace(",", " ").split()
        case ("tox", "-e", given):
            names = given.split(",")
        case _:
            raise DocsError(f"{command.place}: expected tox or tox -e ENV: {command.line}")
    found = []
    for name in names:
        section = "testenv" if name == "tests" else f"testenv:{name}"
        if section not in settings:
            raise DocsError(f"{command.place}: tox.ini has no environment {name}: {command.line}")
        commands = settings[section].get("commands", "").replace("{posargs}", "")
        lines = commands.replace("{[thin]bin}", "").splitlines()
        words = [tuple(shlex.split(line)) for line in lines if line.startswith("cascade ")]
        found += [Command(command.place, each) for each in words]
    return found


def check_pip(command: Command) -> None:
    """Check a pip line: what it installs is this project, or pinned in constraints.txt.

    Raises:
        DocsError: Another package or version, or an extra or a file that is not there.
    """
    lines = (line.partition("==") for line in read_lines(ROOT / "constraints.txt"))
    pins = {name.lower(): version for name, _, version in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    words = list(command.words)
    if words[:2] != ["pip", "install"]:
        raise DocsError(f"{command.place}: expected pip install: {command.line}")
    wanted = iter(words[2:])
    for word in wanted:
        if word in ("-c", "--extra-index-url"):
            given = next(wanted)
            if word == "-c" and not (ROOT / given).is_file():
                raise DocsError(f"{command.place}: no file {given}: {command.line}")
        elif word not in ("-e", "--no-deps", "."):
            _check_wanted(word, pins | {project["name"]: project["version"]}, project, command)


def _check_wanted(
    word: str, pins: dict[str, str], project: dict[str, Any], command: Command
) -> None:
    name, _, version = word.partition("==")
    name, _, extra = name.rstrip("]").partition("[")
    if name in (".", "./cascade"):
        name = project["name"]
    known = name == "tox" or pins.get(name) in ({version} if version else set(pins.values()))
    if not known or (extra and extra not in project["optional-dependencies"]):
        raise DocsError(f"{command.place}: {word} is not in constraints.txt: {command.line}")


def read_lines(path: Path) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            yield line


def run_pytest(command: Command) -> str:
    """Run a pytest line in this process, in the folder at hand; return what it printed.

    Raises:
        DocsError: Its exit status is another than the page says.
    """
    words = filled_in(command)[1:]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        # These belong to the session around this one.
        status = pytest.main([*PLUGIN, "-p", "no:faulthandler", "--capture=no", *words])
    if status != command.status:
        raise DocsError(f"{command.place}: {status!r}: {command.line}\n{out.getvalue()}")
    return out.getvalue()


def check_pytest(command: Command, config: pytest.Config) -> None:
    """Check that the files, options and markers of a pytest line exist in this repository.

    Raises:
        DocsError: One of them does not.
    """
    words = [word for word in command.words[1:] if word]
    found, unknown = config._parser.parse_known_and_unknown_args(words)
    missing = [name for name in found.file_or_dir if not (ROOT / name.split("::")[0]).exists()]
    if "--pyargs" in words:
        missing = [name for name in found.file_or_dir if find_spec(name) is None]
    known = {re.split(r"\W", line)[0] for line in config.getini("markers")} | {"and", "or", "not"}
    asked = set(re.findall(r"\w+", found.markexpr)) if "-m" in words else set()
    if unknown or missing or asked - known:
        wrong = ", ".join([*unknown, *missing, *sorted(asked - known)])
        raise DocsError(f"{command.place}: there is no {wrong}: {command.line}")


def run_cascade(command: Command, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a `cascade` command in this process, as `main` would be; return what it printed.

    Raises:
        DocsError: Its exit status is another than the page says.
    """
    words = filled_in(command)
    monkeypatch.setattr(sys, "argv", list(words))
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    if status != command.status:
        said = err.getvalue().strip() or out.getvalue().strip()
        raise DocsError(f"{command.place}: exit status {status}: {shlex.join(words)}\n{said}")
    return out.getvalue() + err.getvalue()


def parse_cascade(command: Command) -> None:
    """Let the command line's own parser read a command that prose names; nothing is run.

    Options that a command needs may be left out, and placeholders may be anything.

    Raises:
        DocsError: There is no such command, option or value.
    """
    found: Any = typer.main.get_command(cli.app)
    context = found.context_class(found, info_name="cascade")
    words = list(command.words[1:])
    try:
        while hasattr(found, "commands") and words and not words[0].startswith("--"):
            name, found, words = found.resolve_command(context, words)
            context = found.context_class(found, info_name=name, parent=context)
        given, _, _ = found.make_parser(context).parse_args(words)
        for param in found.params:
            value = given.get(param.name)
            acts = param.is_eager or not param.expose_value  # --help, --install-completion
            if value is not None and not acts and not re.fullmatch("[A-Z]+", str(value)):
                param.process_value(context, value)
    except Exception as error:
        raise DocsError(f"{command.place}: {error}: {command.line}") from error

"""The pages: every command line and every Python block is run, or its kind says why not.

The kinds of lines, by their first word; a line of no kind fails:

- `cascade`: run in this process, on the stand-ins of `doc_stand_ins`; it must end with status 0;
- `tox`: its environments must be in tox.ini, and the `cascade` commands of theirs are run;
- `pytest`: run where it runs the page's tests or the plugin's own suite; of lines that run this
  repository's tests, files, options and markers must exist, the tests being run anyhow;
- `pip`: what it installs must be this project or pinned in constraints.txt;
- `python -m venv`, `.`: make the reader's environment; not run.

The lines of a page share one folder, in the page's order. Python blocks share one namespace, those
that define tests become test files, which a `pytest` line of the page must run; a block whose first
line is a comment that names a file is written to it. YAML is parsed and
its `run` steps are run. Blocks of text are held against what the lines before them printed.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_blocks import (
    ROOT,
    SHELL,
    Block,
    Command,
    DocsError,
    blocks_of,
    code_in_prose,
    commands_of,
    pages,
    read,
)
from doc_lines import (
    check_pip,
    check_pytest,
    parse_cascade,
    run_cascade,
    run_pytest,
    tox_commands,
)
from doc_stand_ins import lay_out, save_all, stand_in


class Page:
    """A page that is being read: its folder, its names, what its lines have printed."""

    def __init__(self, config: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = config
        self.monkeypatch = monkeypatch
        self.names: dict[str, Any] = {"__name__": "page"}
        self.printed = ""
        self.tests: list[str] = []

    def read(self, name: str, text: str) -> None:
        """Run all of a page.

        Raises:
            DocsError: Something in it cannot be run, or does not do what the page says.
        """
        for block in blocks_of(name, text):
            self.run(block)
        if self.tests:
            raise DocsError(f"{name}: no pytest line of the page runs {', '.join(self.tests)}")
        for command in code_in_prose(name, text):
            self.parse(command)

    def run(self, block: Block) -> None:
        if block.language in SHELL:
            for command in commands_of(block):
                self.run_line(command)
        elif block.language == "python":
            self.run_python(block)
        elif block.language == "yaml":
            self.run_steps(block)
        elif block.language == "text":
            check_output(block, self.printed)
        else:
            raise DocsError(f"{block.place}: nobody runs blocks of {block.language}")

    def run_line(self, command: Command) -> None:
        match command.words:
            case ("cascade", *_):
                self.printed += run_cascade(command, self.monkeypatch)
            case ("tox", *_):
                for each in tox_commands(command):
                    self.run_line(each)
            case ("pytest", *words):
                if "--pyargs" in words:
                    self.printed += run_pytest(command)
                elif self.tests or command.status:
                    self.printed += run_pytest(command)
                    self.tests = []
                else:
                    check_pytest(command, self.config)
            case ("pip", *_):
                check_pip(command)
            case ("python", "-m", "venv", _) | (".", _):
                pass
            case _:
                raise DocsError(f"{command.place}: a line of no kind: {command.line}")

    def run_python(self, block: Block) -> None:
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
            return
        if re.search(r"^def test_", block.text, re.MULTILINE):
            name = f"test_{re.sub(r'[^a-z]+', '_', block.page.lower())}_{block.line}.py"
            Path(name).write_text(block.text, encoding="utf-8")
            self.tests.append(name)
            return
        try:
            # Lines keep their numbers in a traceback.
            code = compile("\n" * (block.line - 1) + block.text, str(ROOT / block.page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, self.names)
        except Exception as error:
            raise DocsError(f"{block.place}: {type(error).__name__}: {error}") from error
        self.printed += out.getvalue()

    def run_steps(self, block: Block) -> None:
        found = yaml.safe_load(block.text)
        for job in found.get("jobs", {}).values():
            for step in job["steps"]:
                if "run" in step:
                    for command in commands_of(Block(block.page, block.line, "", step["run"])):
                        self.run_line(command)

    def parse(self, command: Command) -> None:
        match command.words[0]:
            case "cascade":
                parse_cascade(command)
            case "tox":
                tox_commands(command)
            case "pytest":
                check_pytest(command, self.config)
            case "pip":
                check_pip(command)


def check_output(block: Block, printed: str) -> None:
    """Hold an output in a page against what was printed: words must be, numbers may differ.

    Raises:
        DocsError: A line without a number was not printed so.
    """
    known = {" ".join(line.split()) for line in printed.splitlines()}
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        words = " ".join(line.split())
        if re.search(r"\d", words) or set(words) <= set("─."):
            continue
        if words not in known:
            raise DocsError(f"{block.page}:{number}: no line before printed {words!r}")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("stand-ins"))


@pytest.fixture
def page(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> Page:
    for name in ("CI", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    stand_in(saved, monkeypatch)
    lay_out(tmp_path, saved)
    return Page(pytestconfig, monkeypatch)


@pytest.mark.parametrize("name", pages())
def test_everything_that_a_page_runs_runs(page: Page, name: str) -> None:
    page.read(name, read(name))

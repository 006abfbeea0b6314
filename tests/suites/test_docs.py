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
from support.doc_blocks import (
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
from support.doc_lines import (
    check_pip,
    check_pytest,
    parse_cascade,
    run_cascade,
    run_pytest,
    tox_commands,
)
from support.doc_stand_ins import lay_out, save_all, stand_in

from cascade import read_record
from cascade.report.saturation.figures import layer_profile_svg


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
        elif block.language == "sh":
            pass  # for schedulers: tests/suites/test_schedulers.py runs them
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
        try:
            found = yaml.safe_load(block.text)
        except yaml.YAMLError as error:
            raise DocsError(f"{block.place}: {error}") from error
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
        DocsError: A line without a number was not printed, wherever lines are broken.
    """
    known = " ".join(printed.split())
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
    for name in ("CI", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
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


# --- Would it be seen? -----------------------------------------------------------------------


def fenced(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```", ""])


BROKEN = {
    "an option that is not there": (
        fenced("", "cascade analyze --max-token 256"),
        "x.md:2: exit status 2: cascade analyze --max-token 256\ncascade: no such option",
    ),
    "a command misspelt": (fenced("bash", "cascade analize"), "no such command 'analize'"),
    "a value out of range": (fenced("bash", "cascade analyze --seq-len 1"), "exit status 2"),
    "an option of the second line": (
        fenced("bash", "cascade --version", "cascade bench \\", "  fit --round 2"),
        "x.md:3: exit status 2",
    ),
    "a file that no line before has made": (
        fenced("", "cascade accept nowhere"),
        "no record nowhere/profile.json",
    ),
    "another exit status than the page says": (
        fenced("", "cascade gate --baselines none  # exit status 1"),
        "x.md:2: exit status 2",
    ),
    "a placeholder that nobody fills in": (
        fenced("", "cascade accept SOMEWHERE"),
        "no placeholder is called SOMEWHERE",
    ),
    "a line of no kind": (fenced("bash", "make docs"), "x.md:2: a line of no kind: make docs"),
    "a pipe": (fenced("bash", "cascade --version | cat"), "'|' is more than commands"),
    "a quote left open": (fenced("bash", "cascade generate --prompt 'x"), "No closing quotation"),
    "a line that goes on to nowhere": (fenced("", "cascade gate \\"), "nothing follows"),
    "a tox environment misspelt": (fenced("", "tox -e reports"), "no environment reports"),
    "another tox command": (fenced("", "tox run"), "expected tox or tox -e ENV"),
    "a package that is not pinned": (fenced("", "pip install torchh"), "torchh is not in"),
    "another version than is pinned": (fenced("", "pip install torch==1.0"), "torch==1.0 is not"),
    "an extra that is not there": (fenced("", "pip install '.[tests]'"), ".[tests] is not in"),
    "a constraints file misspelt": (fenced("", "pip install -c pins.txt ."), "no file pins.txt"),
    "a marker misspelt": (fenced("", "pytest -m satuartion"), "there is no satuartion"),
    "a test file that is gone": (fenced("", "pytest tests/test_x.py"), "no tests/test_x.py"),
    "an option of pytest misspelt": (fenced("", "pytest --force-regem"), "no --force-regem"),
    "a name that Python does not find": (
        fenced("python", "import cascade", "cascade.analise"),
        "x.md:2: AttributeError: module 'cascade' has no attribute 'analise'",
    ),
    "a syntax error": (fenced("python", "print("), "x.md:2: SyntaxError"),
    "a test that no line runs": (
        fenced("python", "def test_it():", "    pass"),
        "no pytest line of the page runs test_x_md_2.py",
    ),
    "a test that fails": (
        fenced("python", "def test_it():", "    assert 0") + fenced("", "pytest"),
        "1 failed",
    ),
    "a step of a workflow": (
        fenced("yaml", "jobs: {gate: {steps: [{run: cascade gaet}]}}"),
        "no such command 'gaet'",
    ),
    "YAML that is none": (fenced("yaml", "a: ["), "x.md:2: while parsing"),
    "an output that nothing prints": (
        fenced("", "cascade --version") + fenced("text", "cascade 0.0", "Hello"),
        "x.md:6: no line before printed 'Hello'",
    ),
    "a block of a language that nobody runs": (fenced("ini", "[pytest]"), "blocks of ini"),
    "a block without an end": ("```bash\ncascade --version\n", "this block has no end"),
    "an option in prose": ("Run `cascade gate --fulll`.", "x.md:1: No such option: --fulll"),
    "a command in prose": ("\nOr `cascade\ngaet --full`.", "x.md:2: No such command 'gaet'"),
    "a marker in prose": ("As `pytest -m budget` does.", "there is no budget"),
}


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_in_a_page_is_seen(page: Page, text: str, words: str) -> None:
    with pytest.raises(DocsError, match=re.escape(words)):
        page.read("x.md", text)


def test_what_is_right_in_a_page_passes(page: Page) -> None:
    page.read(
        "x.md",
        fenced("", "tox -e lint && cascade --version  # a comment", "cascade bench fit --help")
        + fenced("python", "# notes.py", "here = 1")
        + fenced(
            "python",
            "from pathlib import Path",
            "here = 2",
            "print('here', here)",
            "print(Path('notes.py').read_text())",
        )
        + fenced("text", "here 3", "# notes.py")
        + fenced("", "cascade gate --baselines none  # exit status 2")
        + fenced("python", "def test_it():", "    pass")
        + fenced("bash", "pytest -q")
        + "`cascade evaluate --heads HEADS`, `pytest -m budgets`, `cascade` and `--full`.\n"
        + "As text, and no code: \\`cascade gaet\\`.",
    )
    assert "1 passed" in page.printed


def test_a_page_without_its_blocks_has_no_commands() -> None:
    found = [block for name in pages() for block in blocks_of(name, read(name))]
    assert sum(read(name).count("```") for name in pages()) == 2 * len(found)
    assert {block.language for block in found} == {"", "bash", "python", "sh", "text", "yaml"}


# --- What the pages hold beside lines ----------------------------------------------------------


def test_picture_of_the_pages_matches_the_stored_baseline() -> None:
    stored = ROOT / "baselines/smollm2-135m-instruct-q4_1/embedded.saturation.json"
    drawn = layer_profile_svg(read_record(stored, kind="saturation"))
    assert (ROOT / "docs/assets/layer-profile.svg").read_text(encoding="utf-8") == drawn


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_local_links_of_pages_outside_docs_exist(name: str) -> None:
    links = re.findall(r"\]\((?!https:)([^)#]+)(?:#([\w-]+))?\)", read(name))
    assert links
    for path, anchor in links:
        target = ROOT / Path(name).parent / path
        assert target.exists(), path
        if anchor:
            found = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9]+", "-", each.lower()).strip("-") for each in found}

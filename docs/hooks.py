"""Hooks of the site: pages from outside docs/, and the reference of the commands."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

#: Pages in the folders where GitHub expects them -> their paths on the site.
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "baselines/README.md": "baselines.md",
}

#: Other link targets -> the page of the site with the same content.
ELSEWHERE = OUTSIDE | {"README.md": "index.md"}

#: The notebooks with their outputs, which `tox -e notebooks` stores.
EXECUTED = ROOT / "build/notebooks"

_LINK = re.compile(r"(?<=\]\()(?P<path>[\w./-]+)(?P<anchor>#[\w-]+)?(?=\))")
_COMMANDS = "<!-- commands -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for source, target in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=_relinked(text, source, target)))
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        target = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, target, content=notebook_page(path, EXECUTED)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is made from the code, and send links out of docs/ to the site's own pages."""
    if page.file.src_uri == "reference/cli.md":
        return markdown.replace(_COMMANDS, _commands())
    if page.file.src_uri == "reference/python.md":
        _check_public(markdown)
    if page.file.generated_by is not None:
        return markdown
    return _relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def _relinked(text: str, source: str, target: str) -> str:
    """Return a page with its links as they are on the site.

    Args:
        text: The page.
        source: Its path in the repository, to which its links are relative.
        target: Its path on the site.
    """

    def replaced(match: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(os.path.dirname(source), match["path"]))
        on_site = ELSEWHERE.get(path, path.removeprefix("docs/"))
        return os.path.relpath(on_site, os.path.dirname(target)) + (match["anchor"] or "")

    return _LINK.sub(replaced, text)


# --- Notebooks -------------------------------------------------------------------------------


def notebook_page(path: Path, executed: Path) -> str:
    """Return a notebook as a page of Markdown, with its outputs where they are known.

    Args:
        path: The notebook, without outputs.
        executed: The folder of notebooks with outputs. A copy whose cells are not those of the
            notebook is out of date and not used.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    copy = executed / path.name
    done = json.loads(copy.read_text(encoding="utf-8"))["cells"] if copy.exists() else []
    fresh = [cell["source"] for cell in done] == [cell["source"] for cell in cells]
    lines = []
    for cell in done if fresh else cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [text, ""]
        else:
            lines += ["```python", text, "```", ""]
            lines += [part for output in cell["outputs"] for part in _output(output)]
    download = f"[Download this notebook]({path.name}){{ .md-button }}"
    missing = "" if fresh else "\n\n*Built without outputs: `tox -e notebooks` runs the cells.*"
    return "\n".join([*lines, download + missing, ""])


def _output(output: dict[str, Any]) -> list[str]:
    """Return one output of a cell: a picture, HTML, or text."""
    if output["output_type"] == "stream":
        # Progress bars and warnings go to stderr.
        return _text(output["text"]) if output["name"] == "stdout" else []
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return [f'<img class="notebook" alt="" src="data:image/png;base64,{picture}">', ""]
    if "text/html" in data:
        content = re.sub(r"\n\s*\n", "\n", "".join(data["text/html"]))
        return [f'<div class="notebook">{content}</div>', ""]
    return _text(data.get("text/plain", ""))


def _text(text: str | list[str]) -> list[str]:
    return ["```text", "".join(text).rstrip("\n"), "```", ""]


# --- Commands --------------------------------------------------------------------------------


def _commands() -> str:
    """Return the command line's reference, read from the commands themselves."""
    sys.path.insert(0, str(ROOT))
    try:
        cli = importlib.import_module("cascade.cli")
        root = importlib.import_module("typer").main.get_command(cli.app)
    finally:
        sys.path.remove(str(ROOT))
    return "\n".join(_described("cascade", root))


def _described(name: str, command: Any) -> list[str]:
    """Return the section of a command, or those of a group's commands, in the order of help."""
    if hasattr(command, "commands"):
        below = [(each, command.commands[each]) for each in command.list_commands(None)]
        return [line for each, one in below for line in _described(f"{name} {each}", one)]
    options = [param for param in command.params if param.param_type_name == "option"]
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    usage = " ".join([name, *(param.name.upper() for param in arguments), "[OPTIONS]"])
    lines = [f"## {name}", "", f"`{usage}`", "", _paragraphs(command.help or ""), ""]
    if arguments:
        lines += ["| argument | meaning |", "| --- | --- |"]
        lines += [f"| `{param.name.upper()}` | {_cell(param.help)} |" for param in arguments]
        lines.append("")
    panels = dict.fromkeys(param.rich_help_panel or "Options" for param in options)
    lines += ["| option | meaning | default |", "| --- | --- | --- |"]
    for panel in panels:
        lines.append(f"| **{panel}** | | |")
        lines += [_row(param, command) for param in options if param.rich_help_panel == panel]
    return [*lines, ""]


def _row(param: Any, command: Any) -> str:
    names = " / ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
    default = "required" if param.required else ""
    if not param.required and param.default not in (None, False, ()):
        default = f"`{param.default}`"
    return f"| {names} | {_cell(param.help)} | {default} |"


def _cell(text: str | None) -> str:
    # `[` would start a link of mkdocstrings, `|` ends a cell, `<` begins a tag.
    return re.sub(r"([\[\]|<])", r"\\\1", " ".join((text or "").split()))


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))


# --- Python ----------------------------------------------------------------------------------


def _check_public(markdown: str) -> None:
    """Refuse a reference that lacks a public name, or has one that is not."""
    sys.path.insert(0, str(ROOT))
    try:
        modules = importlib.import_module("cascade")._MODULES
    finally:
        sys.path.remove(str(ROOT))
    wanted = {f"cascade.{module}.{name}" for name, module in modules.items()}
    found = set(re.findall(r"^::: (\S+)$", markdown, re.MULTILINE))
    if wanted != found:
        raise PluginError(
            f"reference/python.md lacks {sorted(wanted - found) or 'nothing'} and has "
            f"{sorted(found - wanted) or 'nothing'} that is not public"
        )

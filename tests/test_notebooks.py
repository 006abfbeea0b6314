"""The notebooks of the documentation are stored without outputs, and their cells are Python."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.paths import DOCS

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def cells(path: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_there_are_three_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["early-exit", "gate", "measure"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Any) -> None:
    assert cells(path)
    for cell in cells(path):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_compile(path: Any) -> None:
    for number, cell in enumerate(cells(path)):
        compile("".join(cell["source"]), f"{path.name}[{number}]", "exec")

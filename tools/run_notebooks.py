"""Run the notebooks of the documentation, and store them with outputs in build/notebooks/.

Run by `tox -e notebooks`. An error in a cell ends it. `docs/hooks.py` shows the outputs.
"""

from __future__ import annotations

import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "build/notebooks"


def main() -> None:
    """Run every notebook in a fresh kernel, in a folder that is not the repository."""
    TARGET.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(TARGET)}}
        NotebookClient(notebook, timeout=600, resources=resources).execute()
        nbformat.write(notebook, TARGET / path.name)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()

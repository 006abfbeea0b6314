"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import cascade

if TYPE_CHECKING:
    from cascade import DecoderStack

_PACKAGE = Path(cascade.__file__).parent

#: Modules with examples, as paths below the package.
_WITH_EXAMPLES = sorted(
    path.relative_to(_PACKAGE).as_posix()
    for path in _PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.fixture
def one_model(reference_model: DecoderStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every example that loads the reference model have the same one: loading takes seconds."""
    from cascade.models import loading

    load = loading.load

    def load_once(source: str = "smollm2-135m", **options: Any) -> DecoderStack:
        if source == "smollm2-135m" and not options:
            return reference_model
        return load(source, **options)

    monkeypatch.setattr(loading, "load", load_once)


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run examples where they can write files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("one_model", "empty_folder")
@pytest.mark.parametrize("path", _WITH_EXAMPLES)
def test_examples_in_docstrings_print_what_they_say(path: str) -> None:
    name = ".".join(["cascade", *Path(path).with_suffix("").parts]).removesuffix(".__init__")
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(
        verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    found: list[str] = []
    attempted = 0
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        attempted += runner.run(example, out=found.append).attempted
    assert attempted, f"expected examples in {name}, found none that can run"
    assert not found, "".join(found)


@pytest.mark.parametrize("name", cascade._MODULES)
def test_every_public_name_has_an_example(name: str) -> None:
    described = inspect.getdoc(getattr(cascade, name)) or ""
    assert doctest.DocTestParser().get_examples(described), f"cascade.{name} has no example"

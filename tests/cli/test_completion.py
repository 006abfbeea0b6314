"""Shell completion: commands, options and values, without torch."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import python

from cascade.cli import completion
from cascade.exits.rules import RULES
from cascade.models.checkpoints.weights import HUB_NAMES, WHEELS
from cascade.models.loading import DTYPES

#: Runs the command line as a shell does, and reports heavy modules on stderr.
_CODE = """
import sys
from cascade import cli
try:
    cli.main()
finally:
    heavy = {"torch", "transformers", "numpy", "huggingface_hub"} & set(sys.modules)
    print(sorted(heavy), file=sys.stderr)
"""


def completed(line: str) -> list[str]:
    """Return what bash offers at the end of a line."""
    words = line.split(" ")
    done = python(
        "-c",
        _CODE,
        _CASCADE_COMPLETE="complete_bash",
        COMP_WORDS=line,
        COMP_CWORD=str(len(words) - 1),
    )
    assert done.err == "[]\n"
    return done.out.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cascade ana", ["analyze"]),
        ("cascade evaluate --perp", ["--perplexity-ratio"]),
        ("cascade evaluate --rule top", ["top2_gap"]),
        ("cascade analyze --dtype b", ["bfloat16"]),
        ("cascade generate --layer 2", ["29", "28", "27", "26", "25", "24", "23", "22", "21"]),
        ("cascade generate --model smollm2-360m --layer 32", ["32"]),
        ("cascade fit-heads --layers 24,30", ["24,30"]),
        ("cascade explain --layer 30", ["30+norm", "30"]),
    ],
)
def test_bash_completes_commands_options_and_values(line: str, expected: list[str]) -> None:
    found = completed(line)
    assert found[: len(expected)] == expected


def test_layers_of_a_local_model_come_from_its_config(models: Path) -> None:
    assert completion.num_layers(str(models / "tiny")) == 4
    assert completion.num_layers(str(models / "absent")) == 0


def test_completed_values_are_those_that_options_accept() -> None:
    assert list(completion.RULES) == list(RULES)
    assert {name for name, _ in completion.dtypes("")} == set(DTYPES)
    assert {name for name, _ in completion.models("")} == {*WHEELS, *HUB_NAMES}

"""The table of model families: what is stored of it, and its page (docs/reference/families.md)."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args

import transformers

from support.family_rows import FamilyRow, Result

#: How to renew the table and its page.
RENEW = "pytest tests/suites/test_families.py --force-regen"

_INTRODUCTION = """# Model families

Every causal language model of `transformers` {version} is built tiny with random weights, and
CASCADE is tried on it. This page is the result: {count} families, one row each.

| | families | what works |
| --- | --- | --- |
{counts}

What "works" means is checked for each family:

- **Measured**: the hidden states are those that the model itself returns with
  `output_hidden_states=True`, bit for bit; similarities differ from those in double precision by
  less than {close_cosine:g}. RWKV halves states between layers; there they are equal up to that
  factor. Where states are read out, logits are the model's, bit for bit.
- **Exits**: with a threshold of infinity, logits are the model's (up to the order of summation:
  {close:g} of the largest) and the text is the model's greedy text without a cache, also after
  padding on the left.
  With a threshold of minus infinity, logits are the exit head's. Generating a text gives the exits
  and predictions that scoring it gives. With `verify=True`, the text is the model's.
- **Skips work**: the layers compute exited tokens only as far as later tokens need them. Elsewhere
  every token is computed; the text is the same, but no time is saved.

A checkpoint can have other layers than the tiny model. `cascade analyze` makes the same checks of
shapes, layers and causality whenever it loads a model, and refuses what it cannot measure.

This page is made by `{renew}`.
"""

#: Result -> its title, what it means in the table of counts, and the heading of its last column.
_SECTIONS: dict[str, tuple[str, str, str]] = {
    "skips": (
        "Exits that skip work",
        "`analyze`, `gate`, early exit; exited tokens skip work",
        "limits",
    ),
    "exits": (
        "Exits without skipping",
        "`analyze`, `gate`, early exit; every token is computed",
        "why no work is skipped, and other limits",
    ),
    "measured": (
        "Measured only",
        "`analyze` and `gate`; tokens cannot exit",
        "why no token can exit",
    ),
    "refused": ("Refused", "nothing; the model is refused when it is loaded", "why"),
    "not built": (
        "Not built",
        "not tried; the tiny model could not be built",
        "what `transformers` needs or raises",
    ),
}
_FIELDS = [field.name for field in fields(FamilyRow)]


def read_table(path: Path) -> dict[str, FamilyRow]:
    """Return the stored rows by family."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [FamilyRow(**row) for row in csv.DictReader(_without_comments(file))]
    return {row.family: row for row in rows}


def _without_comments(lines: object) -> list[str]:
    return [line for line in lines if not line.startswith("#")]  # type: ignore[attr-defined]


def stored_version(path: Path) -> str:
    """Return the release of `transformers` that the stored rows are of."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.rpartition(" ")[2]


def write_table(path: Path, rows: Mapping[str, FamilyRow]) -> None:
    """Store rows, in the order of their families' names."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# transformers {transformers.__version__}\n")
        writer = csv.DictWriter(file, _FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(rows[family]) for family in sorted(rows))


def families_page(path: Path, *, close: float, close_cosine: float) -> str:
    """Return the page of the stored rows."""
    rows = read_table(path)
    groups = {
        result: [row for row in rows.values() if row.result == result]
        for result in get_args(Result)
    }
    counts = "\n".join(
        f"| [{title}](#{_anchor(title)}) | {len(groups[result])} | {meaning} |"
        for result, (title, meaning, _) in _SECTIONS.items()
    )
    page = _INTRODUCTION.format(
        version=stored_version(path),
        count=len(rows),
        counts=counts,
        close=close,
        close_cosine=close_cosine,
        renew=RENEW,
    )
    return page + "".join(_section(result, groups[result]) for result in groups)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _section(result: str, rows: list[FamilyRow]) -> str:
    title, _, why = _SECTIONS[result]
    exits = result in ("skips", "exits")
    heads = ["family", *(["propagation"] if exits else []), why]
    lines = [f"\n## {title}\n", _line(heads), _line(["---"] * len(heads))]
    for row in rows:
        middle = [row.propagation] if exits else []
        lines.append(_line([f"`{row.family}`", *middle, _short(row.reason)]))
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _short(reason: str) -> str:
    """Return a reason without the family's name and the remedy, which every row would repeat."""
    reason = re.sub(r"^tokens of \S+ cannot exit early: ", "", reason)
    reason = re.sub(
        r"; use `cascade analyze` and `cascade gate`, which measure this model$", "", reason
    )
    reason = re.sub(r"(^|; )\S+ layers have no separate", r"\1no separate", reason)
    return re.sub(r"([\[\]|<*_])", r"\\\1", reason)

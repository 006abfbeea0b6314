"""The glossary is in order, and has the names that reports and commands use for one thing each."""

from __future__ import annotations

import re
from typing import get_args, get_type_hints

import pytest
from support.paths import DOCS

from cascade.corpora.token_classes import CLASSES
from cascade.decoding.early_exit import Propagation
from cascade.evaluation.search.records import Outcome
from cascade.exits.rules import RULES
from cascade.gate.records import Attribution, Verdict
from cascade.studies.comparisons.altered_models import KINDS
from cascade.studies.comparisons.corpus_records import LayerVerdict, TransferVerdict
from cascade.studies.explanations.records import CauseVerdict

TEXT = (DOCS / "glossary.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ")]
#: Without the head of the table.
TERMS = [row.split(" | ")[0].strip("| ") for row in ROWS[1:]]

#: Answers that need no explanation.
_PLAIN = {"does not", "not supported", "not tried", "lost"}


def names() -> list[str]:
    """Return the names of rules, methods, copies, verdicts and causes, as users meet them."""
    verdicts = [
        *get_args(Verdict),
        *get_args(Outcome),
        *get_args(LayerVerdict),
        *get_args(TransferVerdict),
        *get_args(CauseVerdict),
    ]
    causes = get_args(get_type_hints(Attribution)["cause"])
    found = [*RULES, *get_args(Propagation), *KINDS, *CLASSES, *verdicts, *causes]
    return sorted(set(found) - _PLAIN)


def test_terms_are_in_alphabetical_order_and_unique() -> None:
    plain = [re.sub(r"[`+]", "", term).casefold() for term in TERMS]
    assert len(TERMS) > 90
    assert plain == sorted(set(plain))


@pytest.mark.parametrize("name", names())
def test_name_is_in_the_glossary(name: str) -> None:
    assert re.search(rf"(?<!\w){re.escape(name)}", TEXT, re.IGNORECASE)

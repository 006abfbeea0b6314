"""Every causal language model of `transformers`: what works with it is what the table says.

A release of `transformers` that adds or removes a family, or changes what works with one, turns a
test red.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support.families_page import RENEW, families_page, read_table, write_table
from support.family_configs import CAUSAL_FAMILIES
from support.family_rows import CLOSE, CLOSE_COSINE, row_of
from support.paths import DOCS

TABLE = Path(__file__).parent / "test_families" / "families.csv"
PAGE = DOCS / "reference/families.md"


def renews(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--force-regen", default=False))


def test_the_table_has_the_families_of_this_transformers_release(
    request: pytest.FixtureRequest,
) -> None:
    stored = read_table(TABLE)
    if renews(request):
        write_table(TABLE, {name: row for name, row in stored.items() if name in CAUSAL_FAMILIES})
        return
    new = sorted(set(CAUSAL_FAMILIES) - set(stored))
    gone = sorted(set(stored) - set(CAUSAL_FAMILIES))
    assert not new + gone, (
        f"transformers has new families ({', '.join(new) or 'none'}) and removed others"
        f" ({', '.join(gone) or 'none'}); renew the table with `{RENEW}`"
    )


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_family_works_as_the_table_says(family: str, request: pytest.FixtureRequest) -> None:
    stored = read_table(TABLE)
    if not renews(request) and family in stored:
        _, needs, package = stored[family].reason.partition("needs the package ")
        if needs and importlib.util.find_spec(package) is not None:
            pytest.skip(f"{package} is installed; the table was made without it")
    row = row_of(family)
    if renews(request):
        write_table(TABLE, stored | {family: row})
        return
    assert row == stored.get(family), f"renew the table with `{RENEW}`"


def test_the_page_shows_the_table(request: pytest.FixtureRequest) -> None:
    page = families_page(TABLE, close=CLOSE, close_cosine=CLOSE_COSINE)
    if renews(request):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page, f"renew the page with `{RENEW}`"

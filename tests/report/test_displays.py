"""Results show themselves: every table, figure and report of every kind of result."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.build_comparisons import foreign, moved, named
from support.build_profiles import a_profile
from support.html import Page, ids, svgs
from support.paths import DOCS
from support.reference_points import blocks_of
from support.stacks import a_stack
from support.tiny_models import random_ids
from support.tiny_stages import a_cascade

import cascade
from cascade.core.display import Displayed
from cascade.core.errors import UsageError
from cascade.corpora.blocks import TokenBlocks
from cascade.evaluation.exit_evaluation import EvaluationConfig, evaluate, split
from cascade.evaluation.records import EvaluationRecord
from cascade.gate.drift import compare
from cascade.gate.quick_gate import Gate
from cascade.report.displays import display_of
from cascade.saturation.profile import analyze
from cascade.stages.evaluation import evaluate_cascade

#: Kinds of records in docs/findings.
STORED = {
    "corpora": "corpus-comparison",
    "models": "model-comparison",
    "explanation": "explanation",
    "final-norm": "final-norm",
    "exit-search": "exit-search",
}


def _some_blocks() -> TokenBlocks:
    ids = random_ids(8, 16, seed=3).numpy().astype(np.int32)
    marks = np.ones_like(ids)
    return TokenBlocks(
        ids, "random", "random", 8, record_of=marks, response=marks > 0, record_split="held-out"
    )


@functools.cache
def _evaluation() -> EvaluationRecord:
    request = EvaluationConfig(layers=(2, 3), rules=("cosine",), hard_ratios=(0.5,))
    return evaluate(a_stack("llama"), *split(blocks_of(8, seed=1)), request, batch_size=4)


def _stored(name: str) -> Any:
    return cascade.read_record(DOCS / "findings" / f"{name}.json", kind=STORED[name])


MADE: dict[str, Callable[[], Any]] = {
    "profile": lambda: analyze(a_stack("llama"), _some_blocks()),
    "stored_profile": a_profile,
    "profile_record": lambda: a_profile().record(),
    "evaluation": _evaluation,
    "cascade_evaluation": lambda: evaluate_cascade(a_cascade("llama"), _some_blocks()),
    "comparison": lambda: compare(a_profile(seed=1), a_profile()),
    "gate": lambda: Gate(compare(a_profile(seed=1), a_profile()), (), 128, 1.5),
    "comparison_record": moved,
    "session_comparison": lambda: named(moved()),
    **{name.replace("-", "_"): functools.partial(_stored, name) for name in STORED},
}


@functools.cache
def made(name: str) -> Displayed:
    found: Displayed = MADE[name]()
    return found


@pytest.fixture(autouse=True)
def pyplot(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Draw without a screen, and close every figure."""
    import matplotlib as mpl
    from matplotlib import pyplot

    before = mpl.get_backend()
    pyplot.switch_backend("agg")
    yield pyplot
    pyplot.close("all")
    pyplot.switch_backend(before)


EVERY = pytest.mark.parametrize("name", MADE)


@EVERY
def test_every_table_has_a_row_for_each_of_its_parts(name: str) -> None:
    tables = display_of(*made(name)._to_show()).tables
    assert tables
    for table, rows in tables.items():
        frame = made(name).to_dataframe(table)
        assert len(frame) == len(list(rows)), table
        assert not [column for column in frame if column.endswith("interval")], table
    main = made(name).to_dataframe()
    assert len(main) > 0
    assert main.equals(made(name).to_dataframe(next(iter(tables))))


@EVERY
def test_every_figure_is_drawn_as_axes_that_pyplot_holds(name: str, pyplot: Any) -> None:
    from matplotlib.axes import Axes

    figures = display_of(*made(name)._to_show()).figures
    for number, figure in enumerate(figures, start=1):
        axes = np.atleast_1d(np.asarray(made(name).plot(figure), dtype=object))
        assert all(isinstance(panel, Axes) for panel in axes)
        assert len(pyplot.get_fignums()) == number
        assert any(panel.has_data() for panel in axes)
        assert axes[0].figure is pyplot.gcf()


@EVERY
def test_a_notebook_shows_the_report_with_its_figures(name: str) -> None:
    record, arrays = made(name)._to_show()
    report = display_of(record, arrays).report()
    page = made(name)._repr_html_()
    read = Page(page)
    assert not read.misnested
    assert not read.open
    assert report.title in read.texts
    assert len(svgs(page)) == len(report.pictures())
    assert [tag for tag, _ in read.tags].count("table") >= 1
    assert not {"script", "link", "html", "body"} & {tag for tag, _ in read.tags}
    # Every rule applies within the report alone, and every reference has one target.
    style = page[page.index("<style>") + len("<style>") : page.index("</style>")]
    selectors = re.findall(r"(?:\A\s*|[{}]\s*)([^{}@]+?)\s*\{", style)
    assert len(selectors) > 40
    assert all(".cascade-report" in part for found in selectors for part in found.split(","))
    assert "rem" not in style  # the page around it has its own root size
    every = [one for svg in svgs(page) for one in ids(svg)]
    assert len(every) == len(set(every))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', page)) <= set(every)


@EVERY
def test_a_result_is_one_readable_line_in_a_console(name: str) -> None:
    line = repr(made(name))
    assert re.fullmatch(r"<\w+: .+>", line)
    assert "\n" not in line
    assert len(line) < 500


def test_a_profile_says_model_corpus_and_what_was_found() -> None:
    profile = analyze(a_stack("llama"), _some_blocks())
    assert repr(profile).startswith(
        "<SaturationProfile: llama on random, 128 tokens, 4 layers; lowest mean similarity "
    )


def test_a_comparison_says_its_verdict() -> None:
    assert repr(moved()) == f"<ComparisonRecord: FAIL, {moved().headline}>"
    same = compare(a_profile(), a_profile())
    assert repr(same) == f"<Comparison: PASS, {same.headline()}>"


def test_intervals_become_two_columns() -> None:
    frame = _evaluation().to_dataframe("points")
    row = _evaluation().points[0]
    assert frame.loc[0, ["agreement_low", "agreement_high"]].tolist() == row.agreement_interval
    assert frame.loc[0, "exit_layer"] == row.exit_layer


def test_nested_values_have_joined_names() -> None:
    assert {"layer_similarity", "layer_low", "contrast_high"} <= {
        *made("explanation").to_dataframe("classes")
    }


def test_two_figures_on_one_page_share_no_id() -> None:
    first, second = (a_profile(seed=seed)._repr_html_() for seed in (0, 1))
    assert not set(ids(svgs(first)[0])) & set(ids(svgs(second)[0]))


def test_plots_are_drawn_in_the_reports_style_whatever_the_users_style_is(pyplot: Any) -> None:
    from cascade.report.common.svg import LIGHT

    with pyplot.style.context("dark_background"):
        axes: Any = a_profile().plot()
        axes.figure.canvas.draw()
        assert pyplot.rcParams["axes.facecolor"] == "black"
    assert axes.get_xticklabels()[0].get_color() == LIGHT["muted"]
    assert axes.spines["left"].get_edgecolor() == pyplot.matplotlib.colors.to_rgba(LIGHT["muted"])


def test_the_files_of_a_report_do_not_go_to_pyplot(pyplot: Any) -> None:
    _evaluation()._repr_html_()
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("show", "message"),
    [
        (
            lambda: made("evaluation").to_dataframe("layers"),
            "expected a table among points, auroc, got 'layers'",
        ),
        (
            lambda: made("evaluation").plot("layers"),
            "expected a figure among pareto, got 'layers'",
        ),
        (
            lambda: made("cascade_evaluation").plot(),
            "the record has no figure; use to_dataframe()",
        ),
        (
            lambda: foreign().plot(),
            "the record has nothing to draw as 'profiles'; use to_dataframe()",
        ),
    ],
)
def test_an_unknown_or_empty_choice_is_refused_with_the_known_ones(
    show: Callable[[], Any], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        show()
    assert str(error.value) == message


def test_without_pandas_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match=r"^to_dataframe\(\) needs pandas, .*`pip install pandas`"):
        made("evaluation").to_dataframe()


def test_the_reference_names_every_table_and_figure() -> None:
    page = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    rows = {
        cells[0].split("`")[1]: [re.findall(r"`([\w-]+)`", cell) for cell in cells[1:3]]
        for line in page.splitlines()
        if line.startswith("| `") and len(cells := line.strip("| ").split(" | ")) >= 3
    }
    for name in MADE:
        record, arrays = made(name)._to_show()
        shown = display_of(record, arrays)
        tables, figures = rows[_documented(name)]
        assert tables == list(shown.tables), name
        assert set(shown.figures) <= set(figures), name


def _documented(name: str) -> str:
    """Return the function that the reference documents a result under."""
    return {
        "profile": "analyze",
        "stored_profile": "analyze",
        "profile_record": "analyze",
        "evaluation": "evaluate",
        "cascade_evaluation": "evaluate_cascade",
        "comparison": "compare",
        "comparison_record": "compare",
        "gate": "compare",
        "session_comparison": "compare",
        "corpora": "compare_corpora",
        "models": "compare_models",
        "explanation": "explain",
        "final_norm": "explain_norm",
        "exit_search": "search_exits",
    }[name]

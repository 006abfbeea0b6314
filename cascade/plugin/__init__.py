"""The pytest plugin: options, markers, fixtures, and one report per session.

Importing this package imports only pytest, msgspec and the standard library, so it costs almost
nothing in a project that has CASCADE installed but does not use it.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cascade.core.errors import CascadeError, OutputError
from cascade.core.schema import to_plain
from cascade.core.urls import redacted
from cascade.gate.records import NamedComparison, SessionRecord
from cascade.plugin.github import annotation_lines
from cascade.plugin.results import REPORT_FILES, Findings, show_summary, write_reports
from cascade.plugin.settings import (
    MARKED_BY,
    MARKERS,
    WORKER_COPY,
    Settings,
    add_options,
    add_regeneration,
    check_markers,
    read_settings,
    register_markers,
    uses,
)

if TYPE_CHECKING:
    from cascade.models.stack import DecoderStack
    from cascade.plugin.budget_check import BudgetCheck
    from cascade.plugin.checks import SaturationCheck
    from cascade.plugin.measuring import MeasuredEvaluations, MeasuredProfile, ModelUnderTest


@dataclass(frozen=True)
class _Result:
    """The outcome of a session: its record, if any, and lines about the written reports."""

    record: SessionRecord | None
    lines: list[str]


_SETTINGS = pytest.StashKey[Settings]()
#: Whether any setting was given.
_GIVEN = pytest.StashKey[bool]()
_FINDINGS = pytest.StashKey[Findings]()
_RESULT = pytest.StashKey[_Result]()

#: Why a test's marker is invalid, if the session continues nevertheless.
_REFUSED = pytest.StashKey[str]()


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


# --- The start of a session ------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the options and ini keys."""
    add_options(parser)
    add_regeneration(parser, pluginmanager)


def pytest_configure(config: pytest.Config) -> None:
    """Check the settings and register the markers."""
    settings, given = read_settings(config)
    config.stash[_SETTINGS] = settings
    config.stash[_GIVEN] = given
    config.stash[_FINDINGS] = Findings()
    register_markers(config)
    if settings.report is not None and not _is_worker(config):
        # Fail before the tests if the report cannot be written.
        from cascade.core.files import check_writable

        try:
            check_writable(settings.report / REPORT_FILES[0])
        except OutputError as error:
            raise pytest.UsageError(f"--cascade-report: {error}") from error


def pytest_report_header(config: pytest.Config) -> str | None:
    """Return a line about the settings, if any was given."""
    return config.stash[_SETTINGS].describe() if config.stash[_GIVEN] else None


def pytest_report_collectionfinish(config: pytest.Config, items: Sequence[Any]) -> list[str]:
    """Return lines about the settings, if none was given, and about remote baselines.

    Nothing is said of them where no test needs them.
    """
    settings = config.stash[_SETTINGS]
    if not _are_needed(items):
        return []
    lines = [] if config.stash[_GIVEN] else [settings.describe()]
    return lines + ([] if config.getoption("collectonly") else _remote_lines(settings))


def _are_needed(items: Sequence[Any]) -> bool:
    return any(uses(item, name) for item in items for name in MARKED_BY.values())


def _remote_lines(settings: Settings) -> list[str]:
    """Return which version of remote baselines the session compares with, and what is amiss."""
    remote = settings.remote
    if remote is None or not remote.is_read:
        return []
    return [f"Baselines of {remote.copy.origin.in_words()}", *remote.notes()]


# --- Collection ------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the plugin's fixtures, before `-m` selects, and check markers."""
    for item in items:
        try:
            check_markers(item)
        except pytest.UsageError as error:
            if not _is_worker(item.config):
                raise
            # A worker of pytest-xdist that stops here loses the message, so the test fails instead.
            item.stash[_REFUSED] = str(error)


def _markers(item: pytest.Item) -> list[str]:
    return [name for name in MARKERS if item.get_closest_marker(name)]


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Record the markers of deselected tests."""
    for item in items:
        for name in _markers(item):
            item.config.stash[_FINDINGS].note_deselected(name)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Record which tests were selected, and read remote baselines if any test needs them."""
    config = session.config
    for item in session.items:
        for name in _markers(item):
            config.stash[_FINDINGS].note_selected(name, item.nodeid)
    if _is_worker(config) or config.getoption("collectonly") or not _are_needed(session.items):
        return
    try:
        config.stash[_SETTINGS].folder()
    except CascadeError as error:
        raise pytest.UsageError(f"--cascade-baselines: {error}") from error


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Read remote baselines once for all workers of pytest-xdist.

    A worker that has no copy tries again and says why not: here it would end sessions that compare
    nothing.
    """
    remote = node.config.stash[_SETTINGS].remote
    if remote is not None:
        with contextlib.suppress(CascadeError):
            node.workerinput[WORKER_COPY] = to_plain(remote.copy)


@pytest.hookimpl(trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Record which tests were run, without skipped ones."""
    if _REFUSED in item.stash:
        pytest.fail(item.stash[_REFUSED], pytrace=False)
    for name in _markers(item):
        item.config.stash[_FINDINGS].note_ran(name, item.nodeid)


# --- Fixtures --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cascade_model(pytestconfig: pytest.Config) -> DecoderStack:
    """The model under test, loaded once per session, as a `cascade.DecoderStack`."""
    from cascade.exits.history import exit_entries
    from cascade.models.loading import load
    from cascade.plugin.checks import nothing_compared
    from cascade.plugin.measuring import one_line

    settings = pytestconfig.stash[_SETTINGS]
    with one_line():
        try:
            stack = load(
                settings.model,
                revision=settings.revision,
                dtype=settings.dtype,
                device=settings.device,
            )
            if settings.exit_layer is not None:
                exit_entries(settings.exit_layer, stack.num_layers)
        except CascadeError as error:
            record = NamedComparison.of(
                nothing_compared(str(error)),
                name=settings.model,
                path=settings.place,
            )
            pytestconfig.stash[_FINDINGS].comparisons.append(record)
            raise
    return stack


def _model_under_test(request: pytest.FixtureRequest) -> ModelUnderTest:
    """Return the model of the fixture `cascade_model`, loaded on first use."""
    from cascade.plugin.measuring import ModelUnderTest

    # pytest has no public way to ask whether a fixture is overridden.
    defined = request._fixturemanager.getfixturedefs("cascade_model", request._pyfuncitem)
    return ModelUnderTest(
        load=lambda: request.getfixturevalue("cascade_model"),
        source=request.config.stash[_SETTINGS].model if len(defined or ()) == 1 else None,
    )


@pytest.fixture(scope="session")
def cascade_profile(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> MeasuredProfile:
    """The model's profile of its baseline's sequences; loaded and measured on first use."""
    from cascade.plugin.measuring import MeasuredProfile

    given = [redacted(str(part)) for part in pytestconfig.invocation_params.args]
    command = shlex.join(["pytest", *given])
    return MeasuredProfile(_model_under_test(request), pytestconfig.stash[_SETTINGS], command)


@pytest.fixture(scope="session")
def cascade_evaluation(
    request: pytest.FixtureRequest, pytestconfig: pytest.Config
) -> MeasuredEvaluations:
    """Evaluations of the budgeted operating points; loaded and measured on first use."""
    from cascade.plugin.measuring import MeasuredEvaluations

    return MeasuredEvaluations(_model_under_test(request), pytestconfig.stash[_SETTINGS])


@pytest.fixture
def saturation_baseline(request: pytest.FixtureRequest) -> SaturationCheck:
    """The stored baseline; `saturation_baseline.check(cascade_profile)` fails on drift."""
    from cascade.plugin.checks import SaturationCheck

    stash = request.config.stash
    return SaturationCheck(request.node, stash[_SETTINGS], stash[_FINDINGS])


@pytest.fixture
def exit_budget(request: pytest.FixtureRequest) -> BudgetCheck:
    """The stored budgets; `exit_budget.check(cascade_evaluation)` fails if one is exceeded."""
    from cascade.plugin.budget_check import BudgetCheck

    stash = request.config.stash
    return BudgetCheck(request.node, stash[_SETTINGS], stash[_FINDINGS])


# --- The end of a session --------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add the findings of a pytest-xdist worker."""
    text = getattr(node, "workeroutput", {}).get("cascade")
    if text is not None:
        node.config.stash[_FINDINGS].absorb(text)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the reports and annotations, or send the findings of a worker to the main process."""
    config = session.config
    findings = config.stash[_FINDINGS]
    if _is_worker(config):
        config.workeroutput["cascade"] = findings.dump()  # type: ignore[attr-defined]
        return
    settings = config.stash[_SETTINGS]
    # Baselines at an address can be those of other projects too.
    is_own = settings.remote is None
    unused = findings.unused(settings.baselines) if is_own and _is_whole(config) else []
    record = findings.record(unused)
    lines = list(findings.notes)
    if record is not None:
        try:
            lines += _remote_lines(settings) if settings.remote else _shipped_used(record)
            lines += [f"Wrote {path}" for path in write_reports(settings, record)]
        except CascadeError as error:
            lines += [f"No report: {error}"]
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
        lines += annotation_lines(record, strict=settings.strict)
    elif settings.report is not None and not config.getoption("collectonly"):
        lines += ["No report: no test compared anything with a baseline"]
    config.stash[_RESULT] = _Result(record, lines)


def _shipped_used(record: SessionRecord) -> list[str]:
    """Return one line for each baseline of the package that the session compared with."""
    if not record.comparisons:
        return []
    from cascade.gate.baseline_lookup import described, is_shipped

    paths = dict.fromkeys(Path(part.path) for part in record.comparisons)
    return [f"Baseline: {described(path)}" for path in paths if is_shipped(path)]


def _is_whole(config: pytest.Config) -> bool:
    """Return whether a session is meant to run every test, not only named ones."""
    named = config.args_source == config.ArgsSource.ARGS
    narrow = any("::" in text or text.endswith(".py") for text in config.args)
    return not (named and narrow) and not config.getoption("lf", default=False)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show the session's record."""
    result = config.stash.get(_RESULT, None)
    if result is not None and (result.record is not None or result.lines):
        show_summary(terminalreporter, result.record, result.lines)

"""Settings and markers: their precedence and validation."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from pathlib import Path

import pytest
from support.plugin_project import (
    BUDGETS,
    INI,
    SATURATION,
    failure,
    ran,
)

from cascade.corpora.readers import EMBEDDED
from cascade.decoding.early_exit import PROPAGATIONS
from cascade.models.checkpoints.weights import WHEELS
from cascade.models.loading import DTYPES
from cascade.plugin import settings
from cascade.plugin.settings import (
    BudgetOptions,
    SaturationOptions,
    Settings,
    budget_options,
    saturation_options,
)

# --- Settings -------------------------------------------------------------------------------------


def test_the_command_line_overrides_the_ini_file_and_the_header_shows_the_result(
    guarded: pytest.Pytester, models: Path
) -> None:
    ini = Path("pytest.ini")
    ini.write_text(ini.read_text() + "cascade_tokens = 40\ncascade_full = true\n")
    done = ran(guarded, "-m", "saturation", "-v")
    done.assert_outcomes(passed=1, deselected=1)
    done.stdout.fnmatch_lines(
        [
            f"cascade: {models / 'tiny'}, float32 on cpu; corpus texts.jsonl; baselines in "
            "baselines; whole corpus"
        ]
    )
    done = ran(
        guarded,
        *("-m", "saturation", "-o", "cascade_full=false", "--cascade-tokens", 33),
        *("--cascade-baselines", "elsewhere", "--cascade-exit-layer", 2, "--cascade-split", "a"),
    )
    done.assert_outcomes(failed=1, deselected=1)
    line = "*corpus texts.jsonl (a); baselines in elsewhere; quick gate of 33 tokens, exit layer 2"
    done.stdout.fnmatch_lines([line])


@pytest.fixture
def monorepo(guarded: pytest.Pytester, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project with a model of its own, and below it a package with files of the same names."""
    shutil.copytree(models / "tiny", "tiny")
    Path("baselines").rename("kept")
    Path("pytest.ini").write_text(INI.format(model="tiny") + "cascade_baselines = kept\n")
    package = guarded.path / "package"
    shutil.copytree(models / "other", package / "tiny")
    shutil.copy("texts.jsonl", package / "texts.jsonl")
    (package / "embedded").mkdir()
    (package / "smollm2-135m").mkdir()
    return package


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("package", [".."]),
        ("package", ["-c", "../pytest.ini", ".."]),
        ("package", ["--rootdir", ".", "-c", "../pytest.ini", ".."]),
        ("package", ["--cascade-model=../tiny", ".."]),
        ("/", ["{root}"]),
        (".", ["--rootdir", "package", "."]),
        ("package", ["-n1", "-pxdist", ".."]),
    ],
)
def test_ini_paths_are_relative_to_the_ini_file_from_every_folder(
    monorepo: Path,
    guarded: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    options: list[str],
) -> None:
    monkeypatch.chdir(guarded.path / folder)
    done = ran(guarded, "-m", "saturation", *(text.format(root=guarded.path) for text in options))
    done.assert_outcomes(passed=1, deselected=0 if "-n1" in options else 1)


def test_paths_on_the_command_line_are_relative_to_the_current_folder(
    monorepo: Path, guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(monorepo)
    done = ran(guarded, "-m", "saturation", "--cascade-model=tiny", "..")
    assert "NOT COMPARABLE: expected model.weights_hash" in failure(done)
    done = ran(guarded, "-m", "saturation", "--cascade-baselines", "kept", "..")
    assert failure(done).startswith("no baseline kept/tiny/texts.saturation.json")
    done = ran(guarded, "-m", "saturation", "--cascade-baselines", "../kept", "..")
    done.assert_outcomes(passed=1, deselected=1)


def test_short_names_are_no_paths(
    monorepo: Path, guarded: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(monorepo)
    assert set(settings._SHORT_NAMES) == {*WHEELS, EMBEDDED}
    ini = Path("pytest.ini")
    ini.write_text("[pytest]\ncascade_model = smollm2-135m\ncascade_corpus = embedded\n")
    done = ran(guarded, "--collect-only")
    done.stdout.fnmatch_lines(["cascade: smollm2-135m, float32 on cpu; corpus embedded; *"])


def test_baselines_are_regenerated_without_pytest_regressions(guarded: pytest.Pytester) -> None:
    without = ("-p", "no:regressions", "-m", "saturation")
    ran(guarded, *without, "--force-regen").assert_outcomes(passed=1, deselected=1)
    stored = next(Path("baselines").glob("*/*.saturation.json"))
    stored.unlink()
    assert "regenerated baselines/" in failure(ran(guarded, *without, "--force-regen"))
    stored.unlink()
    ran(guarded, *without, "--regen-all").assert_outcomes(passed=1, deselected=1)
    assert stored.exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--cascade-tokens=0", "expected --cascade-tokens to be a whole number of at least 1"),
        ("--cascade-tokens=many", "got 'many'"),
        ("--cascade-seq-len=1", "at least 2, got '1'"),
        ("--cascade-exit-layer=-3", "at least 1, got '-3'"),
        (
            "--cascade-dtype=int8",
            "expected --cascade-dtype to be one of float32, bfloat16, float16",
        ),
        ("--cascade-bos=maybe", "expected --cascade-bos to be one of auto, yes, no"),
        ("--cascade-model=", "expected a value for --cascade-model, got an empty one"),
        ("--cascade-report=texts.jsonl", "--cascade-report: cannot write"),
        ("-ocascade_tokens=1.5", "expected cascade_tokens to be a whole number of at least 1"),
    ],
)
def test_an_invalid_setting_is_refused_before_any_test(
    project: pytest.Pytester, option: str, words: str
) -> None:
    done = ran(project, option)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in done.errlines if "ERROR" in line]
    assert words in line
    assert "test_my_saturation" not in str(done.stdout)


def test_the_header_is_silent_in_other_projects(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(): pass")
    done = ran(pytester)
    done.assert_outcomes(passed=1)
    assert "cascade:" not in str(done.stdout)
    assert "= cascade =" not in str(done.stdout)
    # If a test needs the settings but none is given, the line appears after collection.
    pytester.makepyfile(SATURATION)
    done = ran(pytester, "--collect-only")
    done.stdout.fnmatch_lines(["cascade: smollm2-135m, float32 on cpu; corpus embedded; *"])


def test_items_of_other_plugins_are_ignored(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import pytest

        class Item(pytest.Item):
            def runtest(self): pass

        class File(pytest.File):
            def collect(self):
                yield Item.from_parent(self, name="item")

        def pytest_collect_file(parent, file_path):
            if file_path.suffix == ".txt":
                return File.from_parent(parent, path=file_path)
        """
    )
    pytester.maketxtfile("text")
    ran(pytester).assert_outcomes(passed=1)


def test_settings_and_options_match() -> None:
    names = [field.name for field in dataclasses.fields(Settings)]
    assert names == [*settings.HELP, "baselines_named", "remote"]
    # Repeated in `settings`, because these modules import torch.
    assert tuple(DTYPES) == settings.DTYPES
    assert PROPAGATIONS == settings.PROPAGATIONS


# --- Markers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        (
            "saturation(token=3)",
            "marker saturation has no argument 'token'; it accepts tokens, full",
        ),
        (
            "saturation(3)",
            "marker saturation takes no positional argument, got 3; it accepts tokens",
        ),
        ("saturation(tokens=0)", "expected tokens to be a whole number of at least 1, got 0"),
        ("saturation(tokens=True)", "expected tokens to be a whole number"),
        ("saturation(full=1)", "expected full to be True or False, got 1"),
        ("budgets(layer=3)", "marker budgets has no argument 'layer'; it accepts exit_layer, p"),
        ("budgets(propagation='melted')", "expected propagation to be one of frozen, ridge, exact"),
    ],
)
def test_an_invalid_marker_argument_is_refused_by_name(
    pytester: pytest.Pytester, marker: str, words: str
) -> None:
    pytester.makepyfile(f"import pytest\n@pytest.mark.{marker}\ndef test_it(): pass")
    done = ran(pytester, "--strict-markers")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in done.errlines if "ERROR" in line]
    assert f"::test_it: {words}" in line or f"::test_it: marker {marker[:7]}" in line
    assert words in line
    assert done.parseoutcomes() == {}


def test_markers_are_registered_and_added_to_tests_that_use_a_fixture(
    pytester: pytest.Pytester,
) -> None:
    done = ran(pytester, "--markers")
    done.stdout.fnmatch_lines(
        ["@pytest.mark.saturation(tokens, full, strict): *", "@pytest.mark.budgets(exit_layer, *"]
    )
    pytester.makepyfile(
        f"""
        import pytest
        {textwrap.indent(SATURATION, " " * 8).strip()}
        {textwrap.indent(BUDGETS, " " * 8).strip()}
        @pytest.mark.saturation
        @pytest.mark.budgets(exit_layer=3)
        def test_marked(): pass

        def test_other(): pass
        """
    )
    for expression, count in (("saturation", 2), ("budgets", 2), ("not saturation", 2)):
        done = ran(pytester, "--strict-markers", "--collect-only", "-q", "-m", expression)
        assert len([line for line in done.outlines if "::test_" in line]) == count


def test_the_closest_marker_takes_precedence(pytester: pytest.Pytester) -> None:
    items = pytester.getitems(
        """
        import pytest

        pytestmark = pytest.mark.saturation(tokens=1, strict=True)

        @pytest.mark.saturation(tokens=2)
        class TestIt:
            @pytest.mark.saturation(full=True)
            def test_it(self): pass
        """
    )
    (item,) = items
    given = Settings(exit_layer=3)
    assert saturation_options(item, given) == SaturationOptions(tokens=2, full=True, strict=True)
    assert budget_options(item, given) == BudgetOptions(exit_layer=3, propagation=None)

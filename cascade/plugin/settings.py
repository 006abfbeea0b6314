"""Settings and markers of the plugin, checked before any test runs.

The command line takes precedence over the ini file, and the ini file over the defaults.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cascade.core.names import hidden_hub_id, path_flaw
from cascade.core.urls import is_url, redacted

if TYPE_CHECKING:
    from cascade.core.schema import UnsetType
    from cascade.gate.baseline_corpus import GivenCorpus
    from cascade.gate.remote.baselines import RemoteBaselines
    from cascade.gate.remote.records import RemoteOrigin

#: Where a session of pytest-xdist gives its workers what it read of remote baselines.
WORKER_COPY = "cascade_baselines_copy"


@dataclass(frozen=True)
class Settings:
    """What is measured, and which baselines it is compared with.

    Attributes:
        model: `smollm2-135m`, a hub id, a local folder, or a `.gguf` file.
        revision: The revision of a hub model.
        corpus: `embedded`, a file, or a hub dataset.
        split: The split of a hub dataset or of the embedded corpus.
        text_column: Column to read, a name or dotted path (default: by the form of the records).
        bos: Whether texts and sequences begin with BOS, "auto", "yes" or "no"; None for the
            baseline's.
        seq_len: Tokens per sequence; None for the baseline's.
        num_samples: Records of a new baseline, 0 for all; None for the default of
            `cascade analyze`, but never fewer than the previous baseline had.
        exit_layer: The exit layer of the product; budgets of other layers are ignored.
        baselines: The folder of all baselines; of those at an address, the copy in the cache.
        dtype: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", "mps" or "auto".
        tokens: The budget of the quick gate.
        full: Whether to measure the whole corpus.
        prefill_only: Whether decoding with the KV cache is not checked.
        no_long_context: Whether long sequences are not checked.
        strict: Whether an inconclusive verdict fails.
        report: The folder for the reports.
        baselines_named: Whether the user named the folder of all baselines. If not, a baseline that
            the project lacks is looked up among those that ship with the package.
        remote: The baselines at an address, if the user named one.
    """

    model: str = "smollm2-135m"
    revision: str | None = None
    corpus: str = "embedded"
    split: str | None = None
    text_column: str | None = None
    bos: str | None = None
    seq_len: int | None = None
    num_samples: int | None = None
    exit_layer: int | None = None
    baselines: Path = Path("baselines")
    dtype: str = "float32"
    device: str = "cpu"
    tokens: int = 512
    full: bool = False
    prefill_only: bool = False
    no_long_context: bool = False
    strict: bool = False
    report: Path | None = None
    baselines_named: bool = False
    remote: RemoteBaselines | None = None

    def folder(self) -> Path:
        """Return the folder of all baselines; of those at an address, the copy is read first.

        Raises:
            CascadeError: The address cannot be read.
        """
        if self.remote is not None:
            self.remote.read()
        return self.baselines

    def name_of(self, path: Path) -> str:
        """Return the name of a baseline for people and records: its path, or its address."""
        return shown(path) if self.remote is None else self.remote.name_of(path)

    def origin(self) -> RemoteOrigin | UnsetType:
        """Return the address and revision of remote baselines; absent for local ones."""
        if self.remote is None:
            from cascade.core.schema import UNSET

            return UNSET
        return self.remote.copy.origin

    def checked(self, path: Path) -> Path:
        """Return the path of a baseline, unless the newest version at an address was refused.

        Raises:
            CascadeError: It was refused, or the address cannot be read.
        """
        return path if self.remote is None else self.remote.checked(path)

    def find_baseline(
        self, kind: str, *, model: str | None, corpus: str | None, source: str | None = None
    ) -> Path:
        """Return the path of a baseline, which need not exist.

        Args:
            kind: "saturation" or "budgets".
            model: The name of the model.
            corpus: The name of the corpus.
            source: The source that the model was loaded from; None if the project loads its own.

        Raises:
            CascadeError: A name is missing, several baselines fit, or the address of remote ones
                cannot be read.
        """
        from cascade.gate.baseline_lookup import Sought, find_baseline

        folder = self.folder()
        found = find_baseline(
            folder if self.baselines_named else None,
            kind,
            model=model,
            corpus=corpus,
            local=folder,
            sought=Sought(source, self.corpus, self.dtype, self.given_corpus().options()),
        )
        return self.checked(found)

    def given_corpus(self) -> GivenCorpus:
        """Return the corpus options that were given; a baseline's record has the others."""
        from cascade.gate.baseline_corpus import GivenCorpus

        return GivenCorpus(
            source=self.corpus,
            seq_len=self.seq_len,
            split=self.split,
            text_column=self.text_column,
            bos=self.bos,
        )

    def describe(self) -> str:
        """Return one line for the header of a test session."""
        model = f"{self.model}@{self.revision}" if self.revision else self.model
        corpus = f"{self.corpus} ({self.split})" if self.split else self.corpus
        gate = "whole corpus" if self.full else f"quick gate of {self.tokens} tokens"
        layer = f", exit layer {self.exit_layer}" if self.exit_layer else ""
        notes = (
            hidden_hub_id(source, kind)
            for source, kind in ((self.model, "model"), (self.corpus, "dataset"))
        )
        hidden = "".join(f"; {note}" for note in notes if note is not None)
        return (
            f"cascade: {model}, {self.dtype} on {self.device}; corpus {corpus}; baselines in "
            f"{self.place}; {gate}{layer}{hidden}"
        )

    def command(self, name: str, *more: str) -> str:
        """Return the `cascade` command line with the same settings.

        Args:
            name: "analyze", "gate" or "evaluate".
            more: Further arguments.
        """
        given = [
            ("--model", self.model),
            ("--revision", self.revision),
            ("--corpus", self.corpus if self.corpus != "embedded" else None),
            ("--split", self.split),
            ("--text-column", self.text_column),
            ("--bos", self.bos),
            ("--seq-len", self.seq_len),
            ("--num-samples", self.num_samples if name != "evaluate" else None),
            ("--dtype", self.dtype if self.dtype != "float32" else None),
            ("--device", self.device if self.device != "cpu" else None),
        ]
        parts = [str(part) for pair in given if pair[1] is not None for part in pair]
        return shlex.join(["cascade", name, *parts, *more])

    @property
    def place(self) -> str:
        """The folder of all baselines, or its address."""
        return shown(self.baselines) if self.remote is None else self.remote.url

    def accept_command(self) -> str:
        """Return the command line that stores a reviewed run, and pushes it to an address."""
        local = "baselines" if self.remote is not None else shown(self.baselines)
        accept = shlex.join(["cascade", "accept", "RUN", "--baselines", local])
        push = None if self.remote is None else self.remote.push_command
        return accept if push is None else f"{accept} && {push}"


def shown(path: Path) -> str:
    """Return a path relative to the current folder if it is inside, else unchanged."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


#: Name of a setting -> its help text.
HELP = {
    "model": "smollm2-135m, a hub id, a local folder or a .gguf file (default: smollm2-135m)",
    "revision": "revision of a hub model (default: the newest)",
    "corpus": "embedded, a hub dataset, a file, or a folder (default: embedded)",
    "split": "split of a hub dataset or of the embedded corpus (default: all)",
    "text_column": "column to read, such as body or meta.text (default: by the form of records)",
    "bos": "auto, yes or no: begin texts and sequences with BOS (default: as the baseline's; for a "
    "new one, if the tokenizer does)",
    "seq_len": "tokens per sequence (default: the baseline's, 128 for a new one)",
    "num_samples": "records of a new baseline, 0 for all (default: 500)",
    "exit_layer": "exit layer of the product; ignore budgets of other layers (default: all layers)",
    "baselines": "folder of all baselines, or its address, such as hf://datasets/ORG/NAME "
    "(default: baselines in the rootdir, then those shipped with cascade)",
    "dtype": "float32, bfloat16 or float16 (default: float32)",
    "device": "cpu, cuda, mps or auto (default: cpu)",
    "tokens": "maximum number of tokens for the quick gate (default: 512)",
    "full": "measure the whole corpus instead of the quick gate",
    "prefill_only": "do not check decoding with the KV cache",
    "no_long_context": "do not check a long sequence",
    "strict": "fail inconclusive checks too",
    "report": "folder for report.json, report.md and report.html",
}
_FLAGS = ("full", "prefill_only", "no_long_context", "strict")
_PATHS = ("baselines", "report")
#: Settings that can be a path, possibly relative to the ini file.
_SOURCES = ("model", "corpus")
#: Models and corpora that no file replaces. Repeated here, because importing them takes longer.
_SHORT_NAMES = ("smollm2-135m", "embedded")
#: Integer settings and their smallest valid value.
_COUNTS = {"seq_len": 2, "num_samples": 0, "exit_layer": 1, "tokens": 1}
#: Repeated here, because importing them from `cascade.models.loading` would import torch.
DTYPES = ("float32", "bfloat16", "float16")
_CHOICES = {"dtype": DTYPES, "bos": ("auto", "yes", "no")}


#: Options of pytest-regressions that the checks follow, with their help where it is not loaded.
REGENERATION = {
    "--force-regen": "store baselines that no longer hold again, and fail for a review",
    "--regen-all": "store all baselines again",
}


def add_regeneration(parser: pytest.Parser, manager: pytest.PytestPluginManager) -> None:
    """Add the options of pytest-regressions where that plugin will not be loaded."""
    names = ("pytest_regressions", "pytest_regressions.plugin", "regressions")
    blocked = any(manager.is_blocked(name) for name in names)
    if find_spec("pytest_regressions") is not None and not blocked:
        return
    group = parser.getgroup("cascade")
    for option, text in REGENERATION.items():
        group.addoption(option, action="store_true", default=False, help=text)


def add_options(parser: pytest.Parser) -> None:
    """Add every setting as an option `--cascade-NAME` and as an ini key `cascade_NAME`."""
    group = parser.getgroup("cascade", "cascade: compare a language model with its baselines")
    for name, text in HELP.items():
        flag = f"--cascade-{name.replace('_', '-')}"
        if name in _FLAGS:
            group.addoption(flag, action="store_true", default=None, help=text)
            parser.addini(f"cascade_{name}", text, type="bool", default=None)
        else:
            metavar = name.rpartition("_")[2].upper()
            group.addoption(flag, default=None, metavar=metavar, help=text)
            parser.addini(f"cascade_{name}", text, type="string", default=None)


def read_settings(config: pytest.Config) -> tuple[Settings, bool]:
    """Return the settings of a session, and whether any of them was given.

    Raises:
        pytest.UsageError: An invalid value.
    """
    found: dict[str, Any] = {}
    for name in HELP:
        value, base = config.getoption(f"cascade_{name}"), config.invocation_params.dir
        option = f"--cascade-{name.replace('_', '-')}"
        if value is None:
            value, option = config.getini(f"cascade_{name}"), f"cascade_{name}"
            base = config.inipath.parent if config.inipath else config.rootpath
        if value is None:
            continue
        found[name] = _read(name, value, option, base)
    given = bool(found)
    found["baselines_named"] = "baselines" in found
    if isinstance(found.get("baselines"), str):
        found["remote"] = _remote(found["baselines"], config)
        found["baselines"] = found["remote"].folder
    found.setdefault("baselines", _root(config) / "baselines")
    return Settings(**found), given


def _remote(url: str, config: pytest.Config) -> RemoteBaselines:
    """Return the baselines at an address. A worker of pytest-xdist uses what its session read."""
    from cascade.core.schema import from_plain
    from cascade.gate.remote.baselines import RemoteBaselines
    from cascade.gate.remote.records import BaselinesCopy

    told = getattr(config, "workerinput", {}).get(WORKER_COPY)
    return RemoteBaselines(url, None if told is None else from_plain(told, BaselinesCopy))


def _root(config: pytest.Config) -> Path:
    """Return the project's folder.

    Without an ini file, pytest's rootdir is the common folder of all paths on the command line,
    including `--cascade-model ./checkpoint`, because pytest does not know options of plugins yet.
    """
    known = config.inipath is not None or (config.rootpath / "setup.py").is_file()
    return config.rootpath if known else config.invocation_params.dir


def _read(name: str, value: Any, option: str, base: Path) -> Any:
    if name in _FLAGS:
        return bool(value)
    if not str(value).strip():
        raise pytest.UsageError(f"expected a value for {option}, got an empty one")
    if name == "baselines" and is_url(value):
        return value
    if name in _PATHS:
        flaw = f"expected a local path, got {redacted(value)}" if is_url(value) else None
        flaw = flaw or path_flaw(value)
        if flaw is not None:
            raise pytest.UsageError(f"{flaw} for {option}; name another folder")
        return base / os.path.expanduser(value)
    if name in _SOURCES and value not in _SHORT_NAMES:
        # Next to the ini file first: the current folder may have something else of that name.
        place = os.path.join(base, os.path.expanduser(value))
        return shown(Path(os.path.normpath(place))) if os.path.exists(place) else value
    if name in _CHOICES and value not in _CHOICES[name]:
        choices = ", ".join(_CHOICES[name])
        raise pytest.UsageError(f"expected {option} to be one of {choices}, got {value}")
    if name in _COUNTS:
        return _count(value, option, _COUNTS[name])
    return value


def _count(value: str, option: str, least: int) -> int:
    if not value.isascii() or not value.isdecimal() or int(value) < least:
        raise pytest.UsageError(
            f"expected {option} to be a whole number of at least {least}, got {value!r}"
        )
    return int(value)


# --- Markers ---------------------------------------------------------------------------------

PROPAGATIONS = ("frozen", "ridge", "exact")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


#: Marker -> its arguments, each with the expected value in words and a check.
MARKERS: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "saturation": {
        "tokens": ("a whole number of at least 1", _is_count),
        "full": ("True or False", _is_flag),
        "strict": ("True or False", _is_flag),
    },
    "budgets": {
        "exit_layer": ("a whole number of at least 1", _is_count),
        "propagation": (f"one of {', '.join(PROPAGATIONS)}", lambda value: value in PROPAGATIONS),
    },
}
#: Marker -> the fixture whose users get the marker.
MARKED_BY = {"saturation": "saturation_baseline", "budgets": "exit_budget"}
_ABOUT = {
    "saturation": "compare the model's saturation profile with its baseline",
    "budgets": "check early exit against its stored budgets of quality and speed",
}


def register_markers(config: pytest.Config) -> None:
    """Register the two markers, for `--markers` and `--strict-markers`."""
    for name, arguments in MARKERS.items():
        config.addinivalue_line("markers", f"{name}({', '.join(arguments)}): {_ABOUT[name]}")


def uses(item: pytest.Item, fixture: str) -> bool:
    """Return whether a test uses a fixture; items of other plugins may have no fixtures."""
    return fixture in getattr(item, "fixturenames", ())


def check_markers(item: pytest.Item) -> None:
    """Mark a test that uses one of the plugin's fixtures, and check the arguments of its markers.

    Raises:
        pytest.UsageError: An unknown argument or an invalid value.
    """
    for name, known in MARKERS.items():
        if uses(item, MARKED_BY[name]) and not any(item.iter_markers(name)):
            item.add_marker(name)
        for marker in item.iter_markers(name):
            place = f"{item.nodeid}: marker {name}"
            if marker.args:
                raise pytest.UsageError(
                    f"{place} takes no positional argument, got {marker.args[0]!r}; it accepts "
                    f"{', '.join(known)}"
                )
            for argument, value in marker.kwargs.items():
                if argument not in known:
                    raise pytest.UsageError(
                        f"{place} has no argument {argument!r}; it accepts {', '.join(known)}"
                    )
                words, fits = known[argument]
                if not fits(value):
                    raise pytest.UsageError(
                        f"{place}: expected {argument} to be {words}, got {value!r}"
                    )


@dataclass(frozen=True)
class SaturationOptions:
    """Options of a profile check: the test's marker arguments, else the session's settings."""

    tokens: int
    full: bool
    strict: bool


@dataclass(frozen=True)
class BudgetOptions:
    """Options of a budget check: the test's marker arguments, else the session's settings."""

    exit_layer: int | None
    propagation: str | None


def saturation_options(item: pytest.Item, settings: Settings) -> SaturationOptions:
    """Return the options of a test's profile check; the closest marker takes precedence."""
    given = _marked(item, "saturation")
    return SaturationOptions(
        tokens=given.get("tokens", settings.tokens),
        full=given.get("full", settings.full),
        strict=given.get("strict", settings.strict),
    )


def budget_options(item: pytest.Item, settings: Settings) -> BudgetOptions:
    """Return the options of a test's budget check; the closest marker takes precedence."""
    given = _marked(item, "budgets")
    return BudgetOptions(
        exit_layer=given.get("exit_layer", settings.exit_layer),
        propagation=given.get("propagation"),
    )


def _marked(item: pytest.Item, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for marker in item.iter_markers(name):
        found = dict(marker.kwargs) | found
    return found

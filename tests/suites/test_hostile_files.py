"""Files of strangers: no pipe is waited for, no size is believed, and no name steers anything."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from support.commands import Run, check_refusal
from support.paths import BASELINES, DOCS

import cascade
from cascade import CascadeError
from cascade.core.errors import OutputError, RecordError
from cascade.core.files import sha256_of, xxh3_of
from cascade.core.printable import printable
from cascade.core.reading import UnreadableError, read_arrays
from cascade.core.records import packed, read_plain, sealed, typed
from cascade.core.schema import from_plain
from cascade.corpora.readers import read_records
from cascade.gate.baselines import baseline_paths
from cascade.record_kinds import read_record, record_type
from cascade.report.common.sections import Bars, Pairs, Report, Section, markdown, print_sections
from cascade.report.common.sections import Table as SectionTable
from cascade.report.common.svg import as_svg, new_figure, plain_style
from cascade.stages.trainer.checkpoints import _flaw_of

#: A text with escapes, C1 controls, overrides of direction, line ends and markup.
EVIL = '\x1b]8;;http://x\x07\x9b2J\u202e\r\n<b>&"$x^$|\u2028\x00'


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


PLANTED = {"a pipe": _pipe, "a device": _device, "a circle of links": _circle, "1 TB": _huge}

#: What reads a file of this name.
READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": lambda path: cascade.load(path.parent),
    "tokenizer.json": lambda path: cascade.load(path.parent),
    "model.safetensors": lambda path: cascade.load(path.parent),
    "model.gguf": cascade.load,
    "profile.npz": read_arrays,
    "heads.safetensors": lambda path: cascade.load_heads(path, None),  # type: ignore[arg-type]
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes and no /dev/zero")
@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("name", READERS)
def test_a_name_of_a_stored_file_that_is_none_is_refused_at_once(
    folder: Path, name: str, planted: str
) -> None:
    (folder / name).unlink(missing_ok=True)
    PLANTED[planted](folder / name)
    with pytest.raises((CascadeError, UnreadableError)) as caught:
        READERS[name](folder / name)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes and no /dev/zero")
@pytest.mark.parametrize("hash_of", [xxh3_of, sha256_of])
@pytest.mark.parametrize("planted", ["a pipe", "a device"])
def test_a_hash_reads_regular_files_only(
    tmp_path: Path, planted: str, hash_of: Callable[[Path], str]
) -> None:
    PLANTED[planted](tmp_path / "file")
    with pytest.raises(OSError, match="expected a regular file"):
        hash_of(tmp_path / "file")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no /dev/zero")
def test_a_corpus_is_no_device_and_no_zeros(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="expected a corpus in a file, a folder or a pipe"):
        read_records("/dev/zero", split=None, config=None, stream=False)
    (tmp_path / "zeros.jsonl").write_bytes(bytes(10_000))
    with pytest.raises(CascadeError, match="got bytes of zero"):
        list(read_records(str(tmp_path / "zeros.jsonl"), split=None, config=None, stream=False))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_arrays_are_stored_or_deflated(tmp_path: Path, method: int) -> None:
    """The other methods give all of a bomb before its size is compared."""
    with zipfile.ZipFile(io.BytesIO(packed({"a": [1.0]}))) as whole:  # type: ignore[dict-item]
        content = whole.read("a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(UnreadableError, match="stored or deflated"):
        read_arrays(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors"])
def test_an_index_names_weights_in_its_folder(folder: Path, name: str) -> None:
    shutil.move(folder / "model.safetensors", folder.parent)
    name = str(folder.parent / "model.safetensors") if name.startswith("/") else name
    index = json.dumps({"weight_map": {"lm_head.weight": name}})
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CascadeError, match="to name files in its folder"):
        cascade.load(folder)


def test_a_seal_of_a_checkpoint_holds_a_hash_of_every_file(tmp_path: Path) -> None:
    names = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    for name in (*names, "trainer_state.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "cascade.json").write_text('{"../elsewhere": "0"}')
    assert _flaw_of(tmp_path) == "model.safetensors was changed after it was written"


@pytest.mark.parametrize(
    "name", ["a\x00b", "a\ud800", "x" * 300, "con", "a.", "a ", "a\nb", "..", "a/b", "a:b", ""]
)
def test_a_name_of_a_baseline_is_valid_on_every_system(name: str) -> None:
    with pytest.raises(RecordError):
        baseline_paths(Path("baselines"), "saturation", model=name, corpus="texts")
    with pytest.raises(RecordError):
        baseline_paths(Path("baselines"), "saturation", model="tiny", corpus=name)


@pytest.mark.parametrize(
    "arguments",
    [
        ("accept", "x" * 300),
        ("accept", "run", "--baselines", "x" * 300),
        ("compare", "y/" * 3000, "run"),
        ("history", "x" * 300),
        ("history", "y/" * 3000),
        ("generate", "--model", "tiny", "--prompt", "x", "--heads", "x" * 100_000),
        ("generate", "--model", "tiny", "--prompt", "x", "--stop", "\udcff"),
        ("analyze", "--model", "x" * 300),
        ("train", "--model", "tiny", "--output", "\udcff"),
        ("collect-hard", "--model", "tiny", "--output", "\udcff", "--hard-ratio", "0.5"),
        ("accept", "run", "--name", "a/b\x1b"),
    ],
)
def test_a_path_that_no_file_can_have_is_refused_in_one_line(
    run: Run, arguments: tuple[str, ...]
) -> None:
    check_refusal(run(*arguments), [])


def test_a_shell_without_completion_is_no_drift(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer._completion_shared._get_shell_name", lambda: None, raising=False)
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: None, raising=False)
    assert run("--show-completion").status == 2


# --- Records whose entries contradict each other, under a valid hash --------------------------

FINDINGS = {"corpora": "corpus-comparison", "models": "model-comparison"} | {
    "exit-search": "exit-search"
}

EDITS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a point": ("exit-search", lambda r: r.update(nearest=10**12), "points at nearest"),
    "a point of a pair": (
        "exit-search",
        lambda r: r["pairs"][0].update(kept=10**12),
        r"points at pairs\[0\].kept",
    ),
    "a source": ("exit-search", lambda r: r["points"][0].update(source=7), "sources at source"),
    "an exit layer": ("exit-search", lambda r: r["points"][0].update(exit_layer=99), "layers of"),
    "a label twice": ("corpora", lambda r: r["corpora"][1].update(label="A"), "once"),
    "a corpus": ("corpora", lambda r: r["differences"][0].update(corpus="Z"), "a corpus of"),
    "a row of a layer": ("corpora", lambda r: r["differences"][0]["rows"].pop(), "every layer"),
    "a mean": ("corpora", lambda r: r["layers"][0]["means"].pop(), "means for every layer"),
    "a label of a model": ("models", lambda r: r["models"][0].update(label="AB"), "one letter"),
    "a model": ("models", lambda r: r["pairs"][0].update(model="Z"), "a model of"),
    "a dip": ("models", lambda r: r["models"][0]["structure"].update(dips=["99"]), "a layer of"),
    "a mover": (
        "models",
        lambda r: r["pairs"][0]["paired"].update(largest_mover="99"),
        "a layer of",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_entries_that_contradict_each_other_are_refused(tmp_path: Path, name: str) -> None:
    record, edit, message = EDITS[name]
    plain = json.loads((DOCS / f"findings/{record}.json").read_text())
    edit(plain)
    (tmp_path / "record.json").write_text(json.dumps(sealed(plain)))
    with pytest.raises(RecordError, match=message):
        read_record(tmp_path / "record.json", kind=FINDINGS[record])


PROFILE_EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "the exit layer": (lambda r: r["thresholds"].update(exit_layer="99"), "a layer of"),
    "a dip": (lambda r: r["structure"].update(dips=["99"]), "a layer of"),
    "a threshold": (
        lambda r: r["thresholds"]["by_hard_ratio"][0].update(threshold=7.0),
        r"thresholds in -1..1",
    ),
    "the noise": (lambda r: r["noise"].update(repeat=1e308), r"in 0..2"),
    "negative noise": (lambda r: r["noise"].update(exact=-1.0), r"in 0..2"),
}


@pytest.mark.parametrize("name", PROFILE_EDITS)
def test_a_profile_names_its_own_layers_and_possible_similarities(name: str) -> None:
    kind: Any = record_type("saturation")
    path = BASELINES / "smollm2-135m-instruct-q4_1/embedded.saturation.json"
    plain = read_plain(path, kind)
    edit, message = PROFILE_EDITS[name]
    edit(plain)
    with pytest.raises(RecordError, match=message):
        typed(plain, kind, path)


# --- Stored text that would steer a terminal --------------------------------------------------


def _steers(text: str) -> bool:
    return printable(text, keep="\n\t") != text


def test_an_error_is_one_line_that_steers_nothing() -> None:
    for kind in (CascadeError, RecordError, OutputError):
        message = str(kind(f"no {EVIL} here"))
        assert "\n" not in message
        assert not _steers(message)


def test_a_name_steers_neither_repr_nor_report() -> None:
    path = DOCS / "findings/exit-search.json"
    plain = json.loads(path.read_text())
    plain["provenance"]["model"]["name"] = EVIL
    shown = repr(from_plain(plain, record_type("exit-search")))
    assert not _steers(shown)
    assert "\n" not in shown


def test_every_block_of_a_report_spells_controls_out() -> None:
    blocks = (
        EVIL,
        f"run `{EVIL}` again",
        Pairs(((EVIL, EVIL),)),
        Bars(((EVIL, 0.5, EVIL),)),
        SectionTable(EVIL, (EVIL, EVIL), ((EVIL, EVIL),), text_columns=1),
    )
    report = Report(EVIL, EVIL, EVIL, (Section(EVIL, blocks),), None)
    out = io.StringIO()
    print_sections(report, Console(file=out, width=100))
    assert not _steers(out.getvalue())
    assert not _steers(markdown(report))


@pytest.mark.filterwarnings("error")
def test_a_name_in_a_legend_is_no_formula_and_makes_valid_xml() -> None:
    with plain_style():
        figure = new_figure((4, 3))
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], label=EVIL)
        axes.set_title(EVIL)
        axes.text(0.5, 0.5, EVIL)
        figure.legend()
        svg = as_svg(figure, "figure", EVIL)
    assert not _steers(svg)
    texts = "".join(ElementTree.fromstring(svg).itertext())
    assert "$x^$" in texts

"""Test saving and loading cascades, and the errors of broken folders."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.disk import contents, largest_file
from support.records import edit_sealed
from support.reference_early_exit import (
    ALL_FAMILIES,
    a_bf16_stack,
    a_stack,
    one_line,
    own_logits,
    random_blocks,
    some_heads,
)
from support.tiny_models import tiny_model
from support.tiny_stages import (
    TEXT,
    a_cascade,
    a_moved_stage,
    ends,
    logits_of,
    share_of,
)
from transformers import AutoModelForCausalLM

from cascade.core.errors import (
    CascadeError,
    ModelError,
    OutputError,
    RecordError,
    UsageError,
)
from cascade.exits.head_fitting import fit_heads
from cascade.models.stack import DecoderStack
from cascade.stages import saved_cascades
from cascade.stages.cascades import Cascade
from cascade.stages.entries import Entry
from cascade.stages.records import (
    CascadeProvenance,
    StageProvenance,
)
from cascade.stages.saved_cascades import CONFIG

INF = math.inf


def a_saved_cascade(stack: DecoderStack, folder: Path, **about: Any) -> Cascade:
    cascade = Cascade(stack, propagation="exact", provenance=CascadeProvenance(command="by hand"))
    first = a_moved_stage(stack, 2)
    first.provenance = StageProvenance(steps=7)
    heads = some_heads("llama")
    cascade.add_stage(first, Entry(2, share_of(stack, TEXT, 2), heads=heads))
    second = a_moved_stage(cascade.stack, 1, start="fresh", own_head=True)
    cascade.add_stage(second, Entry(5, 0.0))
    cascade.save_pretrained(folder, **about)
    return cascade


def check_same(one: Cascade, other: Cascade) -> None:
    assert other.propagation == one.propagation
    assert other.provenance == one.provenance
    pairs = list(zip(one.stages, other.stages, strict=True))
    for a, b in pairs:
        assert (a.fingerprint(), a.start, a.sources) == (b.fingerprint(), b.start, b.sources)
        assert (a.provenance, a.head is None) == (b.provenance, b.head is None)
    for mine, read in zip(one.stage_entries, other.stage_entries, strict=True):
        assert (mine.layer, mine.rule, mine.threshold) == (read.layer, read.rule, read.threshold)
        assert (mine.heads is None) == (read.heads is None)
    scores = [cascade.score(TEXT, keep_logits=True) for cascade in (one, other)]
    assert torch.equal(scores[0].exit_layers, scores[1].exit_layers)
    assert torch.equal(logits_of(scores[0]), logits_of(scores[1]))


def test_a_saved_cascade_loads_unchanged(tmp_path: Path) -> None:
    cascade = a_saved_cascade(a_stack("llama"), tmp_path / "c")
    names = {"cascade_config.json", "heads-1.safetensors"}
    assert {*contents(tmp_path / "c")} == names | {f"stage-{n}.safetensors" for n in (1, 2)}
    check_same(cascade, Cascade.from_pretrained(tmp_path / "c", a_stack("llama")))


@ALL_FAMILIES
def test_cascades_of_every_family_load_unchanged(family: str, tmp_path: Path) -> None:
    a_cascade(family).save_pretrained(tmp_path / "c")
    check_same(a_cascade(family), Cascade.from_pretrained(tmp_path / "c", a_stack(family)))


@pytest.mark.parametrize("threshold", [INF, -INF, 0.0, -0.25, 0.9517])
def test_thresholds_load_unchanged(threshold: float, tmp_path: Path) -> None:
    ends(a_stack("llama"), [threshold]).save_pretrained(tmp_path / "c")
    text = (tmp_path / "c" / CONFIG).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (entry,) = Cascade.from_pretrained(tmp_path / "c", a_stack("llama")).stage_entries
    assert (entry.threshold, entry.rule) == (threshold, "cosine")


def test_heads_fitted_behind_a_stage_load_unchanged(tmp_path: Path) -> None:
    stack = a_stack("llama")
    cascade = ends(stack, [0.5])
    heads = fit_heads(cascade.stack, random_blocks(), [5])
    entry = Entry(5, share_of(cascade.stack, TEXT, 5), heads=heads)
    cascade.add_stage(a_moved_stage(cascade.stack), entry)
    cascade.save_pretrained(tmp_path / "c")
    check_same(cascade, Cascade.from_pretrained(tmp_path / "c", stack))


def test_a_bf16_cascade_loads_unchanged(tmp_path: Path) -> None:
    cascade = ends(a_bf16_stack("llama"), [0.5])
    cascade.save_pretrained(tmp_path / "c")
    check_same(cascade, Cascade.from_pretrained(tmp_path / "c", a_bf16_stack("llama")))


def test_a_cascade_without_stages_loads_unchanged(tmp_path: Path) -> None:
    Cascade(a_stack("llama")).save_pretrained(tmp_path / "c")
    read = Cascade.from_pretrained(tmp_path / "c", a_stack("llama"))
    assert torch.equal(
        logits_of(read.score(TEXT, keep_logits=True)), own_logits(a_stack("llama"), TEXT)
    )


def test_the_base_is_loaded_by_its_recorded_name(models: Path, tmp_path: Path) -> None:
    from cascade.models.loading import load

    cascade = ends(load(str(models / "tiny")), [0.5])
    cascade.save_pretrained(tmp_path / "c")
    read = Cascade.from_pretrained(str(tmp_path / "c"))
    check_same(cascade, read)
    half = Cascade.from_pretrained(tmp_path / "c", dtype="bfloat16")
    assert half.stack.dtype == torch.bfloat16
    assert {value.dtype for value in half.stages[0].parameters()} == {torch.bfloat16}


def test_saving_twice_needs_overwrite(tmp_path: Path) -> None:
    cascade = a_saved_cascade(a_stack("llama"), tmp_path / "c")
    before = contents(tmp_path / "c")
    with pytest.raises(OutputError, match="holds another run") as caught:
        a_cascade("llama").save_pretrained(tmp_path / "c")
    one_line(caught)
    assert contents(tmp_path / "c") == before
    a_cascade("llama").save_pretrained(tmp_path / "c", overwrite=True)
    check_same(a_cascade("llama"), Cascade.from_pretrained(tmp_path / "c", cascade.base))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_no_partial_files(overwrite: bool, tmp_path: Path) -> None:
    if overwrite:
        ends(a_stack("llama"), [0.5]).save_pretrained(tmp_path / "c")
    before = contents(tmp_path)
    with largest_file(20_000), pytest.raises(OutputError) as caught:
        a_cascade("llama").save_pretrained(tmp_path / "c", overwrite=overwrite)
    one_line(caught)
    assert contents(tmp_path) == before


def test_an_interrupted_save_keeps_the_earlier_cascade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends(a_stack("llama"), [0.5]).save_pretrained(tmp_path / "c")
    before = contents(tmp_path)

    def stopped(path: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(saved_cascades, "file_hash", stopped)
    with pytest.raises(KeyboardInterrupt):
        a_cascade("llama").save_pretrained(tmp_path / "c", overwrite=True)
    assert contents(tmp_path) == before


def test_a_cascade_can_be_uploaded_and_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"

    @dataclass
    class Made:
        repo_id: str

    class Api:
        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Made:
            assert exist_ok
            assert private
            return Made(f"someone/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
            shutil.copytree(folder_path, hub / repo_id)
            return f"{repo_id}: {commit_message}"

    def snapshot(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (revision, CONFIG in allow_patterns) == ("v2", True)
        if not (hub / repo_id).is_dir():
            raise ConnectionError(f"no {repo_id} at all\nnor anything like it")
        return str(hub / repo_id)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    cascade = a_cascade("llama")
    done = cascade.push_to_hub("mine", private=True, commit_message="one more")
    assert done == "someone/mine: one more"
    read = Cascade.from_pretrained("someone/mine", a_stack("llama"), revision="v2")
    check_same(cascade, read)
    with pytest.raises(RecordError, match="no cascade someone/else: no someone/else") as caught:
        Cascade.from_pretrained("someone/else", a_stack("llama"), revision="v2")
    assert "a Hub id and a connection to the Hub" in one_line(caught)


def test_transformers_still_saves_and_loads_the_base(tmp_path: Path) -> None:
    stack = DecoderStack(tiny_model("llama"))
    ends(stack, [0.5])
    stack.model.save_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(own_logits(DecoderStack(model), TEXT), own_logits(stack, TEXT))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit_sealed(folder / CONFIG, change)


def edited_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "no record"),
    "config cut": (lambda f: cut(f / CONFIG), "is torn or edited"),
    "config of something else": (
        lambda f: edit(f, lambda r: r.update(kind="evaluation")),
        "expected a record of kind cascade, got evaluation",
    ),
    "newer": (lambda f: edit(f, lambda r: r.update(schema=9)), "has schema 9, this release reads"),
    "no base": (lambda f: edit(f, lambda r: r.pop("base")), "torn or edited"),
    "no hash": (lambda f: edit(f, lambda r: r["stages"][0].pop("sha256")), "torn or edited"),
    "NaN": (
        lambda f: edited_text(f / CONFIG, '"threshold": 0', '"threshold": NaN, "x": 0'),
        "contains NaN",
    ),
    "threshold in words": (
        lambda f: edit(f, lambda r: r["stages"][1]["entry"].update(threshold="much")),
        "torn or edited",
    ),
    "another start": (
        lambda f: edit(f, lambda r: r["stages"][0].update(start="zeros")),
        "torn or edited",
    ),
    "ridge": (lambda f: edit(f, lambda r: r.update(propagation="ridge")), "torn or edited"),
    "other rule": (
        lambda f: edit(f, lambda r: r["stages"][1]["entry"].update(rule="nearness")),
        "expected a rule among",
    ),
    "other layer": (
        lambda f: edit(f, lambda r: r["stages"][1]["entry"].update(layer=9)),
        "expected an exit layer in 1..6, got 9",
    ),
    "more layers": (
        lambda f: edit(f, lambda r: r["stages"][0].update(num_layers=3)),
        "expected \\[",
    ),
    "too many layers": (
        lambda f: edit(f, lambda r: r["stages"][0].update(num_layers=30)),
        "expected 1 to 4 layers",
    ),
    "stage missing": (lambda f: (f / "stage-2.safetensors").unlink(), "is missing"),
    "stage cut": (lambda f: cut(f / "stage-1.safetensors"), "incomplete or changed"),
    "stage edited": (lambda f: flipped(f / "stage-2.safetensors"), "incomplete or changed"),
    "stages swapped": (
        lambda f: (f / "stage-1.safetensors").replace(f / "stage-2.safetensors"),
        "is missing|incomplete or changed",
    ),
    "heads missing": (
        lambda f: (f / "heads-1.safetensors").unlink(),
        "heads-1.safetensors is missing",
    ),
    "heads cut": (lambda f: cut(f / "heads-1.safetensors"), "is incomplete or changed"),
    "edited": (
        lambda f: edited_text(f / CONFIG, '"threshold": 0.', '"threshold": 0.1'),
        "was changed after it was written",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_gives_a_one_line_error(name: str, tmp_path: Path) -> None:
    a_saved_cascade(a_stack("llama"), tmp_path / "c")
    breaks, message = BREAKS[name]
    breaks(tmp_path / "c")
    with pytest.raises(CascadeError, match=message) as caught:
        Cascade.from_pretrained(tmp_path / "c", a_stack("llama"))
    one_line(caught)


def test_an_invalid_safetensors_file_gives_a_one_line_error(tmp_path: Path) -> None:
    from cascade.models.checkpoints.reading import file_hash

    a_saved_cascade(a_stack("llama"), tmp_path / "c")
    path = tmp_path / "c" / "stage-1.safetensors"
    path.write_bytes(b"something else")
    edit(tmp_path / "c", lambda r: r["stages"][0].update(sha256=file_hash(path)))
    with pytest.raises(RecordError, match="is incomplete or changed") as caught:
        Cascade.from_pretrained(tmp_path / "c", a_stack("llama"))
    one_line(caught)


def test_a_missing_cascade_gives_a_one_line_error(tmp_path: Path) -> None:
    for source in (tmp_path / "nothing", str(tmp_path / "nothing")):
        with pytest.raises(RecordError, match="no record") as caught:
            Cascade.from_pretrained(source, a_stack("llama"))
        one_line(caught)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: DecoderStack(tiny_model("llama", seed=1)), "expected weights_hash in-memory"),
        (lambda: DecoderStack(tiny_model("llama", hidden_size=64)), "hidden_size 32, got 64"),
        (lambda: DecoderStack(tiny_model("llama", num_layers=5)), "num_layers 4, got 5"),
        (lambda: DecoderStack(tiny_model("llama", vocab_size=99)), "vocab_size 97, got 99"),
    ],
)
def test_a_different_base_is_refused(
    base: Callable[[], DecoderStack], message: str, tmp_path: Path
) -> None:
    a_saved_cascade(a_stack("llama"), tmp_path / "c")
    with pytest.raises(ModelError, match=message) as caught:
        Cascade.from_pretrained(tmp_path / "c", base())
    assert "load that base, or train stages for this model" in one_line(caught)


def test_a_base_without_a_name_must_be_passed(tmp_path: Path) -> None:
    a_saved_cascade(a_stack("llama"), tmp_path / "c")
    with pytest.raises(UsageError, match="made for a model without a name; pass it") as caught:
        Cascade.from_pretrained(tmp_path / "c")
    one_line(caught)

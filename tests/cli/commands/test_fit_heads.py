"""`cascade fit-heads`, run as a user would, on a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import Run, read_record
from support.disk import contents, largest_file


def test_fitted_and_distilled_heads_can_be_used(tiny: Run, here: Path) -> None:
    done = tiny("fit-heads", "--layers", "2,3", "--distill", 1, "--output", "h.safetensors")
    assert done.status == 0, done.err
    assert "Layer 2: KL to the full model" in done.out
    assert "Wrote h.safetensors" in done.err
    served = tiny("evaluate", "--heads", "h.safetensors", "--propagation", "ridge", "--output", "e")
    assert served.status == 0, served.err
    assert {row["head"] for row in read_record("e/evaluation.json")["points"]} == {"ridge"}


def test_half_precision_halves_the_file(tiny: Run, here: Path) -> None:
    for name, options in (("a", ()), ("b", ("--half",))):
        output = f"{name}.safetensors"
        assert tiny("fit-heads", "--layers", "3", "--output", output, *options).status == 0
    sizes = [Path(f"{name}.safetensors").stat().st_size for name in "ab"]
    assert sizes[1] < 0.75 * sizes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "0"), "expected an exit layer in 1..4, got 0"),
        (("--layers", "5"), "expected an exit layer in 1..4, got 5"),
        (("--layers", "2,2"), "expected distinct exit layers"),
        (("--layers", "two"), "expected layers such as 24 or 20,24,28, got 'two'"),
        (("--layers", "2", "--output", "h.bin"), "expected --output to be a .safetensors file"),
        (("--layers", "2", "--seq-len", 65), "exceed the model's 64 positions"),
        (("--layers", "2", "--distill", 1, "--max-tokens", 64), "expected at least 10"),
        (("--layers", "2", "--distill", 1, "--seed", 2**64), f"got '{2**64}'"),
    ],
)
def test_fit_heads_rejects_invalid_options_in_one_line_and_writes_nothing(
    tiny: Run, here: Path, arguments: tuple[object, ...], message: str
) -> None:
    before = contents(here)
    done = tiny("fit-heads", "--output", "h.safetensors", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert contents(here) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("texts.jsonl/h.safetensors", "cannot write texts.jsonl/h.safetensors: "),
        ("x" * 300 + ".safetensors", "expected names of at most 255 bytes in a path"),
        ("folder.safetensors", "folder.safetensors is a folder, expected a file"),
    ],
)
def test_an_unwritable_output_is_refused_before_fitting(
    tiny: Run, here: Path, output: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade.models.loading.load", None)  # refused before the model is read
    (here / "folder.safetensors").mkdir()
    before = contents(here)
    done = tiny("fit-heads", "--layers", "2", "--output", output, "--overwrite")
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert contents(here) == before


def test_fitting_replaces_heads_only_with_overwrite(tiny: Run, here: Path) -> None:
    Path("h.safetensors").write_text("mine")
    done = tiny("fit-heads", "--layers", "2", "--output", "h.safetensors")
    assert done.status == 2
    assert "h.safetensors exists" in done.err
    assert Path("h.safetensors").read_text() == "mine"
    with largest_file(1000):
        done = tiny("fit-heads", "--layers", "2", "--output", "h.safetensors", "--overwrite")
    assert done.status == 2
    assert "cannot write h.safetensors" in done.err
    assert Path("h.safetensors").read_text() == "mine"
    done = tiny("fit-heads", "--layers", "2", "--output", "h.safetensors", "--overwrite")
    assert done.status == 0
    assert done.err.startswith("Wrote h.safetensors (")
    assert Path("h.safetensors").read_bytes() != b"mine"

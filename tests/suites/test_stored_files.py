"""Every stored file, torn or edited: refused with one line, or read with the same result."""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.paths import BASELINES, DOCS
from support.reference_early_exit import a_stack
from support.tiny_drafters import a_drafted_stack
from support.tiny_drafters import stored as stored_drafter
from support.tiny_hard_tokens import collect
from support.tiny_stages import a_cascade

from cascade import Cascade, CascadeError, TokenBlocks, fit_heads, load_drafter, load_hard_tokens
from cascade.core.records import sealed, to_json
from cascade.core.schema import to_plain
from cascade.exits.fitted_heads import load_heads
from cascade.gate.baselines import read_profile
from cascade.gate.budgets import read_budgets
from cascade.record_kinds import read_record

#: Damages of each stored thing by default, and under -m slow.
_FEW, _MANY = 40, 1500

#: Limits on reading a damaged file: seconds (two, with room for a busy machine) and KB.
_SECONDS, _MEMORY = 20.0, 200_000


@dataclass(frozen=True)
class Stored:
    """Something stored in a folder.

    Attributes:
        folder: Where it lies, whole.
        files: The files that are damaged, in turn.
        read: Reads it from a folder with all checks; equal results for equal content.
    """

    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], Any]


def _findings(folder: Path) -> dict[str, Stored]:
    """Return the records of the page of findings, sealed as a release of today writes them."""
    kinds = {
        "explanation": "explanation",
        "final-norm": "final-norm",
        "corpora": "corpus-comparison",
        "models": "model-comparison",
        "exit-search": "exit-search",
    }
    found = {}
    for name, kind in kinds.items():
        (folder / name).mkdir(parents=True)
        plain = json.loads((DOCS / f"findings/{name}.json").read_text())
        (folder / name / "record.json").write_text(to_json(sealed(plain)))
        found[name] = Stored(
            folder / name,
            ("record.json",),
            lambda at, kind=kind: to_plain(read_record(at / "record.json", kind=kind)),
        )
    return found


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stored]:
    import numpy as np

    top = tmp_path_factory.mktemp("stored")
    baselines = BASELINES / "smollm2-135m-instruct-q4_1"
    (top / "profile").mkdir()
    for end in ("json", "npz"):
        shutil.copy(baselines / f"embedded.saturation.{end}", top / "profile")
    (top / "budgets").mkdir()
    name = "embedded-held-out-confirm.budgets.json"
    plain = json.loads((baselines / name).read_text())
    (top / "budgets" / name).write_text(to_json(sealed(plain)))
    stack = a_stack("llama")
    ids = np.random.default_rng(0).integers(2, 97, (40, 16)).astype(np.int32)
    (top / "heads").mkdir()
    fit_heads(stack, TokenBlocks(ids, "random", "random", 40), [2, 3]).save(
        top / "heads/heads.safetensors"
    )
    a_cascade("llama", "frozen").save_pretrained(top / "cascade")
    collect(top / "hard")

    def profile(at: Path) -> Any:
        found = read_profile(at / "embedded.saturation.json")
        return to_plain(found.record()), {k: v.tobytes() for k, v in found.arrays().items()}

    def hard(at: Path) -> Any:
        found = load_hard_tokens(at)
        batch = next(found.batches("train", 3))
        return to_plain(found.record), {name: value.tolist() for name, value in batch.items()}

    def cascade(at: Path) -> Any:
        found = Cascade.from_pretrained(at, stack)
        weights = [stage.weights() for stage in found.stages]
        return to_plain(found.record()), [
            {name: value.tolist() for name, value in each.items()} for each in weights
        ]

    def drafter(at: Path) -> Any:
        found = load_drafter(at, a_drafted_stack())
        weights = {name: each.tolist() for name, each in found.network.state_dict().items()}
        return to_plain(found.record), found.tokens.tolist(), weights

    return {
        "profile": Stored(
            top / "profile", ("embedded.saturation.json", "embedded.saturation.npz"), profile
        ),
        "budgets": Stored(top / "budgets", (name,), lambda at: to_plain(read_budgets(at / name))),
        "heads": Stored(
            top / "heads",
            ("heads.safetensors",),
            lambda at: load_heads(at / "heads.safetensors", stack).fingerprint(),
        ),
        "cascade": Stored(
            top / "cascade",
            tuple(sorted(path.name for path in (top / "cascade").iterdir())),
            cascade,
        ),
        "hard tokens": Stored(
            top / "hard",
            ("hard-tokens.json", "train/data-00000-of-00001.arrow", "train/state.json")
            if (top / "hard/train/data-00000-of-00001.arrow").exists()
            else ("hard-tokens.json", "train/state.json"),
            hard,
        ),
        "drafter": Stored(
            stored_drafter(top / "drafter"), ("record.json", "drafter.safetensors"), drafter
        ),
        **_findings(top / "findings"),
    }


THINGS = (
    "profile",
    "budgets",
    "heads",
    "cascade",
    "hard tokens",
    "drafter",
    "explanation",
    "final-norm",
    "corpora",
    "models",
    "exit-search",
)


def _damaged(content: bytes, chance: random.Random) -> bytes:
    """Return content with flipped bits, without its end, or with a part that moved."""
    torn = bytearray(content)
    kind = chance.choice(("flip", "flip", "flips", "cut", "zeros", "swap"))
    place = chance.randrange(len(torn))
    if kind == "flip":
        torn[place] ^= 1 << chance.randrange(8)
    elif kind == "flips":
        for _ in range(chance.randrange(2, 20)):
            torn[chance.randrange(len(torn))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del torn[place:]
    elif kind == "zeros":
        torn[place : place + 512] = bytes(len(torn[place : place + 512]))
    else:
        torn[place:], torn[:place] = torn[:place], torn[place:]
    return bytes(torn)


def _refused_or_same(thing: Stored, at: Path, expected: Any) -> str:
    begin = time.monotonic()
    try:
        found = thing.read(at)
    except CascadeError as error:
        message = str(error)
        outcome = "refused"
    else:
        message, outcome = "read", "same"
        assert found == expected
    assert message
    assert "\n" not in message
    assert time.monotonic() - begin < _SECONDS
    return outcome


def _tear(thing: Stored, at: Path, rounds: int, *, memory: bool) -> dict[str, int]:
    expected = thing.read(thing.folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"refused": 0, "same": 0}
    chance = random.Random(0)
    shutil.copytree(thing.folder, at)
    for number in range(rounds):
        name = thing.files[number % len(thing.files)]
        whole = (at / name).read_bytes()
        (at / name).write_bytes(_damaged(whole, chance))
        outcomes[_refused_or_same(thing, at, expected)] += 1
        (at / name).write_bytes(whole)
    if memory:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < _MEMORY
    return outcomes


@pytest.mark.parametrize("name", THINGS)
def test_a_torn_file_is_refused_in_one_line(
    stored: dict[str, Stored], name: str, tmp_path: Path
) -> None:
    outcomes = _tear(stored[name], tmp_path / "torn", _FEW, memory=False)
    assert outcomes["refused"] > _FEW // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", THINGS)
def test_thousands_of_torn_files_are_refused_in_one_line(
    stored: dict[str, Stored], name: str, tmp_path: Path
) -> None:
    outcomes = _tear(stored[name], tmp_path / "torn", _MANY, memory=True)
    assert outcomes["refused"] > _MANY // 2


#: Values of other types, and of the right type out of every range.
_OTHERS = (None, True, -1, 0, 10**12, 1e308, "", "x", "../x", "/x", "\0", [], [[]], {}, {"a": 1})


def _edited(value: Any, chance: random.Random) -> Any:
    """Return a record in which one value, chosen at random, is another one or is missing."""
    places: list[tuple[Any, Any]] = []

    def collect_places(inside: Any) -> None:
        pairs = inside.items() if isinstance(inside, dict) else enumerate(inside)
        for key, item in pairs:
            places.append((inside, key))
            if isinstance(item, dict | list):
                collect_places(item)

    copied = json.loads(json.dumps(value))
    collect_places(copied)
    inside, key = chance.choice(places)
    if chance.random() < 0.2:
        del inside[key]
    else:
        inside[key] = chance.choice(_OTHERS)
    return copied


@pytest.mark.parametrize("name", THINGS)
def test_a_record_with_other_values_and_a_valid_seal_raises_no_traceback(
    stored: dict[str, Stored], name: str, tmp_path: Path
) -> None:
    _edit(stored[name], tmp_path / "edited", _FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", THINGS)
def test_thousands_of_edited_records_raise_no_traceback(
    stored: dict[str, Stored], name: str, tmp_path: Path
) -> None:
    _edit(stored[name], tmp_path / "edited", _MANY)


def _edit(thing: Stored, at: Path, rounds: int) -> None:
    records = [name for name in thing.files if name.endswith(".json") and "state" not in name]
    if not records:
        pytest.skip("the record is inside the file of the weights")
    chance = random.Random(0)
    shutil.copytree(thing.folder, at)
    for name in records:
        plain = json.loads((at / name).read_text())
        for _ in range(rounds):
            edited = _edited(plain, chance)
            (at / name).write_text(json.dumps(sealed(edited)))
            begin = time.monotonic()
            message = "read"
            try:
                thing.read(at)
            except CascadeError as error:
                message = str(error)
            assert message
            assert "\n" not in message
            assert time.monotonic() - begin < _SECONDS

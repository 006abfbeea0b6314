"""Which baseline a run replaces: its earlier version, and never another one's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.build_profiles import a_profile, provenance

from cascade.core.errors import RecordError, UsageError
from cascade.gate.accepting import named_path, store_profile
from cascade.gate.baseline_lookup import Sought, find_baseline
from cascade.gate.baselines import StoredProfile, read_profile

BASE = {
    "model__source": "runs/tiny",
    "model__family": "llama",
    "model__num_layers": 3,
    "model__hidden_size": 8,
}
OTHER_TEXT = np.arange(100, 112)


def made(*, text: Any = None, seed: int = 0, **changes: Any) -> StoredProfile:
    return a_profile(seed=seed, about=provenance(**BASE | changes), fingerprints=text)


@pytest.mark.parametrize(
    "changes",
    [
        {"model__weights_hash": "new"},
        {"model__weights_hash": "new", "model__revision": "r2", "tokenizer_hash": "t2"},
        {"model__weights_hash": "new", "model__source": "/home/me/runs/tiny"},
        {"model__source": "elsewhere/tiny"},  # the same weights
        {"corpus__fingerprint": "edited", "text": OTHER_TEXT},
        {"corpus__seed": 3, "corpus__num_samples": 20, "text": OTHER_TEXT},
        {"corpus__source": "/home/me/words.jsonl", "text": OTHER_TEXT},
        {"corpus__source": "copy/other.jsonl"},  # the same text
        {"corpus__text_column": "text"},  # the same text, of a record that names no column
    ],
)
def test_the_next_version_replaces_its_baseline(tmp_path: Path, changes: dict[str, Any]) -> None:
    path, before = store_profile(tmp_path, made())
    assert before is None
    again, before = store_profile(tmp_path, made(seed=1, **changes))
    assert (again, before is None) == (path, False)


@pytest.mark.parametrize(
    ("changes", "words", "free"),
    [
        (
            {"model__source": "other/tiny", "model__weights_hash": "new"},
            "another model (expected source runs/tiny, got other/tiny)",
            "tiny-other/words",
        ),
        ({"model__family": "gpt2"}, "another model (expected family llama, got gpt2)", None),
        ({"model__num_layers": 2}, "another model (expected num layers 3, got 2)", None),
        ({"model__quantization": "Q4_0"}, "expected quantization none, got Q4_0", None),
        ({"model__dtype": "bfloat16"}, "expected dtype float32, got bfloat16", None),
        ({"corpus__seq_len": 8}, "another corpus (expected seq len 16, got 8)", "tiny/words-8"),
        (
            {"corpus__text_column": "summary", "text": OTHER_TEXT},
            "another corpus (expected text column none, got summary)",
            "tiny/words-summary",
        ),
        ({"corpus__split": "b", "text": OTHER_TEXT}, "expected split none, got b", None),
        (
            {"corpus__source": "a/words.jsonl", "model__source": "a/tiny", "text": OTHER_TEXT},
            "expected source b/words.jsonl, got a/words.jsonl",
            "tiny/words-a",
        ),
    ],
)
def test_a_baseline_of_another_model_or_text_is_replaced_only_on_request(
    tmp_path: Path, changes: dict[str, Any], words: str, free: str | None
) -> None:
    old = {"corpus__source": "b/words.jsonl"} if "b/words" in words else {}
    path, _ = store_profile(tmp_path, made(**old))
    before = path.read_bytes(), path.with_suffix(".npz").read_bytes()
    with pytest.raises(RecordError) as error:
        store_profile(tmp_path, made(seed=1, **changes))
    assert str(error.value).startswith(f"{path} is the baseline of another ")
    assert words in str(error.value)
    assert f"--name {free or ''}" in str(error.value)
    assert (path.read_bytes(), path.with_suffix(".npz").read_bytes()) == before
    _, replaced = store_profile(tmp_path, made(seed=1, **changes), replace=True)
    assert replaced is not None


def test_a_baseline_with_a_name_of_its_own_is_found_and_replaced_again(tmp_path: Path) -> None:
    store_profile(tmp_path, made())
    column = {"corpus__text_column": "summary", "text": OTHER_TEXT}
    named = named_path(tmp_path, "saturation", "tiny/words-summary")
    store_profile(tmp_path, made(**column), path=named)
    path, before = store_profile(tmp_path, made(seed=1, **column))
    assert (path, before is None) == (named, False)

    def found(**options: Any) -> str:
        sought = Sought("runs/tiny", "words.jsonl", "float32", options)
        names = {"model": "tiny", "corpus": "words"}
        return find_baseline(tmp_path, "saturation", **names, sought=sought).name

    assert found() == "words.saturation.json"
    assert found(text_column="summary") == "words-summary.saturation.json"
    assert found(seq_len=64) == "words.saturation.json"  # then the gate says what differs


@pytest.mark.parametrize("name", ["tiny", "", "/words", "tiny/", "a/b/c", "../x/y", "./y"])
def test_a_name_without_model_and_corpus_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="expected --name MODEL/CORPUS"):
        named_path(tmp_path, "saturation", name)


def test_baselines_with_names_of_earlier_releases_are_found_and_kept(tmp_path: Path) -> None:
    old = {"model__source": "runA/checkpoint-5", "model__name": "checkpoint-5"}
    old_path, _ = store_profile(tmp_path, made(**old))

    def found(run: str, **options: Any) -> Path:
        sought = Sought(f"{run}/checkpoint-5", "words.jsonl", "float32", options)
        names = {"model": f"{Path(run).name}--checkpoint-5".lower(), "corpus": "words"}
        return find_baseline(tmp_path, "saturation", **names, sought=sought)

    assert found("runA") == found("/moved/runA") == old_path
    assert found("runB") == tmp_path / "runb--checkpoint-5/words.saturation.json"
    new = {"model__name": "runa--checkpoint-5", "model__weights_hash": "new"}
    path, before = store_profile(tmp_path, made(**old | new))
    assert (path, before is None) == (old_path, False)
    # The other run's checkpoint gets a baseline of its own, also where both were typed alike.
    other = {"model__source": "checkpoint-5", "model__name": "runb--checkpoint-5"}
    path, before = store_profile(tmp_path, made(model__weights_hash="b", **other))
    assert (path.parent.name, before) == ("runb--checkpoint-5", None)


def test_several_baselines_of_one_corpus_are_named(tmp_path: Path) -> None:
    for split in ("a", "b"):
        text = OTHER_TEXT + ord(split)
        about = {"corpus__split": split, "corpus__name": f"words-{split}"}
        store_profile(tmp_path, made(text=text, **about))
    names = {"model": "tiny", "corpus": "words"}
    sought = Sought("runs/tiny", "words.jsonl", "float32")
    with pytest.raises(RecordError, match=r"words-a.*, .*words-b.*; name one with --baseline"):
        find_baseline(tmp_path, "saturation", **names, sought=sought)
    path = find_baseline(
        tmp_path,
        "saturation",
        **names,
        sought=Sought("runs/tiny", "words.jsonl", None, {"split": "b"}),
    )
    assert read_profile(path).record().provenance.corpus.split == "b"

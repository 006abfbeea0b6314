"""Test the threshold, the hard mask and the record of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from support.disk import contents
from support.reference_early_exit import (
    a_stack,
    one_line,
)
from support.tiny_hard_tokens import (
    collect,
    everything,
    some_splits,
)

from cascade.core.errors import (
    CascadeError,
    RecordError,
    UsageError,
)
from cascade.core.schema import to_plain
from cascade.models.stack import DecoderStack
from cascade.stages.hard_tokens.dataset import load_hard_tokens
from cascade.stats.thresholds import fit_threshold


def test_a_hard_ratio_fits_the_threshold_on_the_training_split(tmp_path: Path) -> None:
    found = collect(tmp_path / "d", hard_ratio=0.3)
    values = everything(found, "train")["similarity"].numpy()
    fitted = fit_threshold(values, 0.3, resamples=39)
    assert (found.threshold, found.record.splits["train"].hard_ratio) == (
        fitted.threshold,
        fitted.reached,
    )
    assert found.notes == ()


def test_the_threshold_overrides_the_hard_ratio_with_a_note_if_they_differ(tmp_path: Path) -> None:
    fitted = collect(tmp_path / "a", hard_ratio=0.5).threshold
    near = collect(tmp_path / "b", threshold=fitted, hard_ratio=0.46)
    assert (near.threshold, near.notes) == (fitted, ())
    far = collect(tmp_path / "c", threshold=fitted, hard_ratio=0.3)
    assert far.threshold == fitted
    assert far.record.splits["train"].hard_ratio == 0.5
    (note,) = far.notes
    assert f"--threshold {fitted:.6g} is used: it makes 0.500" in note
    assert "--hard-ratio asked for 0.300" in note


def test_a_token_at_the_threshold_is_easy_without_rounding_the_threshold_to_fp32(
    tmp_path: Path,
) -> None:
    similarity = everything(collect(tmp_path / "a"), "train")["similarity"].flatten().sort().values
    middle = similarity[130]
    at = collect(tmp_path / "b", hard_ratio=None, threshold=float(middle))
    assert at.record.splits["train"].hard == int((similarity < middle).sum())
    # Rounded to fp32, this threshold would equal the similarity, and the token would exit.
    above = collect(tmp_path / "c", hard_ratio=None, threshold=float(middle) + 1e-12)
    assert above.record.splits["train"].hard == int((similarity <= middle).sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hard_ratio": None}, "expected a threshold or a hard ratio, got neither"),
        ({"hard_ratio": 0.0}, "expected a hard ratio between 0 and 1, got 0.0"),
        ({"hard_ratio": 1.0}, "expected a hard ratio between 0 and 1, got 1.0"),
        ({"hard_ratio": float("nan")}, "expected a hard ratio between 0 and 1, got nan"),
        ({"threshold": 2.0}, "gives confidences from -1 to 1; expected a threshold in this range"),
        ({"threshold": float("nan")}, "got nan"),
        ({"layer": 5}, "expected an exit layer in 1..4, got 5"),
        ({"layer": 0}, "expected an exit layer in 1..4, got 0"),
        ({"dtype": "float32"}, "expected states in float16 or bfloat16, got 'float32'"),
        ({"batch_size": 0}, "at least 1, got 0"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CascadeError) as caught:
        collect(tmp_path / "d", **settings)
    assert message in one_line(caught)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(("threshold", "which"), [(-1.0, "no token"), (1.0000001, "every token")])
def test_no_or_only_hard_tokens_are_refused_and_the_states_are_kept(
    tmp_path: Path, threshold: float, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as caught:
        collect(tmp_path / "d", threshold=threshold)
    assert f"{which} of the train split is hard" in one_line(caught)
    with pytest.raises(FileNotFoundError):
        datasets.load_from_disk(str(tmp_path / "d"))
    with pytest.raises(RecordError, match="is not finished"):
        load_hard_tokens(tmp_path / "d")
    expected = collect(tmp_path / "e")
    monkeypatch.setattr(DecoderStack, "visit", None)
    assert everything(collect(tmp_path / "d"), "train")["hard"].sum() == 132
    assert contents(tmp_path / "d") == contents(tmp_path / "e")
    assert load_hard_tokens(tmp_path / "d").record == expected.record


def test_the_record_names_model_text_command_and_counts(tmp_path: Path) -> None:
    found = collect(tmp_path / "d", command="cascade collect-hard")
    record = load_hard_tokens(str(tmp_path / "d")).record
    assert record == found.record
    provenance = record.provenance
    assert provenance.model.weights_hash == a_stack("llama").weights_hash()
    assert provenance.command == "cascade collect-hard"
    for split, blocks in some_splits().items():
        assert to_plain(provenance.corpora[split]) == to_plain(blocks.provenance())
        hard = everything(found, split)["hard"].numpy()
        assert to_plain(record.splits[split]) == {
            "sequences": len(blocks.ids),
            "tokens": blocks.tokens,
            "hard": hard.sum(),
            "hard_ratio": hard.mean(),
            "response": blocks.response.sum(),
            "hard_response": (hard & blocks.response).sum(),
        }

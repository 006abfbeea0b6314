"""BOS over the whole system: text with and without it is never compared or mixed without a word."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from msgspec import structs
from support.tiny_models import tiny_bos_tokenizer, tiny_model

from cascade import calibrate, compare_corpora, compare_models, evaluate, fit_heads, measure_model
from cascade.core.errors import CorpusError, RecordError
from cascade.core.records import write_record
from cascade.core.schema import UNSET
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.evaluation.calibration import CalibrationConfig
from cascade.evaluation.exit_evaluation import EvaluationConfig, split
from cascade.evaluation.search.stored_evaluations import read_evaluations
from cascade.gate.baselines import StoredProfile
from cascade.gate.drift import compare
from cascade.gate.quick_gate import run_gate
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import analyze

TEXTS = [f"{number} {letter * 7}" for number, letter in enumerate("abcdefghijkl" * 3)]


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    about = {"name": "tiny", "weights_hash": "w", "tokenizer_hash": "t"}
    model = tiny_model("llama", vocab_size=98)
    return DecoderStack(model, tokenizer=tiny_bos_tokenizer(), provenance=about)


def text(stack: DecoderStack, bos: str = "auto") -> TokenBlocks:
    return load_blocks(TEXTS, stack.tokenizer, seq_len=8, bos=bos)


def baseline(stack: DecoderStack, bos: str) -> StoredProfile:
    profile = analyze(stack, text(stack, bos))
    return StoredProfile(profile.record(), profile.arrays(), profile.rows)


def of_an_earlier_release(stored: StoredProfile) -> StoredProfile:
    """Return a baseline from before BOS was recorded, when all text was read without it."""
    about = stored.content.provenance
    about = structs.replace(about, corpus=structs.replace(about.corpus, bos=UNSET))
    return dataclasses.replace(stored, content=structs.replace(stored.content, provenance=about))


@pytest.mark.parametrize("full", [False, True])
def test_a_baseline_read_without_bos_is_not_comparable_and_says_so(
    stack: DecoderStack, full: bool
) -> None:
    earlier = of_an_earlier_release(baseline(stack, "no"))
    found = run_gate(stack, text(stack), earlier, full=full).comparison
    assert (found.verdict, found.exit_status()) == ("NOT COMPARABLE", 2)
    assert found.headline() == "the baseline's corpus was read without BOS, this one with BOS"
    (mismatch,) = found.mismatches
    assert "--bos no, or accept a new baseline" in mismatch.remedy
    assert run_gate(stack, text(stack, "no"), earlier, full=full).comparison.verdict == "PASS"
    assert run_gate(stack, text(stack), baseline(stack, "yes")).comparison.verdict == "PASS"
    other = run_gate(stack, text(stack, "no"), baseline(stack, "yes")).comparison
    assert other.headline() == "the baseline's corpus was read with BOS, this one without BOS"
    assert compare(baseline(stack, "no"), baseline(stack, "yes")).verdict == "NOT COMPARABLE"


def test_heads_and_thresholds_are_refused_by_text_with_another_bos(stack: DecoderStack) -> None:
    heads = fit_heads(stack, text(stack), [2])
    config = CalibrationConfig(layer=2, hard_ratios=(0.5,))
    line = r"these exit heads were fitted on text with BOS, .* without it; use --bos yes, or fit"
    with pytest.raises(CorpusError, match=line):
        calibrate(stack, text(stack, "no"), config, heads=heads)
    with pytest.raises(CorpusError, match=line):
        evaluate(stack, *split(text(stack, "no")), EvaluationConfig(layers=(2,)), heads=heads)
    with pytest.raises(CorpusError, match="thresholds are fitted on text without BOS"):
        calibrate(stack, text(stack, "no"), config, onto=text(stack))
    assert calibrate(stack, text(stack), config, heads=heads).provenance.corpus.bos == "yes"


def test_corpora_and_models_with_another_bos_are_not_compared(stack: DecoderStack) -> None:
    with pytest.raises(
        CorpusError,
        match=r"the first corpus is text with BOS, but this text is read without it; .* --bos yes$",
    ):
        compare_corpora(stack, [text(stack), text(stack, "no")])
    models = [measure_model(stack, text(stack, bos)) for bos in ("yes", "no")]
    record = compare_models(models)
    assert "only one of them read text with BOS" in str(record.pairs)


def test_evaluations_with_another_bos_are_not_searched_together(
    stack: DecoderStack, tmp_path: Path
) -> None:
    files = []
    for bos in ("yes", "no"):
        config = EvaluationConfig(layers=(2,), rules=("cosine",))
        record = evaluate(stack, *split(text(stack, bos)), config)
        files.append(tmp_path / f"{bos}.json")
        write_record(files[-1], record)
    with pytest.raises(RecordError, match=r"no.json was measured on text without BOS, and .* with"):
        read_evaluations(files)

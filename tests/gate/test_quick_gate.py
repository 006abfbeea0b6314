"""The gate: few tokens, early stopping, and noise measured in another environment."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from support.build_gate import BLOCKS, LENGTH, a_stack, blocks_of, broken
from support.commands import TEXTS, Run
from support.decoding_faults import CHANGES, wrong_cache
from support.tiny_models import tiny_model, tiny_tokenizer

from cascade.core.errors import ModelError, UsageError
from cascade.core.schema import from_plain, to_plain
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.gate import baseline_corpus, quick_gate
from cascade.gate.accepting import store_profile
from cascade.gate.baseline_corpus import GivenCorpus
from cascade.gate.baselines import StoredProfile, read_profile, seal
from cascade.gate.noise import measure_noise
from cascade.gate.quick_gate import Gate, noise_here, quick_blocks, run_gate
from cascade.gate.records import GateRun, GateStep
from cascade.models.stack import DecoderStack
from cascade.saturation import long_context, row_files
from cascade.saturation.profile import SaturationProfile, analyze
from cascade.saturation.records import NoiseFloor, ProfileRecord


def baseline_of(stack: DecoderStack, blocks: TokenBlocks = BLOCKS) -> StoredProfile:
    profile = dataclasses.replace(
        analyze(stack, blocks), noise=measure_noise(stack, blocks.ids[:4])
    )
    return StoredProfile(seal(profile.record(), profile.arrays()), profile.arrays(), profile.rows)


@pytest.fixture(scope="module")
def baseline() -> StoredProfile:
    return baseline_of(a_stack())


# --- Deciding --------------------------------------------------------------------------------


def test_an_unchanged_model_passes_within_the_budget(baseline: StoredProfile) -> None:
    done: list[int] = []
    result = run_gate(a_stack(), BLOCKS, baseline, tokens=10 * LENGTH, progress=done.append)
    assert result.comparison.verdict == "PASS"
    # The sample doubles with each step, starting with one sequence.
    assert [step.tokens // LENGTH for step in result.steps] == [1, 2, 4, 8, 10]
    assert {step.verdict for step in result.steps} == {"PASS"}
    assert result.comparison.tokens == result.budget == sum(done) == 10 * LENGTH


def test_a_broken_layer_is_named_after_one_sequence(baseline: StoredProfile) -> None:
    result = run_gate(broken(), BLOCKS, baseline, tokens=10 * LENGTH)
    assert result.comparison.verdict == "FAIL"
    assert result.steps == (GateStep(tokens=LENGTH, verdict="FAIL"),)
    assert result.comparison.attribution is not None
    assert result.comparison.attribution.layer == "3"


def test_a_fault_in_one_sequence_is_found_when_that_sequence_is_measured(
    baseline: StoredProfile,
) -> None:
    stack = a_stack()
    token = int(BLOCKS.ids[-1, 3])
    assert token not in BLOCKS.ids[0]
    stack.model.get_input_embeddings().weight.data[token] *= 1.1  # type: ignore[operator]
    result = run_gate(stack, BLOCKS, baseline, tokens=2 * LENGTH)
    assert [step.verdict for step in result.steps] == ["PASS", "FAIL"]


def test_a_model_that_decodes_wrongly_fails_although_its_prefill_has_not_drifted(
    baseline: StoredProfile,
) -> None:
    stack = a_stack()
    with wrong_cache(3, CHANGES["zeroed value"])(stack):
        result = run_gate(stack, BLOCKS, baseline, tokens=4 * LENGTH)
        unchecked = run_gate(stack, BLOCKS, baseline, tokens=4 * LENGTH, decoding=False)
    assert {step.verdict for step in result.steps} == {"PASS"}
    comparison = result.comparison
    assert (comparison.verdict, comparison.exit_status()) == ("FAIL", 1)
    assert comparison.attribution is not None
    assert (comparison.attribution.cause, comparison.attribution.layer) == ("decoding", "3")
    assert comparison.headline().startswith("decoding differs from the prefill from layer 3 on; ")
    assert unchecked.comparison.verdict == "PASS"
    assert unchecked.comparison.decoding is None
    record = result.record()
    assert from_plain(to_plain(record), type(record)) == record


def test_decoding_is_not_checked_once_the_prefill_has_drifted(baseline: StoredProfile) -> None:
    assert run_gate(broken(), BLOCKS, baseline, tokens=2 * LENGTH).comparison.decoding is None


@pytest.mark.parametrize(("sequences", "decoded"), [(1, 1), (3, 1), (4, 2), (40, 2)])
def test_at_most_half_of_the_sequences_and_two_are_decoded(
    baseline: StoredProfile, sequences: int, decoded: int
) -> None:
    result = run_gate(a_stack(), BLOCKS, baseline, tokens=sequences * LENGTH)
    assert result.comparison.decoding is not None
    assert result.comparison.decoding.sequences == decoded
    assert result.comparison.decoding.tokens == LENGTH


def test_the_full_gate_checks_decoding_too(baseline: StoredProfile) -> None:
    stack = a_stack()
    with wrong_cache(3, CHANGES["stale value"])(stack):
        result = run_gate(stack, BLOCKS, baseline, full=True)
    assert result.comparison.verdict == "FAIL"
    assert result.comparison.attribution is not None
    assert result.comparison.attribution.cause == "decoding"


def test_the_measured_sequences_are_spread_over_the_whole_corpus(
    baseline: StoredProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TokenBlocks] = []

    def watched(stack: DecoderStack, blocks: TokenBlocks, **options: Any) -> Any:
        seen.append(blocks)
        return analyze(stack, blocks, **options)

    monkeypatch.setattr(quick_gate, "analyze", watched)
    run_gate(a_stack(), BLOCKS, baseline, tokens=4 * LENGTH)
    rows = [BLOCKS.ids.tolist().index(row) for part in seen for row in part.ids.tolist()]
    assert rows == [0, 13, 26, 39]


def test_the_budget_is_clamped_between_one_sequence_and_the_corpus(
    baseline: StoredProfile,
) -> None:
    assert run_gate(a_stack(), BLOCKS, baseline, tokens=1).comparison.tokens == LENGTH
    everything = run_gate(a_stack(), BLOCKS, baseline, tokens=10**6, batch_size=8)
    assert everything.comparison.tokens == BLOCKS.tokens
    sizes = np.diff([0, *(step.tokens // LENGTH for step in everything.steps)])
    assert sizes.tolist() == [1, 1, 2, 4, 8, 8, 8, 8]
    with pytest.raises(UsageError, match="at least 1 token, got 0"):
        run_gate(a_stack(), BLOCKS, baseline, tokens=0)


def test_the_full_gate_measures_the_corpus_and_compares_its_table(baseline: StoredProfile) -> None:
    result = run_gate(a_stack(), BLOCKS, baseline, full=True)
    assert result.comparison.verdict == "PASS"
    assert result.comparison.tokens == BLOCKS.tokens
    assert {"p50", "count", "std"} <= {cell.statistic for cell in result.comparison.cells}
    assert result.steps == (GateStep(tokens=BLOCKS.tokens, verdict="PASS"),)


def test_the_full_gate_matches_compare_of_the_same_profile(
    baseline: StoredProfile,
) -> None:
    from cascade.gate.drift import compare

    for stack in (a_stack(), broken(5, 1.001)):
        profile = analyze(stack, BLOCKS, edges=baseline.arrays()["edges"])
        expected = compare(profile, baseline)
        got = run_gate(stack, BLOCKS, baseline, full=True).comparison
        assert got.cells == expected.cells


def test_nan_from_a_layer_raises_an_error(baseline: StoredProfile) -> None:
    stack = a_stack()
    stack.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="layer 3 is the first to give NaN"):
        run_gate(stack, BLOCKS, baseline)


def test_a_gate_returns_the_measured_profile(baseline: StoredProfile) -> None:
    few = quick_blocks(BLOCKS, baseline, 5 * LENGTH)
    quick = run_gate(a_stack(), BLOCKS, baseline, tokens=5 * LENGTH).profile
    full = run_gate(a_stack(), BLOCKS, baseline, full=True).profile
    for profile, blocks in ((quick, few), (full, BLOCKS)):
        assert profile is not None
        assert np.array_equal(profile.sequence_fingerprints, blocks.sequence_fingerprints())
        again = analyze(a_stack(), blocks, edges=baseline.arrays()["edges"])
        np.testing.assert_allclose(profile.statistics.mean(), again.statistics.mean(), atol=1e-6)
    assert run_gate(a_stack(dtype="bfloat16"), BLOCKS, baseline).profile is None
    assert len(quick_blocks(blocks_of(9, seed=1), baseline).ids) == 0


# --- What cannot be compared -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"weights_hash": "other"}, "model.weights_hash"),
        ({"revision": "other"}, "model.revision"),
        ({"dtype": "bfloat16"}, "model.dtype"),
        ({"quantization": "Q4_0"}, "model.quantization"),
        ({"tokenizer_hash": "other"}, "tokenizer_hash"),
    ],
)
def test_another_model_is_not_measured(
    baseline: StoredProfile,
    changes: dict[str, str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quick_gate, "analyze", lambda *_, **__: pytest.fail("it was measured"))
    comparison = run_gate(a_stack(**changes), BLOCKS, baseline).comparison
    assert comparison.verdict == "NOT COMPARABLE"
    assert [mismatch.name for mismatch in comparison.mismatches] == [name]


def test_other_text_needs_the_full_gate(baseline: StoredProfile) -> None:
    other = blocks_of(60, seed=1)
    comparison = run_gate(a_stack(), other, baseline).comparison
    assert comparison.verdict == "NOT COMPARABLE"
    (mismatch,) = comparison.mismatches
    assert mismatch.name == "corpus"
    assert "sequences of 16" in str(mismatch.expected)
    assert "sequences of 16" in str(mismatch.obtained)
    assert "--full" in mismatch.remedy
    full = run_gate(a_stack(), other, baseline, full=True).comparison
    assert full.method == "other sequences"
    assert full.verdict in ("PASS", "INCONCLUSIVE")


def test_other_text_of_the_same_name_and_length_is_recognized_by_fingerprint(
    baseline: StoredProfile,
) -> None:
    comparison = run_gate(a_stack(), blocks_of(60, seed=1), baseline).comparison
    (mismatch,) = comparison.mismatches
    assert mismatch.expected != mismatch.obtained
    stored = baseline.content.provenance.corpus.fingerprint
    assert mismatch.expected == f"random in sequences of {LENGTH} ({stored[:19]}...)"


def test_text_that_shares_most_sequences_is_compared_on_those(baseline: StoredProfile) -> None:
    mixed = dataclasses.replace(
        BLOCKS, ids=np.concatenate([blocks_of(5, seed=1).ids, BLOCKS.ids[7:12]])
    )
    comparison = run_gate(a_stack(), mixed, baseline).comparison
    assert comparison.verdict == "PASS"
    assert comparison.tokens % LENGTH == 0
    assert comparison.sequences == (5, 5)
    # Another tokenization can share a block by chance, which does not make it the same text.
    few = dataclasses.replace(mixed, ids=mixed.ids[:6])
    comparison = run_gate(a_stack(), few, baseline).comparison
    assert comparison.verdict == "NOT COMPARABLE"
    assert comparison.mismatches[0].remedy.startswith("1 of its 6 sequences")


# --- Another environment ---------------------------------------------------------------------


def moved(baseline: StoredProfile, **machine: Any) -> StoredProfile:
    """Return the baseline as if it was made on another machine."""
    plain = to_plain(baseline.content)
    plain["provenance"]["machine"] |= machine
    content = from_plain(plain, ProfileRecord)
    return StoredProfile(seal(content, baseline.state), baseline.state, baseline.rows)


def test_noise_is_not_measured_in_the_baselines_environment(
    baseline: StoredProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick_gate, "measure_noise", lambda *_: pytest.fail("measured again"))
    assert run_gate(a_stack(), BLOCKS, baseline).noise is None


def test_noise_is_measured_once_in_another_environment_and_cached(
    baseline: StoredProfile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path))
    calls: list[int] = []

    def counted(stack: DecoderStack, ids: Any, long: Any) -> NoiseFloor:
        calls.append(len(ids))
        return replace(measure_noise(stack, ids, long), repeat=4e-6, exact=1e-6)

    monkeypatch.setattr(quick_gate, "measure_noise", counted)
    elsewhere = moved(baseline, processor="Another")
    for _ in range(2):
        result = run_gate(a_stack(), BLOCKS, elsewhere)
        assert result.noise is not None
        notes = [note for note in result.comparison.notes if "earlier release" not in note]
        assert "made in another environment" in notes[0]
        theirs = baseline.content.noise
        assert isinstance(theirs, NoiseFloor)
        expected = 3 * (4e-6 + max(theirs.repeat, theirs.exact or 0))
        limits = {c.limit for c in result.comparison.cells if c.statistic == "mean"}
        assert list(limits) == pytest.approx([expected])
    assert calls == [4]
    # A broken layer is still far beyond the tolerance.
    assert run_gate(broken(), BLOCKS, elsewhere).comparison.verdict == "FAIL"
    other = blocks_of(50, seed=2)
    run_gate(a_stack(), other, moved(baseline_of(a_stack(), other), blas="another"))
    assert calls == [4, 4]  # other text is measured separately


@pytest.mark.parametrize("content", ["{", '{"kind": "evaluation"}'])
def test_a_torn_noise_cache_is_replaced(
    baseline: StoredProfile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path))
    about = baseline.content.provenance
    first = noise_here(a_stack(), BLOCKS.ids[:4], about)
    (path,) = (tmp_path / "noise").iterdir()
    path.write_text(content)
    assert noise_here(a_stack(), BLOCKS.ids[:4], about).sequences == first.sequences
    assert '"kind": "noise"' in path.read_text()


def test_an_unwritable_noise_cache_is_ignored(
    baseline: StoredProfile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "file"))
    found = noise_here(a_stack(), BLOCKS.ids[:4], baseline.content.provenance)
    assert found.repeat < 1e-6


# --- The commands ----------------------------------------------------------------------------


@pytest.fixture
def stored(run: Run, models: Path, here: Path) -> Path:
    """The path of the tiny checkpoint's baseline in ./baselines."""
    given = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--seq-len", 16)
    assert run("analyze", *given, "--output", "run").status == 0
    assert run("accept", "run").status == 0
    (path,) = Path("baselines").glob("*/*.json")
    return path


def gated(run: Run, model: Path, *options: object) -> Any:
    corpus = ("--corpus", "texts.jsonl", "--seq-len", 16)
    return run("gate", "--model", model, *corpus, *options)


@pytest.mark.parametrize(
    "options",
    [
        ("--max-tokens", 160),
        ("--seed", 3, "--num-samples", 20),
        ("--text-column", "other", "--seq-len", 8),
    ],
)
def test_the_command_reads_the_corpus_as_the_baseline_says(
    run: Run, models: Path, here: Path, options: tuple[object, ...]
) -> None:
    rows = [{"text": text, "other": text[::-1]} for text in TEXTS]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, corpus = ("--model", models / "tiny"), ("--corpus", "rows.jsonl")
    usual = () if "--seq-len" in options else ("--seq-len", 16)
    assert run("analyze", *model, *corpus, *usual, *options, "--output", "run").status == 0
    assert run("accept", "run").status == 0
    (path,) = Path("baselines").glob("*/*.json")
    for given in (
        (*corpus, *options),  # as it was measured
        ("--baseline", path),  # whose record names the corpus
        (*corpus, "--full"),
    ):
        done = run("gate", *model, *given)
        assert done.status == 0, done.err
        assert done.out.startswith("PASS")
        assert "the same model, corpus, machine and versions" in done.out
    done = run("gate", *model, *corpus, "--seed", 5, "--seq-len", 32)
    assert done.status == 2
    words = " ".join(done.out.split())
    assert "--seed 5 was given, the baseline has" in words
    Path("rows.jsonl").rename("moved.jsonl")
    done = run("gate", *model, "--baseline", path)
    assert (done.status, done.out) == (2, "")
    assert f"rows.jsonl, the baseline's corpus, looked for in {Path.cwd()}" in done.err


def test_the_command_writes_its_reports_and_never_overwrites_another_run(
    run: Run, models: Path, stored: Path
) -> None:
    done = gated(run, models / "tiny", "--output", "out")
    assert done.status == 0, done.err
    assert done.out.startswith("PASS")
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    again = gated(run, models / "tiny", "--output", "out")
    assert again.status == 2
    assert "holds another run" in again.err


def test_the_command_fails_if_decoding_is_broken_unless_only_the_prefill_is_checked(
    run: Run, models: Path, stored: Path
) -> None:
    with wrong_cache(3, CHANGES["zeroed value"])(a_stack()):
        done = gated(run, models / "tiny")
        unchecked = gated(run, models / "tiny", "--prefill-only")
    assert done.status == 1
    assert done.out.startswith("FAIL: decoding differs from the prefill from layer 3 on; ")
    assert (unchecked.status, unchecked.out[:4]) == (0, "PASS")
    assert "Decoding" not in unchecked.out


def test_another_checkpoint_exits_with_2_unless_compared_anyway(
    run: Run, models: Path, stored: Path
) -> None:
    done = gated(run, models / "other", "--baseline", stored)
    assert done.status == 2
    assert "NOT COMPARABLE" in done.out
    given = ("--model", models / "other", "--corpus", "texts.jsonl", "--seq-len", 16)
    assert run("analyze", *given, "--output", "other").status == 0
    assert run("compare", "other", stored).status == 2
    anyway = run("compare", "other", stored, "--anyway")
    assert anyway.status == 1
    assert anyway.out.startswith("FAIL")


def test_comparing_a_run_with_its_baseline_passes(run: Run, stored: Path) -> None:
    done = run("compare", "run", stored, "--output", "out")
    assert done.status == 0, done.err
    assert done.out.startswith("PASS")


def test_inconclusive_exits_with_0_and_with_strict_1(run: Run, stored: Path) -> None:
    # The margin is so narrow that the intervals of 40 short texts straddle it.
    given = ("compare", "run", "run", "--independent", "--margin", 1e-6)
    undecided, strict = run(*given), run(*given, "--strict")
    assert undecided.out.startswith("INCONCLUSIVE")
    assert (undecided.status, strict.status) == (0, 1)
    assert strict.out == undecided.out


def test_a_missing_baseline_gives_a_one_line_error_with_the_remedy(
    run: Run, models: Path, here: Path
) -> None:
    done = gated(run, models / "tiny")
    assert done.status == 2
    assert "cascade accept" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_an_edited_baseline_gives_a_one_line_error(run: Run, models: Path, stored: Path) -> None:
    text = stored.read_text()
    stored.write_text(text.replace('"mean": 0.', '"mean": 0.1', 1))
    done = gated(run, models / "tiny")
    assert (done.status, done.out) == (2, "")
    assert "was changed after it was written" in done.err
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize("options", [("--margin", 0), ("--confidence", 1), ("--margin", "nan")])
def test_an_invalid_margin_or_confidence_is_refused(
    run: Run, stored: Path, options: tuple[object, ...]
) -> None:
    done = run("compare", "run", stored, *options)
    assert done.status == 2
    assert "expected a margin above 0" in done.err


def test_analyze_stores_the_noise_floor_and_a_seal(run: Run, stored: Path) -> None:
    record = read_profile(Path("run")).record()
    assert record.noise
    assert record.noise.repeat < 1e-6
    assert str(record.hash).startswith("sha256:")
    assert read_profile(stored).record() == record


def test_accept_compares_a_run_with_the_baseline_it_replaces(run: Run, stored: Path) -> None:
    done = run("accept", "run")
    assert done.status == 0
    assert "Compared with the baseline that it replaces" in done.out
    assert "PASS" in done.out


def test_the_record_of_a_gate_has_its_steps_and_duration(baseline: StoredProfile) -> None:
    result = run_gate(a_stack(), BLOCKS, baseline, tokens=2 * LENGTH)
    assert isinstance(result, Gate)
    run = result.record().gate
    assert isinstance(run, GateRun)
    assert run.steps == [
        GateStep(tokens=LENGTH, verdict="PASS"),
        GateStep(tokens=2 * LENGTH, verdict="PASS"),
    ]
    assert run.budget_tokens == 2 * LENGTH
    assert run.seconds > 0


# --- Large baselines -------------------------------------------------------------------------


def named(profile: SaturationProfile) -> SaturationProfile:
    """Return a profile whose model has a name, as baselines are stored by."""
    about = profile.provenance
    model = replace(about.model, name="tiny", source="tiny")
    return dataclasses.replace(profile, provenance=replace(about, model=model))


def test_the_quick_gate_reads_the_rows_of_its_sequences_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "GROUP", 2)
    blocks = blocks_of(40)
    path, _ = store_profile(tmp_path, named(analyze(a_stack(), blocks)))
    baseline = read_profile(path)
    read: list[int] = []
    group = row_files.StoredRows.group

    def watched(self: Any, number: int) -> Any:
        read.append(number)
        return group(self, number)

    monkeypatch.setattr(row_files.StoredRows, "group", watched)
    length = blocks.ids.shape[1]
    found = run_gate(a_stack(), blocks, baseline, tokens=2 * length, long_context=False)
    assert found.comparison.verdict == "PASS"
    assert set(read) == {0, 19}  # the first and the last sequence, out of 20 groups


def test_the_quick_gate_reads_the_beginning_of_a_large_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    stack = DecoderStack(tiny_model("llama"), tokenizer=tokenizer)
    text = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"Text number {k} of many."}) for k in range(60)]
    text.write_text("\n".join(lines))
    blocks = load_blocks(text, tokenizer, seq_len=16)
    path, _ = store_profile(tmp_path, named(analyze(stack, blocks)))
    about = read_profile(path).record().provenance.corpus
    monkeypatch.setattr(baseline_corpus, "GATED_TOKENS", 160)
    few = baseline_corpus.baseline_blocks(about, tokenizer, GivenCorpus(), quick=True)
    assert len(few.ids) == 10 < len(blocks.ids)
    assert np.array_equal(few.ids, blocks.ids[:10])
    found = run_gate(stack, few, read_profile(path), tokens=64, long_context=False)
    assert found.comparison.verdict == "PASS"
    whole = baseline_corpus.baseline_blocks(about, tokenizer, GivenCorpus())
    assert len(whole.ids) == len(blocks.ids)


def test_the_long_sequences_of_a_large_corpus_are_at_its_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = blocks_of(40)
    length = blocks.ids.shape[1]
    monkeypatch.setattr(long_context, "GATED_TOKENS", 10 * length)
    chosen = long_context.choose_long(a_stack(), blocks, 2 * length).sequences
    assert chosen is not None
    assert chosen.starts.max() + 2 <= 10

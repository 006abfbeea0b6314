"""The gate: compare a model with its baseline on as few tokens as possible."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import msgspec.structs
import numpy as np

from cascade.core.arrays import Array
from cascade.core.cache import cache_folder
from cascade.core.display import Displayed
from cascade.core.errors import OutputError, RecordError, UsageError
from cascade.core.provenance import CorpusProvenance, Provenance, provenance_of
from cascade.core.records import read_typed, write_record
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.corpora.long_sequences import LongSequences
from cascade.gate.baselines import StoredProfile
from cascade.gate.causes.of_a_gate import changed_parts, explained, explained_long
from cascade.gate.comparison import BOS, Comparison, environment_differences, mismatches_of
from cascade.gate.decoding_check import DECODED_SEQUENCES, check_decoding
from cascade.gate.drift import LEAST_SHARED, compare
from cascade.gate.long_context_check import LongCheck
from cascade.gate.noise import measure_noise
from cascade.gate.records import ComparisonRecord, GateRun, GateStep, Mismatch, NoiseRecord
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import SaturationProfile, analyze
from cascade.stats.matching import places_in

#: The default budget of the quick gate, in tokens. A fault moves every sequence, and 512 tokens
#: separated every fault that was tried from noise (see `tests/suites/test_sensitivity.py`).
QUICK_TOKENS = 512
#: The number of sequences that the noise floor is measured on.
NOISE_SEQUENCES = 4


@dataclass(frozen=True, repr=False)
class Gate(Displayed):
    """The outcome of a gate.

    Attributes:
        comparison: The comparison with the baseline.
        steps: The comparisons, one after each batch.
        budget: The maximum number of tokens to measure.
        seconds: The duration, without loading the model.
        noise: The noise floor measured on this machine, if the baseline was made on another one.
        profile: The measured profile; None if the two are not comparable.

    Example:
        >>> gate = Gate(Comparison(None), steps=(), budget=128, seconds=1.5)
        >>> gate.comparison.verdict, gate.comparison.exit_status()
        ('NOT COMPARABLE', 2)
    """

    comparison: Comparison
    steps: tuple[GateStep, ...]
    budget: int
    seconds: float
    noise: NoiseRecord | None = None
    profile: SaturationProfile | None = None

    def record(self) -> ComparisonRecord:
        """Return the gate as a record of kind `comparison`."""
        run = GateRun(
            steps=list(self.steps),
            budget_tokens=self.budget,
            seconds=self.seconds,
            noise=self.noise,
        )
        return msgspec.structs.replace(self.comparison.record(), gate=run)

    def _to_show(self) -> tuple[ComparisonRecord, dict[str, Array]]:
        return self.record(), {}

    def _in_one_line(self) -> str:
        verdict, headline = self.comparison.verdict, self.comparison.headline()
        return f"{verdict}, {headline}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class _Task:
    """The inputs of a gate: the model, its corpus and the baseline.

    Attributes:
        start: When the gate began, by `time.perf_counter`.
        noise: The noise floor measured on this machine, if it is needed.
        about: The provenance of the run.
        batch_size: The maximum number of sequences per forward pass.
        progress: Called with the number of tokens done since the last call.
        decoded: The numbers of the sequences that are decoded; None for none.
        long: The long sequences; None if they are not checked.
    """

    stack: DecoderStack
    blocks: TokenBlocks
    baseline: StoredProfile
    start: float
    noise: NoiseRecord | None
    about: Provenance
    batch_size: int
    progress: Callable[[int], None] | None
    decoded: Array | None
    long: LongCheck | None

    def compare(self, profile: SaturationProfile) -> Comparison:
        """Compare a profile with the baseline."""
        noise = None if self.noise is None else self.noise.floor()
        return compare(profile, self.baseline, noise=noise, long_context=False)

    def outcome(
        self, profile: SaturationProfile, comparison: Comparison, steps: list[GateStep], budget: int
    ) -> Gate:
        """Explain a drift, or check long contexts and decoding; return the outcome of the gate.

        A cause that shows in the prefill would show in the next checks too.
        """
        comparison = explained(comparison, self.stack, self.blocks, self.baseline)
        agrees = comparison.method == "same sequences" and comparison.verdict == "PASS"
        if self.long is not None and agrees:
            noise = None if self.noise is None else self.noise.floor()
            long, profile = self.long.compare(self.stack, profile, self.baseline, noise)
            if long is not None:
                comparison = comparison.with_long_context(long)
                comparison = explained_long(
                    comparison, self.stack, self.long.sequences, profile, self.baseline
                )
        if self.decoded is not None and comparison.verdict != "FAIL":
            found = check_decoding(self.stack, self.blocks.ids[self.decoded])
            comparison = comparison.with_decoding(found)
        seconds = time.perf_counter() - self.start
        return Gate(comparison, tuple(steps), budget, seconds, self.noise, profile)


def run_gate(
    stack: DecoderStack,
    blocks: TokenBlocks,
    baseline: StoredProfile,
    *,
    tokens: int = QUICK_TOKENS,
    full: bool = False,
    decoding: bool = True,
    long_context: bool = True,
    batch_size: int = 32,
    conflicts: Sequence[str] = (),
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Gate:
    """Measure a model on some of its baseline's sequences and compare after each batch.

    The gate stops at the first batch that shows drift. It passes if no batch does within the
    budget, if the first long sequence of the baseline agrees with it too (see
    `cascade.gate.long_context_check`), and if passes through the model's KV cache compute what its
    prefill computes (see `cascade.gate.decoding_check`). Two runs over the same sequence involve no
    randomness, so each sequence is a separate test.

    Args:
        stack: The model.
        blocks: The baseline's corpus; with `full` it may be another one.
        baseline: The stored profile.
        tokens: The budget, rounded down to whole sequences, at least one.
        full: Measure the whole corpus and compare its table too.
        decoding: Check decoding too, on at most two sequences, unless the prefill has drifted.
        long_context: Compare a long sequence too, with `full` all of them, unless the others have
            drifted. Its tokens are not part of the budget.
        batch_size: The maximum number of sequences per forward pass.
        conflicts: Given corpus options that differ from the baseline's, in words, which explain
            why the text is another one.
        command: The user's command line, for the provenance.
        progress: Called with the number of tokens done since the last call.

    Raises:
        UsageError: The budget is below one token.
        CorpusError: A sequence is longer than the model's context.
        ModelError: A layer's output is NaN (names the layer).

    Example:
        >>> from cascade import load, load_blocks, read_profile
        >>> from cascade.gate.baseline_lookup import shipped_baselines
        >>> stack = load("smollm2-135m")
        >>> path = shipped_baselines() / "smollm2-135m-instruct-q4_1/embedded.saturation.json"
        >>> blocks = load_blocks("embedded", stack.tokenizer)
        >>> gate = run_gate(stack, blocks, read_profile(path), tokens=128)
        >>> gate.comparison.verdict
        'PASS'
    """
    if tokens < 1:
        raise UsageError(f"expected a budget of at least 1 token, got {tokens}")
    start = time.perf_counter()
    about = provenance_of(stack, blocks, command)
    expected = baseline.record().provenance
    shared = _shared(blocks, baseline)
    mismatches = mismatches_of(about, expected)
    same_text = len(shared) >= LEAST_SHARED * len(blocks.ids)
    # Text with and without BOS has no sequence in common, which would say nothing more.
    if not same_text and not full and all(one.name != BOS for one in mismatches):
        mismatches.append(_other_text(about.corpus, expected.corpus, len(shared), conflicts))
    if mismatches:
        comparison = Comparison(
            None,
            tuple(mismatches),
            notes=changed_parts(stack, baseline, mismatches),
            provenance=about,
            baseline=expected,
        )
        return Gate(comparison, (), 0, time.perf_counter() - start)
    check_blocks(stack, blocks, batch_size)
    long = LongCheck.of(stack, blocks, baseline, full=full) if long_context else None
    noise = None
    if environment_differences(about, expected):
        few = _spread(shared if same_text else np.arange(len(blocks.ids)), NOISE_SEQUENCES)
        noise = noise_here(stack, blocks.ids[few], about, None if long is None else long.sequences)
    chosen = np.arange(len(blocks.ids)) if full else _chosen(blocks, shared, tokens)
    # Half of the quick gate's sequences at most, because they run about three times.
    count = min(DECODED_SEQUENCES, max(1, len(chosen) // 2))
    decoded = _spread(chosen, count) if decoding else None
    task = _Task(
        stack,
        blocks,
        baseline,
        start,
        noise,
        about,
        batch_size,
        progress,
        decoded,
        long,
    )
    return _full(task) if full else _step_by_step(task, chosen)


def _full(task: _Task) -> Gate:
    """Measure the whole corpus and compare once."""
    profile = analyze(
        task.stack,
        task.blocks,
        batch_size=task.batch_size,
        edges=task.baseline.arrays()["edges"],
        command=task.about.command,
        progress=task.progress,
    )
    comparison = task.compare(profile)
    step = GateStep(tokens=task.blocks.tokens, verdict=comparison.verdict)
    return task.outcome(profile, comparison, [step], task.blocks.tokens)


def _step_by_step(task: _Task, chosen: Array) -> Gate:
    """Measure the chosen sequences in batches, and compare after each of them."""
    blocks, edges = task.blocks, task.baseline.arrays()["edges"]
    length = blocks.ids.shape[1]
    steps: list[GateStep] = []
    parts: list[SaturationProfile] = []
    seen = 0
    while seen < len(chosen):
        # Double the sample each time, so that few comparisons are needed.
        size = min(max(1, seen), task.batch_size, len(chosen) - seen)
        some = replace(blocks, ids=blocks.ids[chosen[seen : seen + size]])
        parts.append(analyze(task.stack, some, batch_size=size, edges=edges))
        seen += size
        profile = _joined(parts, replace(blocks, ids=blocks.ids[chosen[:seen]]), task.about)
        comparison = task.compare(profile)
        steps.append(GateStep(tokens=seen * length, verdict=comparison.verdict))
        if task.progress is not None:
            task.progress(some.tokens)
        if comparison.verdict != "PASS":
            break
    return task.outcome(profile, comparison, steps, len(chosen) * length)


def _joined(
    parts: list[SaturationProfile], blocks: TokenBlocks, about: Provenance
) -> SaturationProfile:
    """Return the profiles of several batches as one, with sequences numbered consecutively."""
    whole = parts[0].statistics
    shift = len(parts[0].sequence_fingerprints)
    for part in parts[1:]:
        whole = whole.merge(part.statistics.renumbered(shift))
        shift += len(part.sequence_fingerprints)
    return SaturationProfile(whole, blocks.sequence_fingerprints(), about)


def quick_blocks(
    blocks: TokenBlocks, baseline: StoredProfile, tokens: int = QUICK_TOKENS
) -> TokenBlocks:
    """Return the sequences that the quick gate measures if it does not stop early.

    Args:
        blocks: The baseline's corpus.
        baseline: The stored profile.
        tokens: The budget, rounded down to whole sequences, at least one.

    Returns:
        Sequences of the baseline, evenly spread over the corpus; none if the corpus has none of
        them.
    """
    return replace(blocks, ids=blocks.ids[_chosen(blocks, _shared(blocks, baseline), tokens)])


def _chosen(blocks: TokenBlocks, shared: Array, tokens: int) -> Array:
    return _spread(shared, max(1, tokens // blocks.ids.shape[1]))


def _shared(blocks: TokenBlocks, baseline: StoredProfile) -> Array:
    known = baseline.arrays()["sequence_fingerprint"]
    return places_in(blocks.sequence_fingerprints(), known)[0]


def _spread(numbers: Array, count: int) -> Array:
    """Return `count` of the numbers, evenly spread; all of them if there are fewer."""
    places = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    spread: Array = numbers[np.unique(places)]
    return spread


def _other_text(
    new: CorpusProvenance, old: CorpusProvenance, shared: int, conflicts: Sequence[str]
) -> Mismatch:
    expected, obtained = (f"{side.name} in sequences of {side.seq_len}" for side in (old, new))
    if expected == obtained:  # same name, different text
        expected = f"{expected} ({old.fingerprint[:19]}...)"
        obtained = f"{obtained} ({new.fingerprint[:19]}...)"
    usual = "use the baseline's corpus, tokenizer settings and --seq-len"
    remedy = f"{', '.join(conflicts)}; leave it out" if conflicts else usual
    return Mismatch(
        name="corpus",
        expected=expected,
        obtained=obtained,
        remedy=f"{shared or 'none'} of its {new.sequences:,} sequences are in the baseline; "
        f"{remedy}, or compare means over the whole corpus with --full",
    )


def noise_here(
    stack: DecoderStack, ids: Array, about: Provenance, long: LongSequences | None = None
) -> NoiseRecord:
    """Return the noise floor of this model on this machine, measured once and cached.

    Args:
        stack: The model.
        ids: `[B, T]` token ids of a few sequences.
        about: The provenance of the run.
        long: Long sequences, of which the first is measured too; None for none.
    """
    # A model in memory is known by its weights alone.
    model = msgspec.structs.replace(about.model, weights_hash=stack.weights_hash())
    origin = to_plain(msgspec.structs.replace(about, model=model))
    key = [origin.get(name) for name in ("model", "tokenizer_hash", "machine", "versions")]
    if long is not None:
        key.append(sha256(long.ids[:1].tobytes()).hexdigest())
    digest = sha256(
        json.dumps([key, sha256(ids.tobytes()).hexdigest()], allow_nan=False).encode()
    ).hexdigest()
    path = cache_folder() / "noise" / f"{digest[:24]}.json"
    with contextlib.suppress(RecordError):  # not measured yet, or torn: measure now
        return read_typed(path, NoiseRecord)
    found = NoiseRecord.of(measure_noise(stack, ids, long))
    with contextlib.suppress(OutputError):  # without a cache, the next run measures again
        write_record(path, found)
    return found


def quick_ids(blocks: TokenBlocks, count: int = NOISE_SEQUENCES) -> Array:
    """Return the token ids of a few sequences spread over a corpus, `[count, T]`."""
    return blocks.ids[_spread(np.arange(len(blocks.ids)), count)]

"""The gate: a model measured against its baseline, on as few tokens as decide."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np

from cascade.core.errors import OutputError, RecordError, UsageError
from cascade.core.provenance import provenance_of, typed_provenance
from cascade.core.records import Record, read_record, write_record
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.gate.baselines import StoredProfile
from cascade.gate.drift import LEAST_SHARED, Comparison, compare, made_elsewhere, mismatches_of
from cascade.gate.noise import measure_noise
from cascade.models.stack import DecoderStack
from cascade.models.weights import cache_folder
from cascade.saturation.profile import SaturationProfile, analyze

#: The least budget of the quick gate, in tokens: a fault moves every sequence, and 512 tokens
#: separate all that were tried from noise (see `tests/test_sensitivity.py`).
QUICK_TOKENS = 512
#: Sequences that the noise floor is measured on.
NOISE_SEQUENCES = 4


@dataclass(frozen=True)
class Gate:
    """What came of a gate.

    Attributes:
        comparison: Against the baseline.
        looks: After each batch: tokens so far, and the verdict then.
        budget: The most tokens that it would have taken.
        seconds: How long it took, the model's loading left out.
        noise: The noise floor measured here, where the baseline was made elsewhere.
        profile: What was measured; None where the two could not be compared.
    """

    comparison: Comparison
    looks: tuple[tuple[int, str], ...]
    budget: int
    seconds: float
    noise: Record | None = None
    profile: SaturationProfile | None = None

    def record(self) -> Record:
        """Return the gate as a record of kind `comparison`."""
        return self.comparison.record() | {
            "gate": {
                "looks": [{"tokens": tokens, "verdict": verdict} for tokens, verdict in self.looks],
                "budget_tokens": self.budget,
                "seconds": self.seconds,
                "noise": self.noise,
            }
        }


def run_gate(
    stack: DecoderStack,
    blocks: TokenBlocks,
    baseline: StoredProfile,
    *,
    tokens: int = QUICK_TOKENS,
    full: bool = False,
    batch_size: int = 32,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Gate:
    """Measure a model on some of its baseline's sequences and compare, batch by batch.

    It stops at the first batch that shows drift, and passes what shows none within the budget:
    paired sequences have no chance in them, so that each of them is a test of its own.

    Args:
        stack: The model.
        blocks: The baseline's corpus; with `full` it may be another one.
        baseline: The stored profile.
        tokens: The budget, rounded down to whole sequences, at least one.
        full: Measure the whole corpus, table included.
        batch_size: The most sequences per forward pass.
        command: What the user ran, for the provenance.
        progress: Called with the number of tokens done since the last call.

    Raises:
        UsageError: A budget of no tokens.
        CorpusError: Sequences beyond the model's positions.
        ModelError: A layer's output is NaN (names the layer).
    """
    if tokens < 1:
        raise UsageError(f"expected a budget of at least 1 token, got {tokens}")
    start = time.perf_counter()
    about = to_plain(provenance_of(stack, blocks, command))
    expected = baseline.record()["provenance"]
    shared = _shared(blocks, baseline)
    mismatches = mismatches_of(about, expected)
    same_text = len(shared) >= LEAST_SHARED * len(blocks.ids)
    if not same_text and not full:
        mismatches.append(_other_text(about, expected, len(shared)))
    if mismatches:
        comparison = Comparison(None, tuple(mismatches), provenance=about, baseline=expected)
        return Gate(comparison, (), 0, time.perf_counter() - start)
    check_blocks(stack, blocks, batch_size)
    noise = None
    if made_elsewhere(about, expected):
        few = _spread(shared if same_text else np.arange(len(blocks.ids)), NOISE_SEQUENCES)
        noise = noise_here(stack, blocks.ids[few], about)
    if full:
        profile = analyze(
            stack,
            blocks,
            batch_size=batch_size,
            edges=baseline.arrays()["edges"],
            command=command,
            progress=progress,
        )
        comparison = compare(profile, baseline, noise=noise)
        looks = ((blocks.tokens, comparison.verdict),)
        return Gate(comparison, looks, blocks.tokens, time.perf_counter() - start, noise, profile)
    chosen = _chosen(blocks, shared, tokens)
    return _look_by_look(stack, blocks, baseline, chosen, noise, about, batch_size, start, progress)


def _look_by_look(
    stack: DecoderStack,
    blocks: TokenBlocks,
    baseline: StoredProfile,
    chosen: Any,
    noise: Record | None,
    about: Record,
    batch_size: int,
    start: float,
    progress: Callable[[int], None] | None,
) -> Gate:
    looks: list[tuple[int, str]] = []
    parts: list[SaturationProfile] = []
    seen = 0
    while seen < len(chosen):
        # As many again as were seen: few looks, and the first of them after one sequence.
        size = min(max(1, seen), batch_size, len(chosen) - seen)
        some = replace(blocks, ids=blocks.ids[chosen[seen : seen + size]])
        parts.append(analyze(stack, some, batch_size=size, edges=baseline.arrays()["edges"]))
        seen += size
        profile = _joined(parts, replace(blocks, ids=blocks.ids[chosen[:seen]]), about)
        comparison = compare(profile, baseline, noise=noise)
        looks.append((seen * blocks.ids.shape[1], comparison.verdict))
        if progress is not None:
            progress(some.tokens)
        if comparison.verdict != "PASS":
            break
    budget = len(chosen) * blocks.ids.shape[1]
    seconds = time.perf_counter() - start
    return Gate(comparison, tuple(looks), budget, seconds, noise, profile)


def _joined(
    parts: list[SaturationProfile], blocks: TokenBlocks, about: Record
) -> SaturationProfile:
    """Return the profiles of several batches as one, its sequences numbered through."""
    whole = parts[0].statistics
    shift = len(parts[0].sequence_fingerprints)
    for part in parts[1:]:
        whole = whole.merge(part.statistics.renumbered(shift))
        shift += len(part.sequence_fingerprints)
    provenance = typed_provenance(about)
    return SaturationProfile(whole, blocks.sequence_fingerprints(), provenance)


def quick_blocks(
    blocks: TokenBlocks, baseline: StoredProfile, tokens: int = QUICK_TOKENS
) -> TokenBlocks:
    """Return the sequences that the quick gate takes when nothing stops it before.

    Args:
        blocks: The baseline's corpus.
        baseline: The stored profile.
        tokens: The budget, rounded down to whole sequences, at least one.

    Returns:
        Sequences of the baseline's, spread over the corpus; none where it holds none of them.
    """
    return replace(blocks, ids=blocks.ids[_chosen(blocks, _shared(blocks, baseline), tokens)])


def _chosen(blocks: TokenBlocks, shared: Any, tokens: int) -> Any:
    return _spread(shared, max(1, tokens // blocks.ids.shape[1]))


def _shared(blocks: TokenBlocks, baseline: StoredProfile) -> Any:
    known = baseline.arrays()["sequence_fingerprint"]
    return np.flatnonzero(np.isin(blocks.sequence_fingerprints(), known))


def _spread(numbers: Any, count: int) -> Any:
    """Return `count` of the numbers, evenly spread over all of them; all where there are fewer."""
    places = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return numbers[np.unique(places)]


def _other_text(about: Record, expected: Record, shared: int) -> tuple[str, Any, Any, str]:
    sizes = [
        f"{side['corpus'].get('name')} in sequences of {side['corpus'].get('seq_len')}"
        for side in (expected, about)
    ]
    if sizes[0] == sizes[1]:  # of the same name, but other text
        prints = (str(side["corpus"].get("fingerprint"))[:19] for side in (expected, about))
        sizes = [f"{size} ({text}...)" for size, text in zip(sizes, prints, strict=True)]
    return (
        "corpus",
        sizes[0],
        sizes[1],
        f"{shared or 'none'} of its {about['corpus']['sequences']:,} sequences are the baseline's: "
        "take the baseline's corpus, tokenizer settings and --seq-len, or compare means over all of"
        " it with --full",
    )


def noise_here(stack: DecoderStack, ids: Any, about: Record) -> Record:
    """Return the noise floor of this model on this machine, measured once and kept in the cache.

    Args:
        stack: The model.
        ids: `[B, T]` token ids of a few sequences.
        about: The provenance of the run.
    """
    key = [about["model"], about["tokenizer_hash"], about["machine"], about["versions"]]
    digest = sha256(json.dumps([key, sha256(ids.tobytes()).hexdigest()]).encode()).hexdigest()
    path = cache_folder() / "noise" / f"{digest[:24]}.json"
    with contextlib.suppress(RecordError):  # not measured yet, or torn: then it is measured now
        return read_record(path, kind="noise")
    found = {"schema": 1, "kind": "noise"} | measure_noise(stack, ids)
    with contextlib.suppress(OutputError):  # without a cache the next run measures again
        write_record(path, found)
    return found


def quick_ids(blocks: TokenBlocks, count: int = NOISE_SEQUENCES) -> Any:
    """Return the token ids of a few sequences spread over a corpus, `[count, T]`."""
    return blocks.ids[_spread(np.arange(len(blocks.ids)), count)]

"""Baselines made anew: measured over the whole corpus, with their noise floor, and stored."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cascade.core.files import write_text
from cascade.core.records import SCHEMAS, Record, packed
from cascade.core.schema import from_plain, to_plain
from cascade.corpora.blocks import TokenBlocks
from cascade.gate.baselines import StoredProfile, seal, store
from cascade.gate.budgets import accept_budgets
from cascade.gate.drift import compare
from cascade.gate.noise import measure_noise
from cascade.gate.quick_gate import quick_ids
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import SaturationProfile, analyze
from cascade.saturation.records import NoiseFloor


def measure_whole(
    stack: DecoderStack,
    blocks: TokenBlocks,
    *,
    batch_size: int = 32,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> SaturationProfile:
    """Measure what a baseline is made of: every sequence, and what arithmetic alone moves.

    Args:
        stack: The model.
        blocks: The whole corpus.
        batch_size: Sequences per forward pass.
        command: What the user ran, for the provenance.
        progress: Called with the number of tokens done since the last call.

    Raises:
        CorpusError: Sequences beyond the model's positions.
        ModelError: A layer's output is NaN (names the layer).
    """
    profile = analyze(stack, blocks, batch_size=batch_size, command=command, progress=progress)
    return replace(profile, noise=from_plain(measure_noise(stack, quick_ids(blocks)), NoiseFloor))


def store_profile(
    folder: Path, profile: SaturationProfile | StoredProfile
) -> tuple[Path, StoredProfile | None]:
    """Seal a profile and store it as the baseline of its model and corpus.

    Args:
        folder: The folder of all baselines.
        profile: What was measured.

    Returns:
        The baseline's path, and the one that it replaces, if there was one that can be read.

    Raises:
        RecordError: Its provenance names no model or corpus.
        OutputError: The baseline cannot be written; the one before is unharmed.
    """
    arrays = profile.arrays()
    return store(folder, seal(to_plain(profile.record()), arrays), packed(arrays))


def still_holds(profile: SaturationProfile | StoredProfile, before: StoredProfile) -> bool:
    """Say whether a stored baseline need not be made anew: same sequences, nothing moved.

    Args:
        profile: Of the whole corpus.
        before: The stored one.
    """
    seen = [sorted(side.arrays()["sequence_fingerprint"]) for side in (profile, before)]
    current = before.record()["schema"] == SCHEMAS["saturation"]
    return current and seen[0] == seen[1] and compare(profile, before).verdict == "PASS"


def replace_budgets(path: Path, evaluations: Sequence[Record]) -> None:
    """Store evaluations' given points as the only budgets of a file.

    Args:
        path: The file.
        evaluations: Of one model and corpus.

    Raises:
        RecordError: An evaluation is torn, has no given point, or is of another model than the
            first.
        OutputError: The file cannot be written; the one before is unharmed.
    """
    with tempfile.TemporaryDirectory() as folder:
        for evaluation in evaluations:
            made = accept_budgets(Path(folder), evaluation).path
        write_text(path, made.read_text(encoding="utf-8"))

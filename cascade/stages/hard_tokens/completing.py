"""Complete a dataset whose states are stored: threshold, hard mask, layout and record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cascade.core.arrays import Array
from cascade.core.errors import UsageError
from cascade.core.files import files_below, write_text
from cascade.core.provenance import SPLITS, Split, provenance_of
from cascade.core.records import sealed, write_record
from cascade.core.schema import from_plain
from cascade.stages.hard_tokens.dataset import RECORD, SPLITS_FILE, hash_of
from cascade.stages.hard_tokens.plan import CollectionPlan
from cascade.stages.hard_tokens.records import (
    DatasetFile,
    HardTokensProvenance,
    HardTokensRecord,
    SplitCounts,
    StoredStates,
)
from cascade.stages.hard_tokens.shards import mark_hard, read_similarity, write_split
from cascade.stages.hard_tokens.splits import MarkedText
from cascade.stats.decision import least_fp32, reaches
from cascade.stats.thresholds import quantile_threshold

#: Largest difference between the requested and the actual hard ratio that gets no note.
_TOLERATED = 0.05

Counts = Mapping[Split, SplitCounts]


def complete(plan: CollectionPlan, folder: Path, *, own_files: tuple[str, ...]) -> None:
    """Choose the threshold, set the hard mask and write the other files, the record last.

    Args:
        plan: Plan of the collection.
        folder: Folder that holds all shards.
        own_files: Names of files and folders in it that do not belong to the dataset.

    Raises:
        UsageError: No token or every token of a split is hard.
        OutputError: A file cannot be written.
    """
    similarity = {
        split: np.concatenate(
            [read_similarity(folder / shard.name) for shard in plan.shards_of(split)]
        )
        for split in SPLITS
    }
    threshold = _threshold_of(plan, similarity["train"])
    counts = {
        split: _counts(plan.texts[split], ~reaches(values, threshold))
        for split, values in similarity.items()
    }
    _check_mixed(plan.layer, counts, threshold)
    for shard in plan.shards:
        mark_hard(folder / shard.name, least_fp32(threshold))
    for split in SPLITS:
        names = [Path(shard.name).name for shard in plan.shards_of(split)]
        # `datasets` derives the names of its cached results from this text.
        made_of = f"{plan.request_hash} {threshold!r} {split}"
        write_split(folder / split, names, plan.features, made_of=made_of)
    write_text(folder / SPLITS_FILE, json.dumps({"splits": list(SPLITS)}, allow_nan=False) + "\n")
    files = _files(folder, own_files)
    write_record(folder / RECORD, _record(plan, threshold, counts, files))


def _threshold_of(plan: CollectionPlan, similarity: Array) -> float:
    """Return the given threshold, or fit one to the hard ratio on the training split."""
    if plan.config.threshold is not None:
        return float(plan.config.threshold)
    if plan.config.hard_ratio is not None:
        return float(quantile_threshold(similarity, plan.config.hard_ratio))
    raise UsageError(
        "expected a threshold or a hard ratio, got neither; give --threshold or --hard-ratio"
    )


def _counts(text: MarkedText, hard: Array) -> SplitCounts:
    return SplitCounts(
        sequences=len(hard),
        tokens=int(hard.size),
        hard=int(hard.sum()),
        hard_ratio=float(hard.mean()),
        response=int(text.response.sum()),
        hard_response=int((hard & text.response).sum()),
    )


def _check_mixed(layer: int, counts: Counts, threshold: float) -> None:
    for split, row in counts.items():
        if row.hard in (0, row.tokens):
            which = "no token" if row.hard == 0 else "every token"
            raise UsageError(
                f"{which} of the {split} split is hard (the similarity at layer {layer} is "
                f"{'never' if row.hard == 0 else 'always'} below {threshold:.6g}); choose another "
                "--threshold or --hard-ratio (the collected states are kept and reused)"
            )


def _files(folder: Path, own_files: tuple[str, ...]) -> list[DatasetFile]:
    return [
        DatasetFile(
            name=path.relative_to(folder).as_posix(),
            bytes=path.stat().st_size,
            hash=hash_of(path),
        )
        for path in files_below(folder)
        if path.relative_to(folder).parts[0] not in own_files
    ]


def _record(
    plan: CollectionPlan, threshold: float, counts: Counts, files: list[DatasetFile]
) -> HardTokensRecord:
    record = HardTokensRecord(
        provenance=_provenance(plan),
        layer=plan.layer,
        threshold=threshold,
        requested=plan.config.requested(),
        states=StoredStates(
            entry=plan.stack.num_layers,
            dtype=plan.config.dtype,
            seq_len=plan.seq_len,
            hidden_size=plan.stack.hidden_size,
        ),
        batch_size=plan.config.batch_size,
        splits=dict(counts),
        notes=_notes(plan, threshold, counts),
        request=plan.request_hash,
        files=files,
        hash="",
    )
    return from_plain(sealed(record), HardTokensRecord)


def _provenance(plan: CollectionPlan) -> HardTokensProvenance:
    made = provenance_of(plan.stack, plan.texts["train"].blocks, plan.config.command)
    return HardTokensProvenance(
        tokenizer_hash=made.tokenizer_hash,
        model=plan.request.model,
        machine=made.machine,
        versions=made.versions,
        command=made.command,
        corpora={split: plan.texts[split].blocks.provenance() for split in SPLITS},
    )


def _notes(plan: CollectionPlan, threshold: float, counts: Counts) -> list[str]:
    notes = []
    wanted, reached = plan.config.hard_ratio, counts["train"].hard_ratio
    if wanted is not None and abs(wanted - reached) > _TOLERATED:
        notes.append(
            f"--threshold {threshold:.6g} is used: it makes {reached:.3f} of the training tokens "
            f"hard, while --hard-ratio asked for {wanted:.3f}"
        )
    train, held_out = (
        set(plan.texts[split].blocks.sequence_fingerprints().tolist()) for split in SPLITS
    )
    if train & held_out:
        notes.append(
            f"{len(train & held_out)} of the held-out sequences are also in the training split, so "
            "held-out results are too optimistic"
        )
    return notes

"""Cascades as inputs of commands: reading one from its folder, and measuring it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.cli.console import command_line, progress_bar, status
from cascade.cli.options import (
    BatchSize,
    DeviceOptions,
    MaxTokens,
    OutputOptions,
    Seed,
    TextOptions,
)

if TYPE_CHECKING:
    from cascade.stages.cascades import Cascade
    from cascade.stages.records import CascadeEvaluationRecord


def read_cascade(folder: Path, dtype: str, device: str) -> Cascade:
    """Return the cascade in a folder; its record says where its base is loaded from."""
    from cascade.stages.cascades import Cascade

    with status(f"Loading {folder} (a first time can take half a minute)"):
        return Cascade.from_pretrained(str(folder), dtype=dtype, device=device)


@dataclass(frozen=True)
class CascadeEvaluationOptions(TextOptions, DeviceOptions, OutputOptions):
    """The options that `cascade evaluate` accepts together with --cascade."""

    cascade: Path | None = None
    max_tokens: MaxTokens = None
    batch_size: BatchSize = 8
    seed: Seed = 0


def evaluate_stages(folder: Path, options: CascadeEvaluationOptions) -> CascadeEvaluationRecord:
    """Measure the cascade in a folder, and its controls, on held-out text; return the record."""
    from cascade.corpora.blocks import load_blocks
    from cascade.stages.controls import read_controls
    from cascade.stages.evaluation import evaluate_cascade

    cascade = read_cascade(folder, options.dtype, options.device)
    controls = read_controls(folder, cascade.base)
    with status(f"Reading {options.corpus}"):
        blocks = load_blocks(
            options.corpus,
            cascade.base.tokenizer,
            seq_len=options.seq_len,
            num_samples=None,
            max_tokens=options.max_tokens,
            text_column=options.text_column,
            bos=options.bos,
            record_split="held-out",
            marks=True,
        )
    with progress_bar("Evaluating", blocks.tokens) as advance:
        return evaluate_cascade(
            cascade,
            blocks,
            controls=controls,
            batch_size=options.batch_size,
            seed=options.seed,
            command=command_line(),
            progress=advance,
        )

"""Options that several commands take: the same name, the same words, the same range."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from cascade.cli.console import DEVICE_HELP, DTYPE_HELP, MODEL_HELP

Model = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
Revision = Annotated[str | None, typer.Option("--revision", help="Revision of a hub model.")]
Dtype = Annotated[str, typer.Option("--dtype", help=DTYPE_HELP)]
Device = Annotated[str, typer.Option("--device", help=DEVICE_HELP)]
Corpus = Annotated[
    str,
    typer.Option("--corpus", help="embedded, a .jsonl/.json/.parquet/.txt file, or a hub dataset."),
]
Split = Annotated[str | None, typer.Option("--split", help="Split of a hub or embedded corpus.")]
Column = Annotated[
    str | None,
    typer.Option("--text-column", help="Column to read, where records are not in Alpaca form."),
]
NumSamples = Annotated[
    int, typer.Option("--num-samples", min=0, help="Records to take; 0 for all.")
]
SeqLen = Annotated[int, typer.Option("--seq-len", min=2, help="Tokens per sequence.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=1, help="Stop at this many tokens.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences per forward pass.")]
Output = Annotated[Path | None, typer.Option("--output", help="Folder for the results.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")
]
PropagationOption = Annotated[
    str,
    typer.Option("--propagation", help="What upper layers see of exited tokens."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of draws and intervals.")]

RULES_HELP = "cosine, mean_cosine, top2_gap, max_probability, entropy, patience, ..."


def given(context: typer.Context, names: Collection[str]) -> list[str]:
    """Return which of some options the command line gives, as it spells them, in its own order."""
    return [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name in names
        and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]

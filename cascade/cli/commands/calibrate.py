"""`cascade calibrate`."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from cascade.cli.app import app
from cascade.cli.commands.evaluate import Heads
from cascade.cli.console import command_line, load_model, print_record, progress_bar
from cascade.cli.inputs import embedded, read_blocks, read_heads, usual_layer
from cascade.cli.options import (
    RULES_HELP,
    Column,
    Corpus,
    Device,
    Dtype,
    MaxTokens,
    Model,
    Output,
    Overwrite,
    PropagationOption,
    Revision,
    Seed,
    SeqLen,
    Split,
)
from cascade.core.errors import UsageError


@app.command()
def calibrate(
    layer: Annotated[
        int | None, typer.Option(help="Exit layer; the last but one, or the heads', without.")
    ] = None,
    rule: Annotated[str, typer.Option(help=f"Exit rule: {RULES_HELP}")] = "cosine",
    hard_ratio: Annotated[
        list[float] | None, typer.Option(help="Share of hard tokens; repeatable.")
    ] = None,
    risk: Annotated[
        float | None,
        typer.Option(help="Certify: at most this share of tokens differs from the full model's."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="How sure the certificate must be.")] = 0.95,
    transfer_to: Annotated[
        str | None, typer.Option(help="Another corpus, to see what the thresholds do there.")
    ] = None,
    transfer_split: Annotated[str | None, typer.Option(help="Split of that corpus.")] = None,
    transfer_text_column: Annotated[
        str | None, typer.Option(help="Column to read of that corpus.")
    ] = None,
    model: Model = "smollm2-135m",
    revision: Revision = None,
    heads: Heads = None,
    propagation: PropagationOption = "frozen",
    corpus: Corpus = "embedded",
    split: Split = None,
    text_column: Column = None,
    seq_len: SeqLen = 128,
    max_tokens: MaxTokens = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Seed = 0,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Fit thresholds for hard ratios, with intervals; or certify one for a risk.

    Of the embedded corpus the held-out split is taken: heads are fitted on
    the other. With --output, writes calibration.json, which `cascade generate
    --calibration` runs with.
    """
    from cascade.core.files import RunFolder
    from cascade.report.exits.calibration import print_calibration

    with contextlib.ExitStack() as cleanup:
        folder = None
        if output is not None:
            names = ("calibration.json",)
            folder = cleanup.enter_context(RunFolder(output, names, overwrite=overwrite))
        from cascade.core.records import to_json
        from cascade.core.schema import to_plain
        from cascade.evaluation import calibration

        stack = load_model(model, revision, dtype, device)
        fitted = read_heads(heads, stack)
        config = calibration.CalibrationConfig(
            layer=layer if layer is not None else usual_layer(stack, fitted),
            rule=rule,
            hard_ratios=tuple(hard_ratio or (0.3, 0.5, 0.7)),
            propagation=propagation,  # type: ignore[arg-type]  # checked by the config itself
            risk=risk,
            confidence=confidence,
            seed=seed,
        )
        config.check()
        if transfer_to is None and (transfer_split or transfer_text_column):
            raise UsageError(
                "--transfer-split and --transfer-text-column are of the corpus that --transfer-to "
                "names; give it"
            )
        blocks = read_blocks(
            stack, corpus, split or embedded(corpus, "held-out"), text_column, seq_len, max_tokens
        )
        onto = None
        if transfer_to is not None:
            onto = read_blocks(
                stack,
                transfer_to,
                transfer_split or embedded(transfer_to, "held-out"),
                transfer_text_column,
                seq_len,
                max_tokens,
            )
        total = calibration.tokens_to_read(blocks, config, onto=onto)
        with progress_bar("Calibrating", total) as advance:
            record = calibration.calibrate(
                stack,
                blocks,
                config,
                heads=fitted,
                onto=onto,
                command=command_line(),
                progress=advance,
            )
        if folder is not None:
            folder.write("calibration.json", to_json(to_plain(record)) + "\n")
    print_record(print_calibration, record)
    if output is not None:
        typer.echo(f"Wrote {output / 'calibration.json'}", err=True)

"""`cascade fit-heads` and `cascade calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade.cli.app import command
from cascade.cli.console import command_line, print_record, progress_bar
from cascade.cli.inputs import load_model, read_blocks, read_heads, read_layers, usual_layer
from cascade.cli.options import (
    RULES_HELP,
    BatchSize,
    Behind,
    CorpusOptions,
    First,
    HeadOptions,
    ModelOptions,
    OutputOptions,
    Overwrite,
    Seed,
    picked,
)
from cascade.cli.output import check_free, run_folder, say_wrote, write_json
from cascade.core.defaults import HARD_RATIOS
from cascade.core.errors import UsageError
from cascade.core.schema import known

if TYPE_CHECKING:
    from cascade.corpora.blocks import TokenBlocks
    from cascade.models.stack import DecoderStack


@dataclass(frozen=True)
class FittingOptions:
    """Which heads are fitted, how, and where they go."""

    output: Annotated[Path, typer.Option(help="The safetensors file to write."), First()]
    layers: Annotated[str, typer.Option(help="Exit layers, e.g. 20,24,28.")]
    distill: Annotated[
        int,
        typer.Option(min=0, help="Then learn from the full model, in so many passes."),
        Behind("batch_size"),
    ] = 0
    half: Annotated[
        bool,
        typer.Option("--half", help="Store in 16 bits: half the size."),
        Behind("distill"),
    ] = False
    overwrite: Overwrite = False


@command("fit-heads")
def fit_heads(
    fitting: FittingOptions,
    model: ModelOptions,
    corpus: CorpusOptions,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
) -> None:
    """Fit exit heads in closed form, and maps that tell upper layers of exited tokens.

    One pass over the corpus (of the embedded one: its training split).
    --distill goes on from there, and keeps what is better on sequences
    kept aside.
    """
    output = fitting.output
    wanted = read_layers(fitting.layers)
    check_free(output, overwrite=fitting.overwrite)
    from cascade.core.provenance import provenance_of
    from cascade.exits import distillation, head_fitting

    stack = load_model(model)
    blocks = read_blocks(stack, corpus, embedded_split="train")
    with progress_bar("Fitting", blocks.tokens) as advance:
        fitted = head_fitting.fit_heads(
            stack,
            blocks,
            wanted,
            batch_size=batch_size,
            provenance=provenance_of(stack, blocks, command_line()),
            progress=advance,
        )
    if fitting.distill:
        tokens = fitting.distill * distillation.trained_tokens(blocks)
        with progress_bar("Distilling", tokens) as advance:
            fitted = distillation.distill(
                stack,
                fitted,
                blocks,
                epochs=fitting.distill,
                batch_size=batch_size,
                seed=seed,
                progress=advance,
            )
    fitted.save(output, half=fitting.half)
    # Printed after everything is saved: the disk behind stdout can be full.
    size = output.stat().st_size / 1e6
    typer.echo(f"Wrote {output} ({size:.1f} MB): heads for the layers {fitting.layers}", err=True)
    distilled = known(fitted.provenance.distillation)
    losses_of = {} if distilled is None else distilled.kl_on_sequences_kept_aside
    for layer, losses in losses_of.items():
        typer.echo(
            f"Layer {layer}: KL to the full model {losses[0]:.4f} nats in closed form, "
            f"{min(losses):.4f} distilled (on sequences kept aside)"
        )


@dataclass(frozen=True)
class CalibrationOptions:
    """What is calibrated."""

    layer: Annotated[
        int | None, typer.Option(help="Exit layer; the last but one, or the heads', without.")
    ] = None
    rule: Annotated[str, typer.Option(help=f"Exit rule: {RULES_HELP}")] = "cosine"
    hard_ratio: Annotated[
        list[float] | None, typer.Option(help="Share of hard tokens; repeatable.")
    ] = None
    risk: Annotated[
        float | None,
        typer.Option(help="Certify: at most this share of tokens differs from the full model's."),
    ] = None
    confidence: Annotated[float, typer.Option(help="How sure the certificate must be.")] = 0.95


@dataclass(frozen=True)
class TransferOptions:
    """The other corpus that thresholds are tried on."""

    transfer_to: Annotated[
        str | None, typer.Option(help="Another corpus, to see what the thresholds do there.")
    ] = None
    transfer_split: Annotated[str | None, typer.Option(help="Split of that corpus.")] = None
    transfer_text_column: Annotated[
        str | None, typer.Option(help="Column to read of that corpus.")
    ] = None

    def check(self) -> None:
        """Refuse a split or a column of no corpus."""
        if self.transfer_to is None and (self.transfer_split or self.transfer_text_column):
            raise UsageError(
                "--transfer-split and --transfer-text-column are of the corpus that --transfer-to "
                "names; give it"
            )

    def read(self, stack: DecoderStack, sizes: CorpusOptions) -> TokenBlocks | None:
        """Read the corpus, if there is one, in sequences as long and as many as the other's."""
        if self.transfer_to is None:
            return None
        other = picked(
            CorpusOptions,
            sizes,
            corpus=self.transfer_to,
            split=self.transfer_split,
            text_column=self.transfer_text_column,
        )
        return read_blocks(stack, other, embedded_split="held-out")


@command("calibrate")
def calibrate(
    wanted: CalibrationOptions,
    transfer: TransferOptions,
    model: ModelOptions,
    heads: HeadOptions,
    corpus: CorpusOptions,
    output: OutputOptions,
    seed: Seed = 0,
) -> None:
    """Fit thresholds for hard ratios, with intervals; or certify one for a risk.

    Of the embedded corpus the held-out split is taken: heads are fitted on
    the other. With --output, writes calibration.json, which `cascade generate
    --calibration` runs with.
    """
    from cascade.report.exits.calibration import print_calibration

    name = "calibration.json"
    with run_folder(output.output, [name], overwrite=output.overwrite) as folder:
        from cascade.evaluation import calibration

        stack = load_model(model)
        fitted = read_heads(heads.heads, stack)
        config = calibration.CalibrationConfig(
            layer=wanted.layer if wanted.layer is not None else usual_layer(stack, fitted),
            rule=wanted.rule,
            hard_ratios=tuple(wanted.hard_ratio or HARD_RATIOS),
            propagation=heads.propagation,  # type: ignore[arg-type]  # checked by the config
            risk=wanted.risk,
            confidence=wanted.confidence,
            seed=seed,
        )
        config.check()
        transfer.check()
        blocks = read_blocks(stack, corpus, embedded_split="held-out")
        onto = transfer.read(stack, corpus)
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
        write_json(folder, name, record)
    print_record(print_calibration, record)
    say_wrote(output.output, name)

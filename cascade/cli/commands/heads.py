"""`cascade fit-heads` and `cascade calibrate`: fit exit heads and thresholds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from cascade.cli import completion
from cascade.cli.app import command
from cascade.cli.console import command_line, message, progress_bar, show_record
from cascade.cli.engines import EngineOptions
from cascade.cli.inputs import load_model, read_blocks, read_heads, read_layers, usual_layer
from cascade.cli.options import (
    BatchSize,
    CorpusOptions,
    ExitLayerOfHeads,
    HeadOptions,
    OutputOptions,
    Overwrite,
    PlacedModelOptions,
    PrintOptions,
    Seed,
    picked,
)
from cascade.cli.output import check_free, run_folder, say_wrote, write_json
from cascade.core.defaults import HARD_RATIOS
from cascade.core.errors import UsageError
from cascade.core.schema import known

if TYPE_CHECKING:
    from rich.console import Console

    from cascade.corpora.blocks import TokenBlocks
    from cascade.exits.records import HeadsMetadata
    from cascade.models.stack import DecoderStack


@dataclass(frozen=True)
class FittingOptions(PrintOptions):
    """Which heads are fitted, how, and where they are written."""

    panel: ClassVar[str] = "Fitting"

    layers: Annotated[
        str, typer.Option(help="Exit layers, e.g. 20,24,28.", autocompletion=completion.layers)
    ] = dataclasses.field(kw_only=True)
    distill: Annotated[
        int,
        typer.Option(min=0, help="Distill the full model into the heads, in this many passes."),
    ] = 0
    half: Annotated[
        bool,
        typer.Option("--half", help="Store the weights in 16 bits, which halves the file."),
    ] = False
    output: Annotated[Path, typer.Option(help="The .safetensors file to write.")] = (
        dataclasses.field(kw_only=True)
    )
    overwrite: Overwrite = False


@command("fit-heads")
def fit_heads(
    fitting: FittingOptions,
    model: PlacedModelOptions,
    corpus: CorpusOptions,
    engine: EngineOptions,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
) -> None:
    """Fit ridge heads, and maps for the keys and values of exited tokens.

    Runs one pass over the corpus (of the embedded corpus, its training
    split). --distill trains the heads further, and keeps a head only if
    it is better on sequences kept aside. With --engine ray, many processes
    make the pass, and the heads are the same, bit for bit.
    """
    output, on_ray = fitting.output, engine.config() is not None
    wanted = read_layers(fitting.layers)
    check_free(output, overwrite=fitting.overwrite)
    from cascade.core.provenance import provenance_of
    from cascade.exits import distillation, head_fitting

    stack = load_model(model, exits=True)
    blocks = read_blocks(stack, corpus, embedded_split="train")
    sums: Path | None = None
    if on_ray:
        from cascade.cli.engine_runs import FittedCorpus, fit_heads_on_ray

        of = FittedCorpus(stack, blocks, wanted, batch_size)
        fitted, sums = fit_heads_on_ray(of, model, engine, output, overwrite=fitting.overwrite)
    else:
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
    if sums is not None:
        from cascade.engines.working_folder import discard

        discard(sums)
    size = output.stat().st_size / 1e6
    message(f"Wrote {output} ({size:.1f} MB): heads for layers {fitting.layers}")
    show_record(fitted.metadata(), _print_losses)


def _print_losses(record: HeadsMetadata, console: Console) -> None:
    distilled = known(record.provenance.distillation)
    losses_of = {} if distilled is None else distilled.kl_on_sequences_kept_aside
    for layer, losses in losses_of.items():
        console.print(
            f"Layer {layer}: KL to the full model {losses[0]:.4f} nats in closed form, "
            f"{min(losses):.4f} distilled (on sequences kept aside)",
            soft_wrap=True,
            highlight=False,
        )


@dataclass(frozen=True)
class CalibrationOptions:
    """What is calibrated."""

    panel: ClassVar[str] = "Calibration"

    layer: ExitLayerOfHeads = None
    rule: Annotated[
        str, typer.Option(help="Exit rule, e.g. top2_gap.", autocompletion=completion.rules)
    ] = "cosine"
    hard_ratio: Annotated[
        list[float] | None,
        typer.Option(help="Share of hard tokens; repeatable (default: 0.3, 0.5, 0.7)."),
    ] = None
    risk: Annotated[
        float | None,
        typer.Option(
            help="Certify that at most this share of predictions differs from the full model's."
        ),
    ] = None
    confidence: Annotated[float, typer.Option(help="Confidence of the certificate.")] = 0.95


@dataclass(frozen=True)
class TransferOptions:
    """The other corpus that the thresholds are tried on."""

    panel: ClassVar[str] = "Transfer"

    transfer_to: Annotated[
        str | None,
        typer.Option(
            help="Another corpus to try the thresholds on.", autocompletion=completion.corpora
        ),
    ] = None
    transfer_split: Annotated[
        str | None, typer.Option(help="Split of that corpus.", autocompletion=completion.splits)
    ] = None
    transfer_text_column: Annotated[
        str | None, typer.Option(help="Column of that corpus to read.")
    ] = None

    def check(self) -> None:
        """Check that a split or a column has a corpus.

        Raises:
            UsageError: It has none.
        """
        if self.transfer_to is None and (self.transfer_split or self.transfer_text_column):
            raise UsageError(
                "--transfer-split and --transfer-text-column need --transfer-to; add it, or leave "
                "them out"
            )

    def read(self, stack: DecoderStack, sizes: CorpusOptions) -> TokenBlocks | None:
        """Return the corpus, if there is one, cut as `sizes` says."""
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
    model: PlacedModelOptions,
    heads: HeadOptions,
    corpus: CorpusOptions,
    output: OutputOptions,
    seed: Seed = 0,
) -> None:
    """Fit thresholds for hard ratios, or certify one for a risk.

    Every figure has a confidence interval. The embedded corpus is read
    from its held-out split, because heads are fitted on the other one.
    With --output, writes calibration.json for `cascade generate
    --calibration`.
    """
    from cascade.report.exits.calibration import print_calibration

    name = "calibration.json"
    with run_folder(output.output, [name], overwrite=output.overwrite) as folder:
        from cascade.evaluation import calibration

        stack = load_model(model, exits=True)
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
    show_record(record, print_calibration)
    say_wrote(output.output, name)

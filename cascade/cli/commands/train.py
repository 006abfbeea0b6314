"""`cascade train`: train a stage on hard tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, cast

import typer

from cascade.cli import completion
from cascade.cli.app import command
from cascade.cli.cascades import read_cascade
from cascade.cli.commands.collect_hard import StageCorpus, corpus_config, says_how_to_resume
from cascade.cli.console import command_line, message, progress_bar, show_record, status
from cascade.cli.inputs import load_model
from cascade.cli.options import (
    ModelOptions,
    PrintOptions,
)
from cascade.cli.output import check_utf8
from cascade.core.errors import OutputError, UsageError

if TYPE_CHECKING:
    from cascade.models.stack import DecoderStack
    from cascade.stages.cascades import Cascade
    from cascade.stages.entries import Entry
    from cascade.stages.hard_tokens.dataset import HardTokens
    from cascade.stages.records import HeldOutEvaluation
    from cascade.stages.training import Training
    from cascade.stages.training_config import Routing, Start, TrainingConfig


#: In the folder of a cascade: the dataset that its stage was trained on, and the checkpoints.
_DATASET, _CHECKPOINTS = "hard-tokens", "checkpoints"


_TRAINING = "Training"


@dataclass(frozen=True)
class StageOptions(PrintOptions):
    """The stage: where it is written, which tokens enter it, its layers and its training."""

    panel: ClassVar[str] = "Stage"

    output: Annotated[Path, typer.Option(help="Folder for the cascade.")] = dataclasses.field(
        kw_only=True
    )
    layer: Annotated[
        int | None,
        typer.Option(
            help="Layer whose similarity decides (default: second to last).",
            autocompletion=completion.layer,
        ),
    ] = None
    hard_ratio: Annotated[
        float | None, typer.Option(help="Share of hard tokens to which the threshold is fitted.")
    ] = None
    threshold: Annotated[
        float | None, typer.Option(help="Tokens below this similarity enter the stage.")
    ] = None
    additional_layers: Annotated[
        int, typer.Option(min=1, help="Number of decoder layers in the stage.")
    ] = 2
    start: Annotated[
        str,
        typer.Option(
            help="First weights: copies of the last layers, or fresh.",
            autocompletion=completion.starts,
        ),
    ] = "copies"
    own_head: Annotated[
        bool, typer.Option("--own-head", help="Train an LM head for the stage as well.")
    ] = False
    epochs: Annotated[
        float, typer.Option(help="Passes over the training split.", rich_help_panel=_TRAINING)
    ] = 2.0
    lr: Annotated[
        float, typer.Option(help="Highest learning rate of AdamW.", rich_help_panel=_TRAINING)
    ] = 3e-4
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences per step.", rich_help_panel=_TRAINING)
    ] = 8
    patience: Annotated[
        int | None,
        typer.Option(
            help="Evaluations without improvement before a stop; 0: no stop.",
            rich_help_panel=_TRAINING,
        ),
    ] = 3
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Seed of fresh weights and batch order.", rich_help_panel=_TRAINING
        ),
    ] = 0


@dataclass(frozen=True)
class RunOptions:
    """Which controls are trained, on which dataset, and how an earlier run is treated."""

    panel: ClassVar[str] = _TRAINING

    dataset: Annotated[
        Path | None,
        typer.Option(help="Folder of `cascade collect-hard` (default: collect hard tokens first)."),
    ] = None
    after: Annotated[
        Path | None,
        typer.Option(help="Trained cascade; the new stage follows its last one."),
    ] = None
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Also train the stage on all and on random tokens."),
    ] = False
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard logs.")] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint in --output.")
    ] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier cascade.")] = (
        False
    )


@command("train")
def train(stage: StageOptions, run: RunOptions, model: ModelOptions, corpus: StageCorpus) -> None:
    """Train a stage: more decoder layers, for hard tokens only.

    The model runs once over the corpus; its states are kept in --output.
    The stage starts as the identity. The step with the lowest held-out
    perplexity of the whole cascade is kept; step 0 is no stage, so the
    result is never worse than without one on that text. --resume
    continues after an interruption.
    """
    from cascade.report.exits.cascades import print_training
    from cascade.stages.entries import Entry

    output = stage.output
    _check_train(stage, run)
    config = _training_config(stage)
    base = _cascade(run.after, model)
    from cascade.stages.stage import check_depth

    check_depth(base.stack, stage.additional_layers)
    routed = base.routed() if base.stages else base.stack
    tokens = _dataset_of(base, routed, stage, run, corpus)
    for note in tokens.notes:
        message(f"Warning: {note}")
    trained = _train(routed, tokens, config, run, output / _CHECKPOINTS / config.routing)
    entry = Entry(tokens.layer, tokens.threshold)
    saved = _save(base, trained, entry, output, overwrite=run.overwrite or run.resume)
    if run.controls:
        _train_controls(base, routed, tokens, trained, output, run)
    show_record(trained.provenance, print_training, stored=saved.record())
    message(f"Wrote {output}; measure it with `cascade evaluate --cascade {output}`")


def _training_config(stage: StageOptions) -> TrainingConfig:
    from cascade.stages.training_config import TrainingConfig

    config = TrainingConfig(
        additional_layers=stage.additional_layers,
        start=cast("Start", stage.start),  # checked next
        own_head=stage.own_head,
        epochs=stage.epochs,
        learning_rate=stage.lr,
        batch_size=stage.batch_size,
        patience=stage.patience or None,
        seed=stage.seed,
    )
    config.check()
    return config


def _check_train(stage: StageOptions, run: RunOptions) -> None:
    from cascade.stages.hard_tokens.plan import CollectingConfig
    from cascade.stages.saved_cascades import CONFIG

    output = stage.output
    for folder in filter(None, (output, run.tensorboard)):
        check_utf8(folder)
    if (output / CONFIG).exists() and not (run.overwrite or run.resume):
        raise OutputError(
            f"{output} holds a cascade: choose another --output, or replace it with --overwrite"
        )
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file, expected a folder; choose another --output")
    if run.after is not None and os.path.realpath(run.after) == os.path.realpath(output):
        raise OutputError(f"--after and --output are both {output}; choose another --output")
    if run.dataset is None:
        CollectingConfig(threshold=stage.threshold, hard_ratio=stage.hard_ratio).check()
    elif stage.hard_ratio is not None and stage.threshold is None:
        raise UsageError("--dataset already has a hard ratio; leave --hard-ratio out")


def _cascade(folder: Path | None, model: ModelOptions) -> Cascade:
    """Return the cascade in a folder, or the model alone."""
    from cascade.stages.cascades import Cascade

    if folder is None:
        return Cascade(load_model(model, exits=True))
    return read_cascade(folder, model.dtype, model.device)


def _dataset_of(
    base: Cascade,
    routed: DecoderStack,
    stage: StageOptions,
    run: RunOptions,
    corpus: StageCorpus,
) -> HardTokens:
    """Return the dataset of --dataset after checking it, or collect one in the output folder."""
    from cascade.stages.hard_tokens.collecting import collect_hard
    from cascade.stages.hard_tokens.dataset import load_hard_tokens
    from cascade.stages.hard_tokens.plan import CollectingConfig
    from cascade.stages.hard_tokens.splits import load_splits

    if run.dataset is not None:
        found = load_hard_tokens(run.dataset)
        found.check(routed, layer=stage.layer, threshold=stage.threshold)
        base.check_bos(found.record.provenance.corpora["train"].bos)
        return found
    config = CollectingConfig(
        layer=base.deciding_layer if stage.layer is None else stage.layer,
        threshold=stage.threshold,
        hard_ratio=stage.hard_ratio,
        command=command_line(),
    )
    folder = stage.output / _DATASET
    with status(f"Reading {corpus.corpus}"):
        splits = load_splits(corpus_config(corpus), routed.tokenizer)
    base.check_bos(splits["train"].bos)
    tokens = sum(blocks.tokens for blocks in splits.values())
    with says_how_to_resume(folder), progress_bar("Collecting", tokens) as advance:
        return collect_hard(
            routed, splits, folder, config, progress=advance, overwrite=True, reuse=True
        )


def _train(
    routed: DecoderStack, tokens: HardTokens, config: TrainingConfig, run: RunOptions, folder: Path
) -> Training:
    from cascade.stages.training import train_stage

    with _shown_training(config.routing, config.batch_size, tokens) as progress:
        return train_stage(
            routed,
            tokens,
            config,
            folder,
            resume=run.resume,
            tensorboard=run.tensorboard,
            progress=progress,
        )


def _train_controls(
    base: Cascade,
    routed: DecoderStack,
    tokens: HardTokens,
    trained: Training,
    output: Path,
    run: RunOptions,
) -> None:
    from cascade.stages import controls

    batch_size = trained.provenance.config.batch_size
    for control in controls.CONTROLS:
        folder = output / _CHECKPOINTS / control
        with _shown_training(control, batch_size, tokens) as progress:
            made = controls.train_control(
                routed, tokens, trained, control, folder, resume=run.resume, progress=progress
            )
        entry = controls.control_entry(control, base.stack, tokens)
        place = output / controls.CONTROLS_FOLDER / control
        _save(base, made, entry, place, overwrite=run.overwrite or run.resume)


@contextlib.contextmanager
def _shown_training(
    routing: Routing, batch_size: int, tokens: HardTokens
) -> Iterator[_ShownTraining]:
    """Yield a progress callback that prints on stderr until the training ends."""
    with contextlib.ExitStack() as cleanup:
        yield _ShownTraining(routing, batch_size * tokens.record.states.seq_len, cleanup)


class _ShownTraining:
    """Shows steps as a progress bar of tokens, and each evaluation as a line on stderr."""

    def __init__(self, routing: Routing, tokens: int, cleanup: contextlib.ExitStack) -> None:
        self._routing, self._tokens, self._cleanup = routing, tokens, cleanup
        self._advance: Callable[[int], None] = lambda _: None

    def started(self, steps: int, done: int) -> None:
        message(f"Training a stage on {self._routing} tokens: {steps} steps")
        bar = progress_bar(f"Training ({self._routing})", steps * self._tokens)
        self._advance = self._cleanup.enter_context(bar)
        self._advance(done * self._tokens)

    def step_done(self, step: int) -> None:
        self._advance(self._tokens)

    def evaluated(self, evaluation: HeldOutEvaluation) -> None:
        # Not every corpus marks response text.
        response = "response" in evaluation.ratios
        also = f", response text {evaluation.words('response')}" if response else ""
        message(f"Step {evaluation.step}: held-out perplexity {evaluation.words('all')}{also}")


def _save(
    base: Cascade, trained: Training, entry: Entry, folder: Path, *, overwrite: bool
) -> Cascade:
    """Write the base with the trained stage to a folder, and return both."""
    from cascade.stages.records import CascadeProvenance

    provenance = CascadeProvenance(command=command_line())
    cascade = base.with_stage(trained.stage, entry, provenance=provenance)
    cascade.save_pretrained(folder, overwrite=overwrite)
    return cascade

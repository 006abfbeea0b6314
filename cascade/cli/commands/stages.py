"""Commands of stages: collect the hard tokens that they learn from, train, and measure them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade.cli.app import command
from cascade.cli.console import command_line, print_record, progress_bar, status
from cascade.cli.inputs import load_model
from cascade.cli.options import (
    BatchSize,
    Behind,
    DeviceOptions,
    First,
    MaxTokens,
    ModelOptions,
    NumSamples,
    OutputOptions,
    Seed,
    TextOptions,
)
from cascade.core.errors import OutputError, UsageError

if TYPE_CHECKING:
    from cascade.corpora.blocks import TokenBlocks
    from cascade.models.stack import DecoderStack
    from cascade.stages.cascades import Cascade, Entry
    from cascade.stages.dataset import HardTokens
    from cascade.stages.training import Training
    from cascade.stages.training_config import Recipe

#: One token in so many is of the held-out part, as is one record.
_HELD_OUT = 5


@dataclass(frozen=True)
class StageCorpus(TextOptions):
    """The text whose hard tokens are collected."""

    num_samples: NumSamples = 0
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop at this many tokens, a fifth of them held out.")
    ] = None


@dataclass(frozen=True)
class CollectionOptions:
    """Which tokens are hard, and where the dataset goes."""

    output: Annotated[Path, typer.Option(help="Folder for the dataset."), First()]
    threshold: Annotated[
        float | None, typer.Option(help="Tokens whose similarity is below it are hard.")
    ] = None
    hard_ratio: Annotated[
        float | None,
        typer.Option(help="Share of hard tokens; without --threshold, fits it."),
    ] = None
    layer: Annotated[int | None, typer.Option(help="Exit layer; the last but one without.")] = None
    states_dtype: Annotated[
        str,
        typer.Option(help="How states are stored: float16, or bfloat16 for large ones."),
        Behind("max_tokens"),
    ] = "float16"
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an earlier dataset, or another unfinished one."),
    ] = False


@command("collect-hard")
def collect_hard(
    options: CollectionOptions,
    model: ModelOptions,
    corpus: StageCorpus,
    batch_size: BatchSize = 32,
    seed: Annotated[
        int | None, typer.Option(help="Draw the records at random; in corpus order without.")
    ] = None,
) -> None:
    """Run a model once over a corpus; store its exit states and which tokens are hard.

    Every fifth record is held out (of the embedded corpus, its own
    held-out split). Interrupted, the same command goes on from where it
    was. datasets.load_from_disk reads the result.
    """
    from cascade.report.exits.hard_tokens import print_hard_tokens
    from cascade.stages import collecting as hard_tokens

    output = options.output
    hard_tokens.check_output(output, overwrite=options.overwrite)
    hard_tokens.check_wish(options.threshold, options.hard_ratio, options.states_dtype)
    stack = load_model(model)
    with status(f"Reading {corpus.corpus}"):
        parts = _parts(stack, corpus, seed=seed)
    tokens = sum(part.tokens for part in parts.values())
    size = hard_tokens.expected_bytes(stack, parts)
    typer.echo(
        f"Collecting {tokens:,} tokens into {output}: about {_bytes(size)}, states of "
        f"{stack.hidden_size:,} numbers in {options.states_dtype}",
        err=True,
    )
    with _told_to_go_on(output), progress_bar("Collecting", tokens) as advance:
        found = hard_tokens.collect_hard(
            stack,
            parts,
            output,
            layer=max(1, stack.num_layers - 1) if options.layer is None else options.layer,
            threshold=options.threshold,
            hard_ratio=options.hard_ratio,
            dtype=options.states_dtype,
            batch_size=batch_size,
            provenance={"command": command_line()},
            progress=advance,
            overwrite=options.overwrite,
        )
    print_record(print_hard_tokens, found.record)
    written = sum(file["bytes"] for file in found.record["files"])
    typer.echo(
        f"Wrote {output} ({_bytes(written)}); read it with "
        f"datasets.load_from_disk({str(output)!r})",
        err=True,
    )


@contextlib.contextmanager
def _told_to_go_on(output: Path) -> Iterator[None]:
    """Say after an interruption that what is done is not lost."""
    from cascade.stages.dataset import is_unfinished

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if is_unfinished(output):
            typer.echo(f"Stopped; {output} is kept: run the same command again to go on", err=True)
        raise


def _parts(stack: DecoderStack, corpus: StageCorpus, *, seed: int | None) -> dict[str, TokenBlocks]:
    """Return both parts of a corpus, with the records of their tokens."""
    from cascade.corpora import blocks as corpora

    most: dict[str, int | None] = dict.fromkeys(corpora.PARTS)
    if corpus.max_tokens is not None:
        held_out = max(corpus.seq_len, corpus.max_tokens // _HELD_OUT)
        most = {"train": corpus.max_tokens - held_out, "held-out": held_out}
    return {
        part: corpora.load_blocks(
            corpus.corpus,
            stack.tokenizer,
            seq_len=corpus.seq_len,
            num_samples=corpus.num_samples or None,
            max_tokens=most[part],
            text_column=corpus.text_column,
            seed=seed,
            part=part,
            marks=True,
        )
        for part in corpora.PARTS
    }


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


#: Of a cascade's folder: the dataset that its stage learned from, checkpoints, and controls.
_DATASET, _CHECKPOINTS, _CONTROLS = "hard-tokens", "checkpoints", "controls"


@dataclass(frozen=True)
class StageOptions:
    """The stage: where it goes, which tokens enter it, its layers and its training."""

    output: Annotated[Path, typer.Option(help="Folder for the cascade."), First()]
    threshold: Annotated[
        float | None, typer.Option(help="Tokens whose similarity is below it enter the stage.")
    ] = None
    hard_ratio: Annotated[
        float | None, typer.Option(help="Share of hard tokens; without --threshold, fits it.")
    ] = None
    layer: Annotated[
        int | None, typer.Option(help="Whose similarity decides; the last but one without.")
    ] = None
    additional_layers: Annotated[int, typer.Option(min=1, help="Layers of the stage.")] = 2
    start: Annotated[
        str, typer.Option(help="Its layers start as copies of the last ones, or fresh.")
    ] = "copies"
    own_head: Annotated[
        bool, typer.Option("--own-head", help="Train an LM head of its own, too.")
    ] = False
    epochs: Annotated[float, typer.Option(help="Passes over the training part.")] = 2.0
    lr: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = 3e-4
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step."), First()] = 8
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many looks without a better one; never: 0.")
    ] = 3
    seed: Annotated[int, typer.Option(min=0, help="Of fresh weights and of the order.")] = 0


@dataclass(frozen=True)
class RunOptions:
    """What else is trained, from what, and what becomes of an earlier run."""

    controls: Annotated[
        bool,
        typer.Option("--controls", help="Train the same stage on all and on random tokens, too."),
    ] = False
    after: Annotated[
        Path | None, typer.Option(help="A trained cascade: the new stage follows its last one.")
    ] = None
    dataset: Annotated[
        Path | None,
        typer.Option(help="A dataset of `cascade collect-hard`; made in --output without."),
    ] = None
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's logs.")] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")
    ] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier cascade.")] = (
        False
    )


@command("train")
def train(stage: StageOptions, run: RunOptions, model: ModelOptions, corpus: StageCorpus) -> None:
    """Train a stage that hard tokens go on to; it starts as the identity and never makes it worse.

    The model runs once, over the corpus; its states are kept in --output.
    The stage is chosen by the held-out perplexity of the whole cascade,
    step 0 (no stage) included. Interrupted, --resume goes on.
    """
    from cascade.report.exits.cascades import print_training

    output = stage.output
    _check_train(stage, run)
    from cascade.stages.checkpoints import can_resume
    from cascade.stages.stage import check_depth
    from cascade.stages.training_config import Recipe

    recipe = Recipe(
        additional_layers=stage.additional_layers,
        start=stage.start,  # type: ignore[arg-type]  # checked by the stage
        own_head=stage.own_head,
        epochs=stage.epochs,
        learning_rate=stage.lr,
        batch_size=stage.batch_size,
        patience=stage.patience or None,
        seed=stage.seed,
    )
    recipe.check()
    base = _cascade(run.after, model)
    check_depth(base.stack, stage.additional_layers)
    routed = base.routed() if base.stages else base.stack
    tokens = _dataset_of(
        routed,
        run.dataset or output / _DATASET,
        stage,
        corpus,
        usual=base.stack.num_layers if base.stages else max(1, base.stack.num_layers - 1),
        given=run.dataset is not None,
    )
    for note in tokens.notes:
        typer.echo(f"Beware: {note}", err=True)
    folder = output / _CHECKPOINTS
    trained = _train(
        routed, tokens, recipe, folder / "hard", resume=run.resume, tensorboard=run.tensorboard
    )
    from cascade.stages.cascades import Entry

    _save(base, trained, Entry(tokens.layer, tokens.threshold), output, run.overwrite or run.resume)
    for routing in ("all", "random") if run.controls else ():
        control = _train(
            routed,
            tokens,
            dataclasses.replace(recipe, routing=routing),
            folder / routing,
            steps=max(1, trained.steps),
            resume=run.resume and can_resume(folder / routing),
        )
        entry = _control_entry(routing, base, tokens)
        _save(base, control, entry, output / _CONTROLS / routing, run.overwrite or run.resume)
    print_record(print_training, trained.stage.provenance)
    typer.echo(f"Wrote {output}; measure it with `cascade evaluate --cascade {output}`", err=True)


def _check_train(stage: StageOptions, run: RunOptions) -> None:
    from cascade.stages.cascades import CONFIG
    from cascade.stages.collecting import check_wish

    output = stage.output
    if (output / CONFIG).exists() and not (run.overwrite or run.resume):
        raise OutputError(
            f"{output} holds a cascade: choose another --output, or replace it with --overwrite"
        )
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file, expected a folder; choose another --output")
    if run.after is not None and run.after.resolve() == output.resolve():
        raise OutputError(f"--after and --output are both {output}; choose another --output")
    if run.dataset is None:
        check_wish(stage.threshold, stage.hard_ratio, "float16")
    elif stage.hard_ratio is not None and stage.threshold is None:
        raise UsageError("--dataset has its hard ratio already; leave --hard-ratio out")


def _cascade(folder: Path | None, model: ModelOptions) -> Cascade:
    """Return the cascade in a folder, or the model alone."""
    from cascade.stages.cascades import Cascade

    if folder is None:
        return Cascade(load_model(model))
    return read_cascade(folder, model.dtype, model.device)


def read_cascade(folder: Path, dtype: str, device: str) -> Cascade:
    """Return the cascade in a folder, its base loaded from where its record says."""
    from cascade.stages.cascades import Cascade

    with status(f"Loading {folder} (a first time can take half a minute)"):
        return Cascade.from_pretrained(str(folder), dtype=dtype, device=device)


def _dataset_of(
    stack: DecoderStack,
    folder: Path,
    stage: StageOptions,
    corpus: StageCorpus,
    *,
    usual: int,
    given: bool,
) -> HardTokens:
    """Return a dataset that is there and fits, or collect it."""
    from cascade.stages import collecting as hard_tokens
    from cascade.stages.dataset import load_hard_tokens

    if given:
        found = load_hard_tokens(folder)
        found.check(stack, layer=stage.layer, threshold=stage.threshold)
        return found
    with status(f"Reading {corpus.corpus}"):
        parts = _parts(stack, corpus, seed=None)
    with (
        _told_to_go_on(folder),
        progress_bar("Collecting", sum(part.tokens for part in parts.values())) as advance,
    ):
        return hard_tokens.collect_hard(
            stack,
            parts,
            folder,
            layer=usual if stage.layer is None else stage.layer,
            threshold=stage.threshold,
            hard_ratio=stage.hard_ratio,
            provenance={"command": command_line()},
            progress=advance,
            overwrite=True,
            reuse=True,
        )


def _train(
    stack: DecoderStack,
    tokens: HardTokens,
    recipe: Recipe,
    folder: Path,
    *,
    steps: int | None = None,
    resume: bool = False,
    tensorboard: Path | None = None,
) -> Training:
    """Train with a progress bar in sequences' tokens; say what every look finds."""
    from cascade.stages.training import train_stage

    length = int(tokens.record["states"]["seq_len"])
    with contextlib.ExitStack() as shown:
        told = _Told(recipe, length, shown)
        return train_stage(
            stack,
            tokens,
            recipe,
            folder,
            resume=resume,
            steps=steps,
            tensorboard=tensorboard,
            told=told,
        )


class _Told:
    """Shows steps as a progress bar, and every look as a line on stderr."""

    def __init__(self, recipe: Recipe, length: int, shown: contextlib.ExitStack) -> None:
        self._recipe, self._shown = recipe, shown
        self._tokens = recipe.batch_size * length
        self._advance: Any = None

    def __call__(self, what: str, about: dict[str, Any]) -> None:
        if what == "start":
            bar = progress_bar(f"Training ({self._recipe.routing})", about["steps"] * self._tokens)
            self._advance = self._shown.enter_context(bar)
            self._advance(about["done"] * self._tokens)
        elif what == "step":
            self._advance(self._tokens)
        else:
            response = about.get("response")  # a corpus can be without
            also = "" if response is None else f", response text {response:.4f} x"
            typer.echo(
                f"Step {about['step']}: held-out perplexity {about['all']:.4f} x{also}", err=True
            )


def _control_entry(routing: str, base: Cascade, tokens: HardTokens) -> Entry:
    """Return how a control's tokens enter its stage: all of them, or as many drawn at random."""
    from cascade.stages.cascades import Entry

    last = base.stack.num_layers
    if routing == "all":
        return Entry(last, float("inf"), "fixed")
    return Entry(last, float(tokens.record["parts"]["train"]["hard_ratio"]), "random")


def _save(base: Cascade, trained: Training, entry: Entry, folder: Path, overwrite: bool) -> None:
    from cascade.stages.cascades import Cascade

    cascade = Cascade(
        base.base, propagation=base.propagation, provenance={"command": command_line()}
    )
    for stage, before in zip(base.stages, base.entrances, strict=True):
        cascade.add_stage(stage, before)
    cascade.add_stage(trained.stage, entry)
    cascade.save_pretrained(folder, overwrite=overwrite)


@dataclass(frozen=True)
class CascadeEvaluationOptions(TextOptions, DeviceOptions, OutputOptions):
    """What evaluating a cascade takes: the options of `cascade evaluate` that it accepts."""

    cascade: Path | None = None
    max_tokens: MaxTokens = None
    batch_size: BatchSize = 8
    seed: Seed = 0


def evaluate_stages(folder: Path, options: CascadeEvaluationOptions) -> dict[str, Any]:
    """Measure the cascade in a folder, and its controls, on held-out text; return the record."""
    from cascade.corpora.blocks import load_blocks
    from cascade.stages.cascades import CONFIG, Cascade
    from cascade.stages.evaluation import evaluate_cascade

    cascade = read_cascade(folder, options.dtype, options.device)
    controls = {
        routing: Cascade.from_pretrained(folder / _CONTROLS / routing, cascade.base)
        for routing in ("all", "random")
        if (folder / _CONTROLS / routing / CONFIG).exists()
    }
    with status(f"Reading {options.corpus}"):
        blocks = load_blocks(
            options.corpus,
            cascade.base.tokenizer,
            seq_len=options.seq_len,
            num_samples=None,
            max_tokens=options.max_tokens,
            text_column=options.text_column,
            part="held-out",
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

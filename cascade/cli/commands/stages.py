"""Commands of stages: collect the hard tokens that they learn from, train, and measure them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from cascade.cli.app import app
from cascade.cli.console import command_line, load_model, print_record, progress_bar, status
from cascade.cli.options import (
    BatchSize,
    Column,
    Corpus,
    Device,
    Dtype,
    Model,
    NumSamples,
    Revision,
    SeqLen,
)
from cascade.core.errors import OutputError, UsageError

if TYPE_CHECKING:
    from cascade.models.stack import DecoderStack
    from cascade.stages.cascades import Cascade, Entry
    from cascade.stages.hard_tokens.dataset import HardTokens
    from cascade.stages.hard_tokens.plan import CollectingConfig
    from cascade.stages.hard_tokens.records import StatesDtype
    from cascade.stages.hard_tokens.splits import CorpusConfig
    from cascade.stages.records import CascadeEvaluationRecord, HeldOutEvaluation
    from cascade.stages.training import Training
    from cascade.stages.training_config import TrainingConfig


@app.command("collect-hard")
def collect_hard(
    output: Annotated[Path, typer.Option(help="Folder for the dataset.")],
    threshold: Annotated[
        float | None, typer.Option(help="Tokens whose similarity is below it are hard.")
    ] = None,
    hard_ratio: Annotated[
        float | None,
        typer.Option(help="Share of hard tokens; without --threshold, fits it."),
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Exit layer; the last but one without.")] = None,
    model: Model = "smollm2-135m",
    revision: Revision = None,
    corpus: Corpus = "embedded",
    text_column: Column = None,
    num_samples: NumSamples = 0,
    seq_len: SeqLen = 128,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop at this many tokens, a fifth of them held out.")
    ] = None,
    states_dtype: Annotated[
        str, typer.Option(help="How states are stored: float16, or bfloat16 for large ones.")
    ] = "float16",
    batch_size: BatchSize = 32,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Annotated[
        int | None, typer.Option(help="Draw the records at random; in corpus order without.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an earlier dataset, or another unfinished one."),
    ] = False,
) -> None:
    """Run a model once over a corpus; store its exit states and which tokens are hard.

    Every fifth record is held out (of the embedded corpus, its own
    held-out split). Interrupted, the same command goes on from where it
    was. datasets.load_from_disk reads the result.
    """
    from cascade.report.exits.hard_tokens import print_hard_tokens
    from cascade.stages.hard_tokens import collecting, splits
    from cascade.stages.hard_tokens.plan import CollectingConfig
    from cascade.stages.hard_tokens.working_folder import check_output

    check_output(output, overwrite=overwrite)
    config = CollectingConfig(
        layer=layer,
        threshold=threshold,
        hard_ratio=hard_ratio,
        dtype=cast("StatesDtype", states_dtype),  # checked next
        batch_size=batch_size,
        command=command_line(),
    )
    config.check()
    stack = load_model(model, revision, dtype, device)
    text = splits.CorpusConfig(
        corpus=corpus,
        text_column=text_column,
        num_samples=num_samples or None,
        seq_len=seq_len,
        max_tokens=max_tokens,
        seed=seed,
    )
    with status(f"Reading {corpus}"):
        read = splits.load_splits(text, stack.tokenizer)
    tokens = sum(blocks.tokens for blocks in read.values())
    size = splits.expected_bytes(stack, read)
    typer.echo(
        f"Collecting {tokens:,} tokens into {output}: about {_bytes(size)}, states of "
        f"{stack.hidden_size:,} numbers in {states_dtype}",
        err=True,
    )
    with _says_how_to_resume(output), progress_bar("Collecting", tokens) as advance:
        found = collecting.collect_hard(
            stack, read, output, config, progress=advance, overwrite=overwrite
        )
    print_record(print_hard_tokens, found.record)
    written = sum(file.bytes for file in found.record.files)
    typer.echo(
        f"Wrote {output} ({_bytes(written)}); read it with "
        f"datasets.load_from_disk({str(output)!r})",
        err=True,
    )


@contextlib.contextmanager
def _says_how_to_resume(output: Path) -> Iterator[None]:
    """Say after an interruption that the work done so far is kept."""
    from cascade.stages.hard_tokens.dataset import is_unfinished

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if is_unfinished(output):
            typer.echo(f"Stopped; {output} is kept: run the same command again to go on", err=True)
        raise


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


#: In a cascade's folder: the dataset that its stage learned from, and checkpoints.
_DATASET, _CHECKPOINTS = "hard-tokens", "checkpoints"


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Folder for the cascade.")],
    threshold: Annotated[
        float | None, typer.Option(help="Tokens whose similarity is below it enter the stage.")
    ] = None,
    hard_ratio: Annotated[
        float | None, typer.Option(help="Share of hard tokens; without --threshold, fits it.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Whose similarity decides; the last but one without.")
    ] = None,
    additional_layers: Annotated[int, typer.Option(min=1, help="Layers of the stage.")] = 2,
    start: Annotated[
        str, typer.Option(help="Its layers start as copies of the last ones, or fresh.")
    ] = "copies",
    own_head: Annotated[
        bool, typer.Option("--own-head", help="Train an LM head of its own, too.")
    ] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the training part.")] = 2.0,
    lr: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 8,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many looks without a better one; never: 0.")
    ] = 3,
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Train the same stage on all and on random tokens, too."),
    ] = False,
    after: Annotated[
        Path | None, typer.Option(help="A trained cascade: the new stage follows its last one.")
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(help="A dataset of `cascade collect-hard`; made in --output without."),
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard's logs.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")
    ] = False,
    model: Model = "smollm2-135m",
    revision: Revision = None,
    corpus: Corpus = "embedded",
    text_column: Column = None,
    num_samples: NumSamples = 0,
    seq_len: SeqLen = 128,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Stop at this many tokens, a fifth of them held out.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of fresh weights and of the order.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier cascade.")
    ] = False,
) -> None:
    """Train a stage that hard tokens go on to; it starts as the identity and never makes it worse.

    The model runs once, over the corpus; its states are kept in --output.
    The stage is chosen by the held-out perplexity of the whole cascade,
    step 0 (no stage) included. Interrupted, --resume goes on.
    """
    from cascade.report.exits.cascades import print_training

    _check_train(output, after, dataset, threshold, hard_ratio, overwrite=overwrite, resume=resume)
    from cascade.stages.hard_tokens.plan import CollectingConfig
    from cascade.stages.hard_tokens.splits import CorpusConfig
    from cascade.stages.stage import check_depth
    from cascade.stages.training_config import TrainingConfig

    config = TrainingConfig(
        additional_layers=additional_layers,
        start=start,  # type: ignore[arg-type]  # checked by the stage
        own_head=own_head,
        epochs=epochs,
        learning_rate=lr,
        batch_size=batch_size,
        patience=patience or None,
        seed=seed,
    )
    config.check()
    base = _cascade(after, model, revision, dtype, device)
    check_depth(base.stack, additional_layers)
    routed = base.routed() if base.stages else base.stack
    usual = base.stack.num_layers if base.stages else max(1, base.stack.num_layers - 1)
    tokens = _dataset_of(
        routed,
        dataset or output / _DATASET,
        CollectingConfig(
            layer=usual if layer is None and dataset is None else layer,
            threshold=threshold,
            hard_ratio=hard_ratio,
            command=command_line(),
        ),
        given=dataset is not None,
        text=CorpusConfig(
            corpus=corpus,
            text_column=text_column,
            num_samples=num_samples or None,
            seq_len=seq_len,
            max_tokens=max_tokens,
        ),
    )
    for note in tokens.notes:
        typer.echo(f"Beware: {note}", err=True)
    folder = output / _CHECKPOINTS
    from cascade.stages import controls as of_controls
    from cascade.stages.cascades import Entry
    from cascade.stages.training import train_stage

    with _shown_training(config, tokens) as progress:
        trained = train_stage(
            routed,
            tokens,
            config,
            folder / config.routing,
            resume=resume,
            tensorboard=tensorboard,
            progress=progress,
        )
    _save(base, trained, Entry(tokens.layer, tokens.threshold), output, overwrite or resume)
    for control in of_controls.CONTROLS if controls else ():
        with _shown_training(dataclasses.replace(config, routing=control), tokens) as progress:
            made = of_controls.train_control(
                routed,
                tokens,
                trained,
                control,
                folder / control,
                resume=resume,
                progress=progress,
            )
        entry = of_controls.control_entry(control, base.stack, tokens)
        place = output / of_controls.CONTROLS_FOLDER / control
        _save(base, made, entry, place, overwrite or resume)
    print_record(print_training, trained.provenance)
    typer.echo(f"Wrote {output}; measure it with `cascade evaluate --cascade {output}`", err=True)


def _check_train(
    output: Path,
    after: Path | None,
    dataset: Path | None,
    threshold: float | None,
    hard_ratio: float | None,
    *,
    overwrite: bool,
    resume: bool,
) -> None:
    from cascade.stages.hard_tokens.plan import CollectingConfig
    from cascade.stages.saved_cascades import CONFIG

    if (output / CONFIG).exists() and not (overwrite or resume):
        raise OutputError(
            f"{output} holds a cascade: choose another --output, or replace it with --overwrite"
        )
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file, expected a folder; choose another --output")
    if after is not None and after.resolve() == output.resolve():
        raise OutputError(f"--after and --output are both {output}; choose another --output")
    if dataset is None:
        CollectingConfig(threshold=threshold, hard_ratio=hard_ratio).check()
    elif hard_ratio is not None and threshold is None:
        raise UsageError("--dataset has its hard ratio already; leave --hard-ratio out")


def _cascade(
    folder: Path | None, model: str, revision: str | None, dtype: str, device: str
) -> Cascade:
    """Return the cascade in a folder, or the model alone."""
    from cascade.stages.cascades import Cascade

    if folder is None:
        return Cascade(load_model(model, revision, dtype, device))
    return read_cascade(folder, dtype, device)


def read_cascade(folder: Path, dtype: str, device: str) -> Cascade:
    """Return the cascade in a folder, its base loaded from where its record says."""
    from cascade.stages.cascades import Cascade

    with status(f"Loading {folder} (a first time can take half a minute)"):
        return Cascade.from_pretrained(str(folder), dtype=dtype, device=device)


def _dataset_of(
    stack: DecoderStack,
    folder: Path,
    config: CollectingConfig,
    *,
    given: bool,
    text: CorpusConfig,
) -> HardTokens:
    """Return a dataset that is there and fits, or collect it."""
    from cascade.stages.hard_tokens.collecting import collect_hard
    from cascade.stages.hard_tokens.dataset import load_hard_tokens
    from cascade.stages.hard_tokens.splits import load_splits

    if given:
        found = load_hard_tokens(folder)
        found.check(stack, layer=config.layer, threshold=config.threshold)
        return found
    with status(f"Reading {text.corpus}"):
        splits = load_splits(text, stack.tokenizer)
    tokens = sum(blocks.tokens for blocks in splits.values())
    with _says_how_to_resume(folder), progress_bar("Collecting", tokens) as advance:
        return collect_hard(
            stack, splits, folder, config, progress=advance, overwrite=True, reuse=True
        )


@contextlib.contextmanager
def _shown_training(config: TrainingConfig, tokens: HardTokens) -> Iterator[_ShownTraining]:
    """Yield a progress that is shown on stderr until the training ends."""
    with contextlib.ExitStack() as cleanup:
        yield _ShownTraining(config, tokens.record.states.seq_len, cleanup)


class _ShownTraining:
    """Shows steps as a progress bar of tokens, and every evaluation as a line on stderr."""

    def __init__(self, config: TrainingConfig, seq_len: int, cleanup: contextlib.ExitStack) -> None:
        self._routing, self._cleanup = config.routing, cleanup
        self._tokens = config.batch_size * seq_len
        self._advance: Callable[[int], None] = lambda _: None

    def started(self, steps: int, done: int) -> None:
        bar = progress_bar(f"Training ({self._routing})", steps * self._tokens)
        self._advance = self._cleanup.enter_context(bar)
        self._advance(done * self._tokens)

    def step_done(self, step: int) -> None:
        self._advance(self._tokens)

    def evaluated(self, evaluation: HeldOutEvaluation) -> None:
        response = evaluation.ratios.get("response")  # a corpus can be without
        also = "" if response is None else f", response text {response:.4f} x"
        typer.echo(
            f"Step {evaluation.step}: held-out perplexity {evaluation.all:.4f} x{also}", err=True
        )


def _save(base: Cascade, trained: Training, entry: Entry, folder: Path, overwrite: bool) -> None:
    from cascade.stages.records import CascadeProvenance

    provenance = CascadeProvenance(command=command_line())
    cascade = base.with_stage(trained.stage, entry, provenance=provenance)
    cascade.save_pretrained(folder, overwrite=overwrite)


def evaluate_stages(
    folder: Path,
    *,
    corpus: str,
    text_column: str | None,
    seq_len: int,
    max_tokens: int | None,
    batch_size: int,
    dtype: str,
    device: str,
    seed: int,
) -> CascadeEvaluationRecord:
    """Measure the cascade in a folder, and its controls, on held-out text; return the record."""
    from cascade.corpora.blocks import load_blocks
    from cascade.stages.controls import read_controls
    from cascade.stages.evaluation import evaluate_cascade

    cascade = read_cascade(folder, dtype, device)
    controls = read_controls(folder, cascade.base)
    with status(f"Reading {corpus}"):
        blocks = load_blocks(
            corpus,
            cascade.base.tokenizer,
            seq_len=seq_len,
            num_samples=None,
            max_tokens=max_tokens,
            text_column=text_column,
            part="held-out",
            marks=True,
        )
    with progress_bar("Evaluating", blocks.tokens) as advance:
        return evaluate_cascade(
            cascade,
            blocks,
            controls=controls,
            batch_size=batch_size,
            seed=seed,
            command=command_line(),
            progress=advance,
        )

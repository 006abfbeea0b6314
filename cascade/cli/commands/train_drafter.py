"""`cascade train-drafter`: train a small network that drafts tokens for a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from cascade.cli import completion
from cascade.cli.app import command
from cascade.cli.console import command_line, message, progress_bar, show_record
from cascade.cli.inputs import load_model
from cascade.cli.named_corpora import NamedCorpus
from cascade.cli.options import Bos, ModelOptions, NumSamples, Overwrite, PrintOptions, Seed
from cascade.cli.output import check_utf8

if TYPE_CHECKING:
    from cascade.drafters.config import DrafterConfig
    from cascade.drafters.records import DraftEvaluation
    from cascade.drafters.texts.prompts import CorpusSource

_TEXTS, _TRAINING = "Generated text", "Training"


@dataclass(frozen=True)
class PromptOptions:
    """The corpora that prompts are taken from."""

    panel: ClassVar[str] = "Corpus"

    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Corpus NAME[:CONFIG][@SPLIT][#COLUMN]; repeatable (default: embedded).",
            autocompletion=completion.corpora,
        ),
    ] = None
    num_samples: NumSamples = 0
    bos: Bos = "auto"

    def sources(self) -> list[CorpusSource]:
        """Return the corpora.

        Raises:
            UsageError: A part of a name is empty.
        """
        from cascade.drafters.texts.prompts import CorpusSource

        named = map(NamedCorpus.read, self.corpus or ["embedded"])
        return [
            CorpusSource(
                each.source,
                text_column=each.text_column,
                num_samples=self.num_samples or None,
                split=each.split,
                config=each.config,
            )
            for each in named
        ]


@dataclass(frozen=True)
class DrafterOptions(PrintOptions):
    """The drafter: where it is written, how much text it is trained on, and its training."""

    panel: ClassVar[str] = "Drafter"

    output: Annotated[Path, typer.Option(help="Folder for the drafter.")] = dataclasses.field(
        kw_only=True
    )
    layer: Annotated[
        int | None,
        typer.Option(
            help="Layer whose copy the drafter is (default: nine tenths up).",
            autocompletion=completion.layer,
        ),
    ] = None
    architecture: Annotated[
        str,
        typer.Option(
            help="cascade, or eagle3 for `cascade export-drafter`.",
            autocompletion=completion.architectures,
        ),
    ] = "cascade"
    vocabulary: Annotated[
        int, typer.Option(min=2, help="Number of tokens that the drafter can propose.")
    ] = 8192
    tokens: Annotated[
        int,
        typer.Option(min=1, help="Tokens to generate for training.", rich_help_panel=_TEXTS),
    ] = 80_000
    max_new_tokens: Annotated[
        int, typer.Option(min=2, help="Most tokens of a text.", rich_help_panel=_TEXTS)
    ] = 256
    batch_size: Annotated[
        int, typer.Option(min=1, help="Texts generated at a time.", rich_help_panel=_TEXTS)
    ] = 64
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps.", rich_help_panel=_TRAINING)
    ] = 300
    lr: Annotated[
        float, typer.Option(help="Highest learning rate of AdamW.", rich_help_panel=_TRAINING)
    ] = 1e-3
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume from the last checkpoint in --output.",
            rich_help_panel=_TRAINING,
        ),
    ] = False
    overwrite: Overwrite = False

    def config(self, bos: str, seed: int) -> DrafterConfig:
        """Return the options of the training.

        Raises:
            UsageError: An option is invalid.
        """
        from cascade.drafters.config import DrafterConfig, checked_architecture

        config = DrafterConfig(
            tokens=self.tokens,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            layer=self.layer,
            architecture=checked_architecture(self.architecture),
            vocabulary=self.vocabulary,
            steps=self.steps,
            learning_rate=self.lr,
            bos=bos,
            seed=seed,
        )
        config.check()
        return config


@command("train-drafter")
def train_drafter(
    options: DrafterOptions, model: ModelOptions, corpus: PromptOptions, seed: Seed = 0
) -> None:
    """Train a drafter: a small network that proposes tokens for the model to verify.

    The model answers the prompts of the corpus itself, many at a time; the
    drafter learns from these texts and from the model's states, which are
    kept in --output. Every fifth record is held out: its text selects the
    best step and compares the drafter with drafts that need no training.
    Run the same command again to continue with the text after an
    interruption; --resume continues with the training as well.
    """
    from cascade.drafters.making import check_output
    from cascade.drafters.making import train_drafter as made
    from cascade.report.exits.drafters import print_drafter

    output = options.output
    check_utf8(output)
    config, sources = options.config(corpus.bos, seed), corpus.sources()
    check_output(output, overwrite=options.overwrite or options.resume)
    stack = load_model(model)
    with _shown(output, config.step_tokens) as progress:
        drafter = made(
            stack,
            sources,
            output,
            config,
            resume=options.resume,
            overwrite=options.overwrite,
            command=command_line(),
            progress=progress,
        )
    show_record(drafter.record, print_drafter)
    size = (output / drafter.record.file).stat().st_size
    message(f"Wrote {output} ({size / 1e6:,.1f} MB, besides the text and the checkpoints)")


@contextlib.contextmanager
def _shown(output: Path, step_tokens: int) -> Iterator[_ShownDrafter]:
    """Yield a progress callback that prints on stderr until the training ends."""
    with contextlib.ExitStack() as cleanup:
        shown = _ShownDrafter(output, step_tokens, cleanup)
        try:
            yield shown
        except (KeyboardInterrupt, SystemExit):
            if shown.doing == "text":
                message(f"Stopped; {output} is kept: run the same command again to continue")
            elif shown.doing == "training":
                message(f"Stopped; {output} is kept: add --resume to continue the training")
            raise


class _ShownDrafter:
    """Shows progress bars of tokens, and each evaluation as a line on stderr."""

    def __init__(self, output: Path, step_tokens: int, cleanup: contextlib.ExitStack) -> None:
        self.doing = ""
        self._output, self._step_tokens, self._cleanup = output, step_tokens, cleanup
        self._advance: Callable[[int], None] = lambda _: None

    def _show(self, what: str, tokens: int, done: int) -> None:
        self._cleanup.close()
        self._advance = self._cleanup.enter_context(progress_bar(what, tokens))
        self._advance(done)

    def generating(self, tokens: int, done: int) -> None:
        self.doing = "text"
        already = f", {done:,} of them are there" if done else ""
        message(f"Generating {tokens:,} tokens{already}")
        self._show("Generating", tokens, done)

    def generated(self, tokens: int) -> None:
        self._advance(tokens)

    def started(self, steps: int, done: int) -> None:
        self.doing = "training"
        message(f"Training a drafter: {steps} steps")
        self._show("Training", steps * self._step_tokens, done * self._step_tokens)

    def step_done(self, step: int) -> None:
        self._advance(self._step_tokens)

    def evaluated(self, evaluation: DraftEvaluation) -> None:
        shares = ", ".join(f"{share:.2f}" for share in evaluation.accepted)
        message(
            f"Step {evaluation.step}: {evaluation.tokens_per_pass:.2f} tokens per pass on held-out "
            f"text, accepted by position: {shares}"
        )

"""`cascade compare-corpora` and `cascade compare-models`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from cascade.cli import completion
from cascade.cli.app import command
from cascade.cli.console import command_line, progress_bar, status
from cascade.cli.inputs import load_model
from cascade.cli.named_corpora import Amount, load_corpus, read_names
from cascade.cli.options import (
    BatchSize,
    Bos,
    DeviceOptions,
    ModelOptions,
    NumSamples,
    OutputOptions,
    SampledCorpusOptions,
    SeqLen,
    picked,
)
from cascade.cli.output import finish, report_folder, show
from cascade.core.defaults import NUM_SAMPLES, SEQ_LEN
from cascade.core.errors import ModelError
from cascade.core.schema import known

if TYPE_CHECKING:
    from cascade.studies.comparisons.compared_models import (
        Candidate,
        MeasuredModel,
        SameText,
        UnmeasuredModel,
    )

#: The pictures of `cascade compare-corpora --output`.
CORPORA_PICTURES = ("corpora-profiles.svg", "corpora-thresholds.svg")

#: The pictures that `cascade compare-models --output` may have.
MODELS_PICTURES = ("models-profiles.svg", "models-operations.svg")


@dataclass(frozen=True)
class CorpusComparisonOptions:
    """How corpora are compared."""

    panel: ClassVar[str] = "Comparison"

    layer: Annotated[
        int | None,
        typer.Option(
            "--layer",
            help="Exit layer (default: suggested by the first corpus).",
            autocompletion=completion.layer,
        ),
    ] = None
    hard_ratio: Annotated[
        list[float] | None,
        typer.Option(help="Share of hard tokens; repeatable (default: 0.3, 0.5, 0.7)."),
    ] = None
    margin: Annotated[
        float,
        typer.Option(help="Smallest difference of mean similarities that matters."),
    ] = 0.01
    tolerance: Annotated[
        float,
        typer.Option(help="Largest error of the hard ratio at which a threshold transfers."),
    ] = 0.05
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the resampling.")] = 0


@dataclass(frozen=True)
class ComparedText:
    """How much of each corpus is read."""

    num_samples: NumSamples = NUM_SAMPLES
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", min=0, help="Tokens of each corpus, spread evenly; 0 takes all."
        ),
    ] = 16_384
    seq_len: SeqLen = SEQ_LEN
    bos: Bos = "auto"
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Read hub datasets without downloading all of them."),
    ] = False


@command("compare-corpora")
def compare_corpora(
    corpora: Annotated[
        list[str],
        typer.Argument(
            metavar="CORPUS",
            # No brackets: help reads them as markup.
            help="Two or more corpora, the reference first: NAME:CONFIG@SPLIT#COLUMN, or only "
            "NAME.",
            show_default=False,
            autocompletion=completion.corpora,
        ),
    ],
    model: ModelOptions,
    comparison: CorpusComparisonOptions,
    text: ComparedText,
    output: OutputOptions,
    batch_size: BatchSize = 32,
) -> None:
    """Compare corpora: which layers differ, and do thresholds transfer?

    A corpus is embedded, a file or a hub dataset, followed by its
    configuration, split and column as far as it needs them:
    Salesforce/wikitext:wikitext-2-raw-v1@test, embedded@held-out,
    texts.jsonl#body. With --output, writes corpora.json, corpora.html
    and two SVG figures.
    """
    with report_folder(output, "corpora", CORPORA_PICTURES) as folder:
        from cascade.core.defaults import HARD_RATIOS
        from cascade.report.studies.corpora import corpora_report
        from cascade.studies.comparisons import corpus_comparison

        config = corpus_comparison.CorpusComparisonConfig(
            layer=comparison.layer,
            hard_ratios=tuple(comparison.hard_ratio or HARD_RATIOS),
            margin=comparison.margin,
            tolerance=comparison.tolerance,
            seed=comparison.seed,
        )
        config.check()
        named = read_names(corpora)
        amount = Amount(
            text.num_samples or None, text.max_tokens or None, text.seq_len, text.stream, text.bos
        )
        amount.check()
        stack = load_model(model)
        blocks = [load_corpus(one, stack, amount) for one in named]
        corpus_comparison.check_corpora(stack, blocks, config, batch_size)
        total = sum(one.tokens for one in blocks)
        with progress_bar("Measuring", total) as advance:
            record = corpus_comparison.compare_corpora(
                stack,
                blocks,
                config,
                batch_size=batch_size,
                command=command_line(),
                progress=advance,
            )
        report = finish(folder, "corpora", record, corpora_report)
    show(record, report, output.output, "corpora.html")


@dataclass(frozen=True)
class ModelsOptions:
    """Which models are compared."""

    panel: ClassVar[str] = "Models"

    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Models: short name, hub id, folder or .gguf file.",
            autocompletion=completion.models,
        ),
    ]
    copies: Annotated[
        list[str] | None,
        typer.Option(
            "--copy",
            help="Altered copy of the first model: int8, int4, bf16, noise:0.01; repeatable.",
            autocompletion=completion.copies,
        ),
    ] = None
    unmeasured: Annotated[
        list[str] | None,
        typer.Option(
            help="Model to describe from its configuration alone; repeatable.",
            autocompletion=completion.models,
        ),
    ] = None
    config_only: Annotated[
        bool,
        typer.Option(
            "--config-only", help="Describe every model from its configuration; needs no weights."
        ),
    ] = False


@dataclass(frozen=True)
class SameTextOptions(SampledCorpusOptions):
    """The text that every model reads."""

    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Stop after this many tokens per model.")
    ] = 16_384


@command("compare-models")
def compare_models(
    of: ModelsOptions,
    corpus: SameTextOptions,
    where: DeviceOptions,
    output: OutputOptions,
    batch_size: BatchSize = 32,
    seed: Annotated[int, typer.Option(help="Seed of the noise in copies.")] = 0,
) -> None:
    """Compare models over relative depth: profiles, dips, exit layers.

    All models read the same text, each with its own tokenizer. One model
    at a time is in memory. A folder that has a config.json but no weights
    is described from its configuration. With --output, writes
    models.html, models.json and the figures.
    """
    with report_folder(output, "models", MODELS_PICTURES) as folder:
        from cascade.report.studies.models import models_report
        from cascade.studies.comparisons import compared_models, model_comparison
        from cascade.studies.comparisons.altered_models import Alteration

        wanted = compared_models.candidates(
            of.models,
            copies=[Alteration.parse(text, seed=seed) for text in of.copies or ()],
            unmeasured=of.unmeasured or (),
            config_only=of.config_only,
        )
        # Fail before minutes are spent if a model cannot be read. Copies are of the first model.
        for candidate in {each.source: each for each in reversed(wanted)}.values():
            _check_candidate(candidate)
        text = compared_models.SameText(
            corpus.corpus,
            seq_len=corpus.seq_len,
            max_tokens=corpus.max_tokens,
            num_samples=corpus.num_samples or None,
            split=corpus.split,
            text_column=corpus.text_column,
            bos=corpus.bos,
        )
        record = model_comparison.compare_models(
            (_described(each, text, corpus.seq_len, batch_size, where) for each in wanted),
            command=command_line(),
        )
        report = finish(folder, "models", record, models_report)
    show(record, report, output.output, "models.html")


def _check_candidate(candidate: Candidate) -> None:
    from cascade.studies.comparisons.configurations import known_names

    with status(f"Looking for {candidate.source}"):
        try:
            candidate.check()
        except ModelError as error:
            if candidate.measured and candidate.source in known_names():
                hint = f"; its sizes alone are known: --unmeasured {candidate.source}"
                raise type(error)(f"{error}{hint}") from error
            raise


def _described(
    candidate: Candidate, text: SameText, seq_len: int, batch_size: int, where: DeviceOptions
) -> MeasuredModel | UnmeasuredModel:
    from cascade.studies.comparisons.altered_models import alter
    from cascade.studies.comparisons.compared_models import describe_model, measure_model

    if not candidate.measured:
        return describe_model(candidate.source, seq_len)
    stack = load_model(picked(ModelOptions, where, model=candidate.source, revision=None))
    if candidate.alteration is not None:
        with status(f"Altering a copy: {candidate.alteration.name}"):
            alter(stack, candidate.alteration)
    with status("Reading the corpus"):
        blocks = text.blocks(stack)
    name = known(stack.provenance.name)
    with progress_bar(name or "model", blocks.tokens) as advance:
        return measure_model(stack, blocks, batch_size=batch_size, progress=advance)

"""The command that puts corpora side by side, and how each of several corpora is named."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from cascade.cli.app import app
from cascade.cli.console import command_line, load_model, progress_bar, status
from cascade.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Model,
    NumSamples,
    Output,
    Overwrite,
    Revision,
    SeqLen,
)
from cascade.cli.output import finish, report_folder, show
from cascade.core.errors import CorpusError, UsageError

if TYPE_CHECKING:
    from cascade.corpora.blocks import TokenBlocks
    from cascade.models.stack import DecoderStack

_GRAMMAR = "NAME[:CONFIG][@SPLIT][#COLUMN]"

#: What ends like this is a file, whatever else its name holds.
_FILES = (".jsonl", ".json", ".parquet", ".txt")


@dataclass(frozen=True)
class NamedCorpus:
    """One of several corpora, as a command names it.

    Attributes:
        source: As for `load_blocks`.
        config: A configuration of a hub dataset.
        split: A split.
        text_column: The column to read.
    """

    source: str
    config: str | None = None
    split: str | None = None
    text_column: str | None = None

    @classmethod
    def read(cls, text: str) -> NamedCorpus:
        """Read NAME[:CONFIG][@SPLIT][#COLUMN].

        Settings are taken from the end, one by one, until what is left exists or ends like a file:
        so a path may hold any of the three signs. A configuration holds no slash.

        Raises:
            UsageError: A part is empty.
        """
        rest, found = text, dict.fromkeys(("text_column", "split", "config"), "")
        for sign, setting in (("#", "text_column"), ("@", "split"), (":", "config")):
            if _is_path(rest):
                break
            name, cut, value = rest.rpartition(sign)
            if not cut or (sign == ":" and set(value) & set("/\\")):
                continue
            if not name or not value:
                raise UsageError(f"expected a corpus {_GRAMMAR}, got {text!r}; fill in all parts")
            rest, found[setting] = name, value
        return cls(rest, **{setting: value or None for setting, value in found.items()})

    def place(self) -> tuple[str | None, ...]:
        """Return what tells it from other corpora; for a path, whichever way it is written."""
        path = os.path.expanduser(self.source)
        source = os.path.realpath(path) if os.path.exists(path) else self.source
        return source, self.config, self.split, self.text_column


def _is_path(text: str) -> bool:
    # These of os.path answer for any string.
    return text.lower().endswith(_FILES) or os.path.exists(os.path.expanduser(text))


@app.command("compare-corpora")
def compare_corpora(
    corpora: Annotated[
        list[str],
        typer.Argument(
            metavar="CORPUS",
            # No brackets: help reads them as markup.
            help="Two or more, the first is the reference: NAME, or as much as is needed of "
            "NAME:CONFIG@SPLIT#COLUMN.",
            show_default=False,
        ),
    ],
    model: Model = "smollm2-135m",
    revision: Revision = None,
    layer: Annotated[
        int | None,
        typer.Option("--layer", help="Exit layer; as the first corpus suggests without."),
    ] = None,
    hard_ratio: Annotated[
        list[float] | None, typer.Option(help="Share of hard tokens; repeatable.")
    ] = None,
    margin: Annotated[
        float, typer.Option(help="The smallest difference of mean similarities that matters.")
    ] = 0.01,
    tolerance: Annotated[
        float, typer.Option(help="How far off the hard ratio may be where a threshold transfers.")
    ] = 0.05,
    num_samples: NumSamples = 500,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", min=0, help="Tokens of each, spread evenly over it; 0 for all."
        ),
    ] = 16_384,
    seq_len: SeqLen = 128,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Read hub datasets without fetching the whole of them."),
    ] = False,
    batch_size: BatchSize = 32,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the resampling.")] = 0,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Put corpora side by side: which layers move, do thresholds transfer?

    A corpus is named as elsewhere (embedded, a file, a hub dataset), with
    its settings behind it: Salesforce/wikitext:wikitext-2-raw-v1@test,
    embedded@held-out, texts.jsonl#body. With --output, writes
    corpora.json, corpora.html and two SVGs.
    """
    with report_folder(output, "corpora", PICTURES, overwrite=overwrite) as folder:
        from cascade.report.studies.corpora import corpora_report
        from cascade.saturation.profile import HARD_RATIOS
        from cascade.studies.comparisons import corpus_comparison

        comparison = corpus_comparison.CorpusComparisonConfig(
            layer=layer,
            hard_ratios=tuple(hard_ratio or HARD_RATIOS),
            margin=margin,
            tolerance=tolerance,
            seed=seed,
        )
        comparison.check()
        named = _read_names(corpora)
        sizes = _Sizes(num_samples or None, max_tokens or None, seq_len, stream)
        sizes.check()
        stack = load_model(model, revision, dtype, device)
        blocks = [_load(one, stack, sizes) for one in named]
        corpus_comparison.check_corpora(stack, blocks, comparison, batch_size)
        total = sum(one.tokens for one in blocks)
        with progress_bar("Measuring", total) as advance:
            record = corpus_comparison.compare_corpora(
                stack,
                blocks,
                comparison,
                batch_size=batch_size,
                command=command_line(),
                progress=advance,
            )
        report = finish(folder, "corpora", record, corpora_report)
    show(report, output, "corpora")


#: The pictures of `cascade compare-corpora --output`.
PICTURES = ("corpora-profiles.svg", "corpora-thresholds.svg")


@dataclass(frozen=True)
class _Sizes:
    """How much is read of each corpus."""

    num_samples: int | None
    max_tokens: int | None
    seq_len: int
    stream: bool

    def check(self) -> None:
        if self.stream and self.num_samples is None:
            raise UsageError("expected --num-samples above 0 with --stream, got 0 for all of them")
        if self.max_tokens is not None and self.max_tokens < self.seq_len:
            raise UsageError(
                f"expected --max-tokens of at least one sequence of {self.seq_len} tokens, got "
                f"{self.max_tokens}; raise it or take a smaller --seq-len"
            )


def _read_names(texts: Sequence[str]) -> list[NamedCorpus]:
    """Return the corpora that a command names, each once."""
    from cascade.studies.comparisons.corpus_comparison import check_number

    check_number(len(texts))
    named = [NamedCorpus.read(text) for text in texts]
    seen: dict[tuple[str | None, ...], str] = {}
    for text, one in zip(texts, named, strict=True):
        if one.place() in seen:
            raise UsageError(
                f"expected different corpora, got {seen[one.place()]!r} and {text!r}, which are "
                "one; leave one out"
            )
        seen[one.place()] = text
    return named


def _load(named: NamedCorpus, stack: DecoderStack, sizes: _Sizes) -> TokenBlocks:
    """Read a corpus, and take as many of its sequences as are wanted, evenly spaced."""
    from cascade.corpora.blocks import load_blocks

    try:
        with status(f"Reading {named.source}"):
            blocks = load_blocks(
                named.source,
                stack.tokenizer,
                seq_len=sizes.seq_len,
                num_samples=sizes.num_samples,
                split=named.split,
                config=named.config,
                text_column=named.text_column,
                stream=sizes.stream,
            )
    except CorpusError as error:
        raise CorpusError(_in_this_grammar(str(error))) from error
    if named.text_column is not None:
        # Two columns of one corpus are two corpora.
        blocks = replace(blocks, name=f"{blocks.name}-{named.text_column.lower()}")
    if sizes.max_tokens is None:
        return blocks
    return blocks.spread(sizes.max_tokens // sizes.seq_len)


def _in_this_grammar(text: str) -> str:
    """Return an error's text with the options of other commands written as they are here."""
    for option, here in (
        ("--config", ":CONFIG"),
        ("--split", "@SPLIT"),
        ("--text-column", "#COLUMN"),
    ):
        text = text.replace(option, here)
    return text

"""The command line: one function per command; heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade.errors import CascadeError, OutputError, UsageError, os_reason

if TYPE_CHECKING:
    from rich.console import Console

    from cascade.files import RunFolder
    from cascade.saturation import SaturationProfile

app = typer.Typer(
    name="cascade",
    help="Measure how a language model's layers saturate, and hold it to stored baselines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    help="Measure speed and memory, in one process, interleaved.", no_args_is_help=True
)
app.add_typer(bench, name="bench")

#: The files of one run of `cascade analyze --output`.
RUN_FILES = ("profile.json", "profile.npz", "layer-profile.svg", "density.svg", "report.html")

_MODEL = "Model: smollm2-135m, a hub id, a local folder, or a .gguf file."
_DTYPE = "Arithmetic: float32, bfloat16 or float16."
_DEVICE = "Device: cpu, cuda, mps or auto."


def _show_version(value: bool) -> None:
    if value:
        from cascade import __version__

        typer.echo(f"cascade {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    pass


@app.command()
def analyze(
    model: Annotated[str, typer.Option(help=_MODEL)] = "smollm2-135m",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    corpus: Annotated[
        str, typer.Option(help="embedded, a .jsonl/.json/.parquet/.txt file, or a hub dataset.")
    ] = "embedded",
    split: Annotated[str | None, typer.Option(help="Split of a hub or embedded corpus.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a hub dataset.")] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column to read, where records are not in Alpaca form.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=0, help="Records to take; 0 for all.")] = 500,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 128,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop at this many tokens.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 32,
    dtype: Annotated[str, typer.Option(help=_DTYPE)] = "float32",
    device: Annotated[str, typer.Option(help=_DEVICE)] = "cpu",
    seed: Annotated[
        int | None, typer.Option(help="Draw the records at random; in corpus order without.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.html, SVGs and profile.json.")
    ] = None,
    npz: Annotated[
        Path | None, typer.Option(help="File for one similarity per token and layer.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier run.")
    ] = False,
) -> None:
    """Measure the saturation of every decoder layer over a corpus.

    Prints statistics, outliers, special layers and suggested exit
    thresholds. With --output, writes the same as a self-contained
    HTML page, SVG and JSON.
    """
    from cascade.archive import SimilarityArchive, check_free
    from cascade.files import RunFolder
    from cascade.report import print_profile

    with contextlib.ExitStack() as cleanup:
        # What cannot be written is said now, not after the pass.
        folder = None
        if output is not None:
            folder = cleanup.enter_context(RunFolder(output, RUN_FILES, overwrite=overwrite))
        if npz is not None:
            check_free(npz, overwrite=overwrite)
            if output is not None and npz.resolve() in [(output / f).resolve() for f in RUN_FILES]:
                raise OutputError(f"--output writes {npz} itself; choose another --npz")
        from cascade import corpora, models, saturation

        with _status(f"Loading {model} (a first time can take half a minute)"):
            stack = models.load(model, revision=revision, dtype=dtype, device=device)
        with _status(f"Reading {corpus}"):
            blocks = corpora.load_blocks(
                corpus,
                stack.tokenizer,
                seq_len=seq_len,
                num_samples=num_samples or None,
                max_tokens=max_tokens,
                split=split,
                config=config,
                text_column=text_column,
                seed=seed,
            )
        archive = None
        if npz is not None:
            archive = cleanup.enter_context(
                SimilarityArchive(npz, stack.layer_labels, overwrite=overwrite)
            )
        with _progress("Analyzing", blocks.tokens) as advance:
            profile = saturation.analyze(
                stack,
                blocks,
                batch_size=batch_size,
                command=_command(),
                progress=advance,
                sink=archive.add if archive else None,
            )
        record = profile.record()
        if folder is not None:
            _write_run(folder, profile)
        if archive is not None:
            archive.save(record["provenance"])
    _print(print_profile, record)
    written = [str(output / "report.html")] if output else []
    written += [str(npz)] if npz else []
    if written:
        typer.echo(f"Wrote {', '.join(written)}", err=True)


def _write_run(folder: RunFolder, profile: SaturationProfile) -> None:
    import io

    import numpy as np

    from cascade.baselines import to_json
    from cascade.report import density_svg, layer_profile_svg, profile_page

    record, arrays = profile.record(), profile.arrays()
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    contents: tuple[str | bytes, ...] = (
        to_json(record) + "\n",
        packed.getvalue(),
        layer_profile_svg(record),
        density_svg(record, arrays),
        profile_page(record, arrays),
    )
    for name, content in zip(RUN_FILES, contents, strict=True):
        folder.write(name, content)


@app.command()
def accept(
    run: Annotated[Path, typer.Argument(help="A folder that `cascade analyze --output` wrote.")],
    baselines: Annotated[Path, typer.Option(help="The folder of all baselines.")] = Path(
        "baselines"
    ),
) -> None:
    """Store a reviewed run as the baseline of its model and corpus."""
    from cascade.baselines import accept as store

    path, before = store(baselines, run)
    if before is not None:
        typer.echo(f"Against the baseline before: {before.describe()}")
    typer.echo(f"Wrote {path} and {path.with_suffix('.npz').name}; review and commit both")


@bench.command("collect")
def bench_collect(
    model: Annotated[str, typer.Option(help=_MODEL)] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="Tokens per pass over the embedded corpus.")] = 4096,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass, all ways.")] = 32,
    rounds: Annotated[int, typer.Option(help="Timed passes per way.")] = 7,
    threads: Annotated[
        int | None, typer.Option(help="Threads to compute with; as torch has it without.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the order of the ways in every round.")] = 0,
    device: Annotated[str, typer.Option(help=_DEVICE)] = "cpu",
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory too, in processes of their own.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="Folder for bench.json.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of an earlier run.")
    ] = False,
) -> None:
    """Time the ways to collect similarities: the seed's, the bare decoder's, analyze, a peer's.

    One process, rounds interleaved in random order. A missed target is
    printed and recorded; it does not fail the command.
    """
    from cascade.files import RunFolder
    from cascade.report import print_bench

    with contextlib.ExitStack() as cleanup:
        folder = None
        if output is not None:
            folder = cleanup.enter_context(RunFolder(output, ("bench.json",), overwrite=overwrite))
        from cascade import benchmarks
        from cascade.baselines import to_json

        setup = benchmarks.Setup(
            model=model,
            tokens=tokens,
            seq_len=seq_len,
            batch_size=batch_size,
            rounds=rounds,
            threads=threads,
            seed=seed,
            device=device,
        )
        record = benchmarks.collect(
            setup,
            memory=memory,
            command=_command(),
            progress=lambda text: typer.echo(text, err=True),
        )
        if folder is not None:
            folder.write("bench.json", to_json(record) + "\n")
    _print(print_bench, record)
    if output is not None:
        typer.echo(f"Wrote {output / 'bench.json'}", err=True)


@contextlib.contextmanager
def _status(text: str) -> Iterator[None]:
    """Show a spinner on stderr while something takes long; nothing where it is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


@contextlib.contextmanager
def _progress(what: str, tokens: int) -> Iterator[Callable[[int], None]]:
    """Show tokens done, tokens/s and the time left on stderr, where it is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} tokens/s" if speed else "- tokens/s")

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        Speed(),
        TimeLeft(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=tokens)
        yield lambda done: bar.advance(task, done)


def _command() -> str:
    """Return what the user ran, as a line that can be run again."""
    return shlex.join(["cascade", *sys.argv[1:]])


def _print(show: Callable[[dict[str, Any], Console], None], record: dict[str, Any]) -> None:
    """Print a record; a full disk behind stdout is one line, a reader who left is none."""
    from rich.console import Console

    try:
        show(record, Console())
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot print: {os_reason(error)}; send stdout elsewhere") from error


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse options that a script left empty: as a path, nothing would mean the current folder."""
    for before, argument in pairwise(["", *arguments]):
        flag = before if argument == "" else argument.removesuffix("=")
        if argument == "" or (argument.startswith("--") and argument != flag):
            raise UsageError(f"expected a value for {flag or 'the command'}, got an empty one")


def main() -> None:
    """Run the command line; what a user can put right is one line on stderr and exit status 2."""
    # Our own bars and messages say what concerns the user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        _refuse_empty(sys.argv[1:])
        app()
    except CascadeError as error:
        # A path or a column can hold a line break of its own.
        typer.echo(f"cascade: {' '.join(str(error).splitlines())}", err=True)
        sys.exit(error.exit_status)

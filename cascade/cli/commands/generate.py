"""`cascade generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade.cli.app import app
from cascade.cli.commands.evaluate import Heads
from cascade.cli.console import load_model, print_record, status
from cascade.cli.inputs import check_cascade_alone, read_heads, usual_layer
from cascade.cli.options import RULES_HELP, Device, Dtype, Model, Revision, Seed
from cascade.core.errors import UsageError

if TYPE_CHECKING:
    from cascade.decoding.early_exit import EarlyExit
    from cascade.exits.fitted_heads import FittedHeads
    from cascade.models.stack import DecoderStack


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to add.")] = 40,
    layer: Annotated[
        int | None,
        typer.Option(help="Exit layer; the last but one, or the heads' highest below N, without."),
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help=f"Exit rule, cosine without: {RULES_HELP}")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Tokens at or above it leave; without, the full model.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="calibration.json: layer, rule, threshold and propagation."),
    ] = None,
    hard_ratio: Annotated[
        float | None, typer.Option(help="Which of the calibration's thresholds.")
    ] = None,
    cascade: Annotated[
        Path | None, typer.Option(help="A cascade of `cascade train`: base, stages, thresholds.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="The full model confirms every token.")
    ] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Draw the tokens.")] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits of a draw; the model's own without.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw among the likeliest of this sum; the model's own without."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Draw among so many, 0 for all; the model's own, or 50, without."),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends it; repeatable.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    compare: Annotated[
        bool, typer.Option(help="Generate with the full model too, to compare.")
    ] = True,
    model: Model = "smollm2-135m",
    revision: Revision = None,
    heads: Heads = None,
    propagation: Annotated[
        str | None,
        typer.Option(help="What upper layers see of exited tokens; frozen without."),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Seed = 0,
) -> None:
    """Generate, and show at which layer each token left."""
    from cascade.decoding.transcript import transcribe
    from cascade.report.exits.generation import print_generation

    said: dict[str, Any] = {
        "--layer": layer,
        "--rule": rule,
        "--threshold": threshold,
        "--propagation": propagation,
    }
    given = [name for name, value in said.items() if value is not None]
    if calibration is not None and given:
        raise UsageError(
            "--calibration says layer, rule, threshold and propagation; leave out "
            f"{', '.join(given)}"
        )
    if cascade is not None:
        said |= {"--calibration": calibration, "--heads": heads}
        check_cascade_alone([name for name, value in said.items() if value is not None])
    if verify and propagation not in (None, "exact"):
        raise UsageError(f"--verify needs --propagation exact, got {propagation}; leave one out")
    if hard_ratio is not None and calibration is None:
        raise UsageError("--hard-ratio chooses a calibration's threshold; give --calibration")
    if not prompt.strip():
        raise UsageError("expected a prompt, got an empty one; give --prompt some text")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise UsageError("expected a --prompt in UTF-8, got other bytes; convert it first")
    drawing = {"--temperature": temperature, "--top-p": top_p, "--top-k": top_k}
    drawing = {name: value for name, value in drawing.items() if value is not None}
    if drawing and not sample:
        raise UsageError(f"{', '.join(drawing)} are of a draw; give --sample, or leave them out")
    if temperature is not None and not temperature > 0:
        raise UsageError(
            f"expected a --temperature above 0, got {temperature:g}; for the likeliest token leave "
            "out --sample"
        )
    if cascade is not None:
        from cascade.cli.commands.stages import read_cascade

        staged = read_cascade(cascade, dtype, device)
        stack, early = staged.base, staged.early_exit()
    else:
        stack = load_model(model, revision, dtype, device)
        fitted = read_heads(heads, stack)
        way = propagation or ("exact" if verify else "frozen")
        early = (
            _early_exit(stack, layer, rule or "cosine", threshold, fitted, way, seed)
            if calibration is None
            else _calibrated(calibration, stack, fitted, hard_ratio)
        )
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "seed": seed,
        "stop_strings": stop,
    }
    draw = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    settings |= {name: value for name, value in draw.items() if value is not None}
    with status("Generating"):
        record = transcribe(
            early, prompt, settings, chat=chat, verify=verify, compare=compare, full=stack
        )
    print_record(print_generation, record)


def _calibrated(
    path: Path, stack: DecoderStack, heads: FittedHeads | None, hard_ratio: float | None
) -> EarlyExit:
    from cascade.evaluation.calibration import early_exit_of, read_calibration

    record = read_calibration(path, stack)
    return early_exit_of(record, stack, heads=heads, hard_ratio=hard_ratio)


def _early_exit(
    stack: DecoderStack,
    layer: int | None,
    rule: str,
    threshold: float | None,
    heads: FittedHeads | None,
    propagation: str,
    seed: int,
) -> EarlyExit:
    from cascade.decoding.early_exit import EarlyExit

    return EarlyExit(
        stack,
        layer=usual_layer(stack, heads) if layer is None else layer,
        rule=rule,
        threshold=float("inf") if threshold is None else threshold,
        heads=heads,
        propagation=propagation,  # type: ignore[arg-type]  # checked by EarlyExit itself
        seed=seed,
    )

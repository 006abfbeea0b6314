"""`cascade generate`."""

from __future__ import annotations

import time
from itertools import pairwise
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
    from cascade.decoding.generation import Generation
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
    ids = _encode(stack, prompt, chat=chat)
    with status("Generating"):
        summary = _generate(stack, early, ids, settings, verify=verify, compare=compare)
    print_record(print_generation, summary | {"prompt": prompt, "chat": chat})


def _calibrated(
    path: Path, stack: DecoderStack, heads: FittedHeads | None, hard_ratio: float | None
) -> EarlyExit:
    from cascade.evaluation.calibration import early_exit_of, read_calibration

    return early_exit_of(read_calibration(path), stack, heads=heads, hard_ratio=hard_ratio)


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


def _encode(stack: DecoderStack, prompt: str, *, chat: bool) -> Any:
    import torch

    if stack.tokenizer is None:
        raise UsageError("the model has no tokenizer to read a prompt with")
    if chat:
        if not getattr(stack.tokenizer, "chat_template", None):
            raise UsageError("the model's tokenizer has no chat template; leave out --chat")
        prompt = str(
            stack.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )
    return torch.tensor([stack.tokenizer(prompt, add_special_tokens=not chat)["input_ids"]])


def _generate(
    stack: DecoderStack,
    early: EarlyExit,
    ids: Any,
    settings: dict[str, Any],
    *,
    verify: bool,
    compare: bool,
) -> dict[str, Any]:
    """Generate, with the full model too where wanted; return a record of kind `generation`."""
    from cascade.decoding.early_exit import EarlyExit
    from cascade.decoding.generation import Generation

    mask = ids.new_ones(ids.shape)  # a prompt is text, whatever its tokens are

    def timed(model: EarlyExit, **options: Any) -> tuple[Generation, list[int], float]:
        start = time.perf_counter()
        made = model.generate(ids, mask, return_dict_in_generate=True, **settings, **options)
        assert isinstance(made, Generation)  # asked for as such
        seconds = time.perf_counter() - start
        return made, made.sequences[0, ids.shape[1] :].tolist(), seconds

    # The first pass warms caches up for whichever comes after it; some tokens are enough.
    early.generate(ids[:, -8:], mask[:, -8:], **settings | {"max_new_tokens": 1})
    made, new, seconds = timed(early, verify=verify)
    full = None
    if compare:
        _, theirs, full_seconds = timed(EarlyExit(stack))
        same = [a == b for a, b in zip(new, theirs, strict=False)]
        full = {
            "text": "".join(_pieces(stack, ids, theirs)),
            "tokens": len(theirs),
            "same_tokens": same.index(False) if False in same else len(same),
            "tokens_per_second": len(theirs) / full_seconds,
            "speed_ratio": (len(new) / seconds) / (len(theirs) / full_seconds),
        }
    layers = made.exit_layers[0].tolist()
    last = early.stack.num_layers
    known = sorted({*(at.layer for at in early.exits), last})
    return {
        "schema": 1,
        "kind": "generation",
        "num_layers": last,
        "exits": [
            {
                "layer": at.layer,
                "rule": at.rule.name,
                "head": at.head.name,
                "threshold": None if at.threshold == float("inf") else at.threshold,
            }
            for at in early.exits
        ],
        "propagation": early.propagation,
        "tokens": _pieces(stack, ids, new),
        "exit_layers": layers,
        "by_layer": [
            {
                "layer": layer,
                "tokens": layers.count(layer),
                "share": layers.count(layer) / len(layers),
            }
            for layer in known
        ],
        "layers_per_token": made.layers_per_token,
        "tokens_per_second": len(new) / seconds,
        "counts": made.counts.record(),
        "verified": verify,
        "drafted": made.drafted,
        "accepted": made.accepted,
        "fallback_reason": early.fallback_reason,
        "full": full,
    }


def _pieces(stack: DecoderStack, ids: Any, new: list[int]) -> list[str]:
    """Return what each new token adds to the text: decoded alone, some would be half a letter."""
    assert stack.tokenizer is not None  # the prompt was read with it
    before = ids[0].tolist()
    texts = [
        str(stack.tokenizer.decode(before + new[:count])).rstrip("\ufffd")
        for count in range(len(new) + 1)
    ]
    return [after[len(start) :] for start, after in pairwise(texts)]

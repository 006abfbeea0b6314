"""Commands of early exit: fit heads, calibrate thresholds, evaluate, generate."""

from __future__ import annotations

import contextlib
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade.cli.app import app
from cascade.cli.options import (
    RULES_HELP,
    BatchSize,
    Column,
    Corpus,
    Device,
    Dtype,
    MaxTokens,
    Model,
    Output,
    Overwrite,
    PropagationOption,
    Revision,
    Seed,
    SeqLen,
    Split,
    given,
)
from cascade.cli.showing import (
    command_line,
    load_model,
    print_record,
    progress_bar,
    read_layers,
    status,
)
from cascade.errors import OutputError, UsageError

if TYPE_CHECKING:
    from cascade.corpora import TokenBlocks
    from cascade.early_exit import EarlyExit
    from cascade.generation import Generation
    from cascade.heads import FittedHeads
    from cascade.models import DecoderStack

Heads = Annotated[
    Path | None,
    typer.Option("--heads", help="Heads of `cascade fit-heads`; the logit lens without."),
]


@app.command("fit-heads")
def fit_heads(
    output: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    layers: Annotated[str, typer.Option(help="Exit layers, e.g. 20,24,28.")],
    model: Model = "smollm2-135m",
    revision: Revision = None,
    corpus: Corpus = "embedded",
    split: Split = None,
    text_column: Column = None,
    seq_len: SeqLen = 128,
    max_tokens: MaxTokens = None,
    batch_size: BatchSize = 32,
    distill: Annotated[
        int, typer.Option(min=0, help="Then learn from the full model, in so many passes.")
    ] = 0,
    half: Annotated[bool, typer.Option("--half", help="Store in 16 bits: half the size.")] = False,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Fit exit heads in closed form, and maps that tell upper layers of exited tokens.

    One pass over the corpus (of the embedded one: its training split).
    --distill goes on from there, and keeps what is better on sequences
    kept aside.
    """
    wanted = read_layers(layers)
    _check_free(output, overwrite=overwrite)
    from cascade import distillation, heads
    from cascade.saturation import provenance_of

    stack = load_model(model, revision, dtype, device)
    blocks = read_blocks(
        stack, corpus, split or embedded(corpus, "train"), text_column, seq_len, max_tokens
    )
    with progress_bar("Fitting", blocks.tokens) as advance:
        fitted = heads.fit_heads(
            stack,
            blocks,
            wanted,
            batch_size=batch_size,
            provenance=provenance_of(stack, blocks, command_line()),
            progress=advance,
        )
    if distill:
        with progress_bar("Distilling", distill * distillation.trained_tokens(blocks)) as advance:
            fitted = distillation.distill(
                stack,
                fitted,
                blocks,
                epochs=distill,
                batch_size=batch_size,
                seed=seed,
                progress=advance,
            )
    fitted.save(output, half=half)
    # Told after all is safe: what is printed to can be full.
    size = output.stat().st_size / 1e6
    typer.echo(f"Wrote {output} ({size:.1f} MB): heads for the layers {layers}", err=True)
    about = fitted.provenance.get("distillation", {})
    for layer, losses in about.get("kl_on_sequences_kept_aside", {}).items():
        typer.echo(
            f"Layer {layer}: KL to the full model {losses[0]:.4f} nats in closed form, "
            f"{min(losses):.4f} distilled (on sequences kept aside)"
        )


@app.command()
def calibrate(
    layer: Annotated[
        int | None, typer.Option(help="Exit layer; the last but one, or the heads', without.")
    ] = None,
    rule: Annotated[str, typer.Option(help=f"Exit rule: {RULES_HELP}")] = "cosine",
    hard_ratio: Annotated[
        list[float] | None, typer.Option(help="Share of hard tokens; repeatable.")
    ] = None,
    risk: Annotated[
        float | None,
        typer.Option(help="Certify: at most this share of tokens differs from the full model's."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="How sure the certificate must be.")] = 0.95,
    transfer_to: Annotated[
        str | None, typer.Option(help="Another corpus, to see what the thresholds do there.")
    ] = None,
    transfer_split: Annotated[str | None, typer.Option(help="Split of that corpus.")] = None,
    transfer_text_column: Annotated[
        str | None, typer.Option(help="Column to read of that corpus.")
    ] = None,
    model: Model = "smollm2-135m",
    revision: Revision = None,
    heads: Heads = None,
    propagation: PropagationOption = "frozen",
    corpus: Corpus = "embedded",
    split: Split = None,
    text_column: Column = None,
    seq_len: SeqLen = 128,
    max_tokens: MaxTokens = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Seed = 0,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Fit thresholds for hard ratios, with intervals; or certify one for a risk.

    Of the embedded corpus the held-out split is taken: heads are fitted on
    the other. With --output, writes calibration.json, which `cascade generate
    --calibration` runs with.
    """
    from cascade.files import RunFolder
    from cascade.report import print_calibration

    with contextlib.ExitStack() as cleanup:
        folder = None
        if output is not None:
            names = ("calibration.json",)
            folder = cleanup.enter_context(RunFolder(output, names, overwrite=overwrite))
        from cascade import calibration
        from cascade.baselines import to_json

        stack = load_model(model, revision, dtype, device)
        fitted = read_heads(heads, stack)
        wish = calibration.Wish(
            layer=layer if layer is not None else _usual_layer(stack, fitted),
            rule=rule,
            hard_ratios=tuple(hard_ratio or (0.3, 0.5, 0.7)),
            propagation=propagation,  # type: ignore[arg-type]  # checked by the wish itself
            risk=risk,
            confidence=confidence,
        )
        wish.check()
        if transfer_to is None and (transfer_split or transfer_text_column):
            raise UsageError(
                "--transfer-split and --transfer-text-column are of the corpus that --transfer-to "
                "names; give it"
            )
        blocks = read_blocks(
            stack, corpus, split or embedded(corpus, "held-out"), text_column, seq_len, max_tokens
        )
        onto = None
        if transfer_to is not None:
            onto = read_blocks(
                stack,
                transfer_to,
                transfer_split or embedded(transfer_to, "held-out"),
                transfer_text_column,
                seq_len,
                max_tokens,
            )
        total = calibration.tokens_to_read(blocks, wish, onto=onto)
        with progress_bar("Calibrating", total) as advance:
            record = calibration.calibrate(
                stack,
                blocks,
                wish,
                heads=fitted,
                onto=onto,
                seed=seed,
                command=command_line(),
                progress=advance,
            )
        if folder is not None:
            folder.write("calibration.json", to_json(record) + "\n")
    print_record(print_calibration, record)
    if output is not None:
        typer.echo(f"Wrote {output / 'calibration.json'}", err=True)


#: The files of one run of `cascade evaluate --output`.
EVALUATION_FILES = ("evaluation.json", "pareto.svg", "evaluation.html")


@app.command()
def evaluate(
    context: typer.Context,
    cascade: Annotated[
        Path | None, typer.Option(help="A cascade of `cascade train`, measured stage by stage.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Exit layers, e.g. 24,28; the heads' own without.")
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {RULES_HELP}")] = None,
    hard_ratio: Annotated[
        list[float] | None, typer.Option(help="Share of hard tokens; repeatable.")
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(help="LAYER:RULE:THRESHOLD, a point to measure as it is; repeatable."),
    ] = None,
    only_points: Annotated[
        bool, typer.Option("--only-points", help="Measure the --point alone, as budgets do.")
    ] = False,
    agreement: Annotated[
        float, typer.Option(help="Wanted share of tokens predicted as by the full model.")
    ] = 0.95,
    perplexity_ratio: Annotated[
        float, typer.Option(help="Largest acceptable perplexity, relative to the full model's.")
    ] = 1.05,
    model: Model = "smollm2-135m",
    revision: Revision = None,
    heads: Heads = None,
    propagation: PropagationOption = "frozen",
    corpus: Corpus = "embedded",
    split: Split = None,
    text_column: Column = None,
    seq_len: SeqLen = 128,
    max_tokens: MaxTokens = 8192,
    batch_size: BatchSize = 8,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    seed: Seed = 0,
    output: Output = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure early exit against the full model, and say whether it pays here.

    Half of the sequences fit the thresholds, every figure comes from the
    other half. Of the embedded corpus the held-out split is taken.
    With --cascade, stage by stage, against the controls trained with it.
    """
    if cascade is not None:
        _evaluate_cascade(
            context,
            cascade,
            output,
            overwrite=overwrite,
            corpus=corpus,
            text_column=text_column,
            seq_len=seq_len,
            max_tokens=max_tokens,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            seed=seed,
        )
        return
    from cascade.files import RunFolder
    from cascade.report import evaluation_page, pareto_svg, print_evaluation

    with contextlib.ExitStack() as cleanup:
        folder = None
        if output is not None:
            folder = cleanup.enter_context(RunFolder(output, EVALUATION_FILES, overwrite=overwrite))
        points = [_point(text) for text in point or ()]
        from cascade import evaluation
        from cascade.baselines import to_json
        from cascade.points import Point

        stack = load_model(model, revision, dtype, device)
        fitted = read_heads(heads, stack)
        request = evaluation.Request(
            layers=evaluated_layers(layers, stack, fitted, only_points),
            rules=() if only_points else tuple(rule or ("cosine", "top2_gap")),
            hard_ratios=tuple(hard_ratio or (0.3, 0.5, 0.7)),
            thresholds=tuple(Point(*values, "given") for values in points),
            agreement=agreement,
            perplexity_ratio=perplexity_ratio,
            only_given=only_points,
        )
        request.check()
        blocks = read_blocks(
            stack, corpus, split or embedded(corpus, "held-out"), text_column, seq_len, max_tokens
        )
        fit, confirm = evaluation.split(blocks)
        with progress_bar(
            "Evaluating", confirm.tokens + (0 if only_points else fit.tokens)
        ) as advance:
            record = evaluation.evaluate(
                stack,
                fit,
                confirm,
                request,
                heads=fitted,
                propagation=propagation,  # type: ignore[arg-type]  # checked by the evaluator
                batch_size=batch_size,
                seed=seed,
                command=command_line(),
                progress=advance,
            )
        if folder is not None:
            folder.write("evaluation.json", to_json(record) + "\n")
            folder.write("pareto.svg", pareto_svg(record))
            folder.write("evaluation.html", evaluation_page(record))
    print_record(print_evaluation, record)
    if output is not None:
        typer.echo(f"Wrote {output / 'evaluation.html'}", err=True)


#: What `cascade evaluate --cascade` listens to.
_OF_A_CASCADE = {
    "cascade",
    "corpus",
    "text_column",
    "seq_len",
    "max_tokens",
    "batch_size",
    "dtype",
    "device",
    "seed",
    "output",
    "overwrite",
}


def _evaluate_cascade(
    context: typer.Context, folder: Path, output: Path | None, *, overwrite: bool, **options: Any
) -> None:
    from cascade.baselines import to_json
    from cascade.cli.stages import evaluate_stages
    from cascade.files import RunFolder
    from cascade.report import print_cascade_evaluation

    others = given(context, context.params.keys() - _OF_A_CASCADE)
    _check_cascade_alone(others)
    with contextlib.ExitStack() as cleanup:
        run = None
        if output is not None:
            run = cleanup.enter_context(
                RunFolder(output, ("cascade-evaluation.json",), overwrite=overwrite)
            )
        record = evaluate_stages(folder, **options)
        if run is not None:
            run.write("cascade-evaluation.json", to_json(record) + "\n")
    print_record(print_cascade_evaluation, record)
    if output is not None:
        typer.echo(f"Wrote {output / 'cascade-evaluation.json'}", err=True)


def _check_cascade_alone(others: list[str]) -> None:
    if others:
        raise UsageError(
            f"--cascade says base, stages and thresholds itself; leave out {', '.join(others)}"
        )


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
    from cascade.report import print_generation

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
        _check_cascade_alone([name for name, value in said.items() if value is not None])
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
        from cascade.cli.stages import read_cascade

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
    from cascade.calibration import early_exit_of, read_calibration

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
    from cascade.early_exit import EarlyExit

    return EarlyExit(
        stack,
        layer=_usual_layer(stack, heads) if layer is None else layer,
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
    from cascade.early_exit import EarlyExit
    from cascade.generation import Generation

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


def read_blocks(
    stack: DecoderStack,
    corpus: str,
    split: str | None,
    text_column: str | None,
    seq_len: int,
    max_tokens: int | None,
) -> TokenBlocks:
    """Read all of a corpus, or as much as `max_tokens`, with a spinner."""
    from cascade import corpora

    with status(f"Reading {corpus}"):
        return corpora.load_blocks(
            corpus,
            stack.tokenizer,
            seq_len=seq_len,
            num_samples=None,
            max_tokens=max_tokens,
            split=split,
            text_column=text_column,
        )


def read_heads(path: Path | None, stack: DecoderStack) -> FittedHeads | None:
    """Read fitted heads; None, the logit lens, where no file is named."""
    from cascade.heads import load_heads

    return None if path is None else load_heads(path, stack)


def _usual_layer(stack: DecoderStack, heads: FittedHeads | None) -> int:
    """Return the last layer but one, or the last below it that heads were fitted for."""
    usual = max(1, stack.num_layers - 1)
    if heads is None:
        return usual
    return max((layer for layer in heads.layers if layer <= usual), default=heads.layers[-1])


def embedded(corpus: str, split: str) -> str | None:
    """Return the split that a command takes of the embedded corpus."""
    return split if corpus == "embedded" else None


def evaluated_layers(
    text: str | None, stack: DecoderStack, heads: FittedHeads | None, only_points: bool
) -> tuple[int, ...]:
    """Return the exit layers that an option names; else those of the heads, or the last but one."""
    if text is not None:
        return read_layers(text)
    if only_points:
        return ()
    return tuple(heads.layers) if heads is not None else (max(1, stack.num_layers - 1),)


def _point(text: str) -> tuple[int, str, float]:
    parts = text.split(":")
    try:
        layer, rule, threshold = parts
        return int(layer), rule, float(threshold)
    except ValueError:
        raise UsageError(
            f"expected a point LAYER:RULE:THRESHOLD such as 29:cosine:0.9517, got {text!r}"
        ) from None


def _check_free(path: Path, *, overwrite: bool) -> None:
    from cascade.files import check_writable

    if path.suffix != ".safetensors":
        raise OutputError(f"expected --output to be a .safetensors file, got {path}")
    # os.path answers for any string, where Path raises for an overlong name.
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder, expected a file; choose another --output")
    if os.path.exists(path) and not overwrite:
        raise OutputError(f"{path} exists: choose another --output, or replace it with --overwrite")
    check_writable(path)

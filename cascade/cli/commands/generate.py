"""`cascade generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade.cli.app import command
from cascade.cli.console import print_record, status
from cascade.cli.inputs import check_cascade_alone, load_model, read_heads, usual_layer
from cascade.cli.options import RULES_HELP, HeadsFile, ModelOptions, Seed
from cascade.core.errors import UsageError

if TYPE_CHECKING:
    from cascade.decoding.early_exit import EarlyExit
    from cascade.exits.fitted_heads import FittedHeads
    from cascade.models.stack import DecoderStack


@dataclass(frozen=True)
class PromptOptions:
    """The prompt, and how much is added to it."""

    prompt: Annotated[str, typer.Option(help="What to go on from.")]
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to add.")] = 40

    def check(self) -> None:
        """Refuse a prompt without text.

        Raises:
            UsageError: It has none, or not in UTF-8.
        """
        if not self.prompt.strip():
            raise UsageError("expected a prompt, got an empty one; give --prompt some text")
        if any("\ud800" <= letter <= "\udfff" for letter in self.prompt):
            raise UsageError("expected a --prompt in UTF-8, got other bytes; convert it first")


@dataclass(frozen=True)
class ExitOptions:
    """Where tokens exit: given one by one, as a calibration, or as a cascade."""

    layer: Annotated[
        int | None,
        typer.Option(help="Exit layer; the last but one, or the heads' highest below N, without."),
    ] = None
    rule: Annotated[str | None, typer.Option(help=f"Exit rule, cosine without: {RULES_HELP}")] = (
        None
    )
    threshold: Annotated[
        float | None, typer.Option(help="Tokens at or above it leave; without, the full model.")
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(help="calibration.json: layer, rule, threshold and propagation."),
    ] = None
    hard_ratio: Annotated[
        float | None, typer.Option(help="Which of the calibration's thresholds.")
    ] = None
    cascade: Annotated[
        Path | None, typer.Option(help="A cascade of `cascade train`: base, stages, thresholds.")
    ] = None
    verify: Annotated[
        bool, typer.Option("--verify", help="The full model confirms every token.")
    ] = False

    def check(self, heads: GenerationHeads) -> None:
        """Refuse options that say the same thing twice.

        Raises:
            UsageError: They do.
        """
        one_by_one: dict[str, Any] = {
            "--layer": self.layer,
            "--rule": self.rule,
            "--threshold": self.threshold,
            "--propagation": heads.propagation,
        }
        if self.calibration is not None and _given(one_by_one):
            raise UsageError(
                "--calibration says layer, rule, threshold and propagation; leave out "
                f"{', '.join(_given(one_by_one))}"
            )
        if self.cascade is not None:
            others = {"--calibration": self.calibration, "--heads": heads.heads}
            check_cascade_alone(_given(one_by_one | others))
        if self.verify and heads.propagation not in (None, "exact"):
            raise UsageError(
                f"--verify needs --propagation exact, got {heads.propagation}; leave one out"
            )
        if self.hard_ratio is not None and self.calibration is None:
            raise UsageError("--hard-ratio chooses a calibration's threshold; give --calibration")


def _given(options: dict[str, Any]) -> list[str]:
    return [name for name, value in options.items() if value is not None]


@dataclass(frozen=True)
class GenerationHeads:
    """Exit heads, and what upper layers get of exited tokens, if that is given."""

    heads: HeadsFile = None
    propagation: Annotated[
        str | None,
        typer.Option(help="What upper layers see of exited tokens; frozen without."),
    ] = None


@dataclass(frozen=True)
class DrawOptions:
    """How tokens are chosen, where the text ends, and what is shown beside it."""

    sample: Annotated[bool, typer.Option("--sample", help="Draw the tokens.")] = False
    temperature: Annotated[
        float | None, typer.Option(help="Divides the logits of a draw; the model's own without.")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw among the likeliest of this sum; the model's own without."),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(help="Draw among so many, 0 for all; the model's own, or 50, without."),
    ] = None
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends it; repeatable.")] = None
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False
    compare: Annotated[bool, typer.Option(help="Generate with the full model too, to compare.")] = (
        True
    )

    def settings(self) -> dict[str, Any]:
        """Return the settings of a draw that are given."""
        draw = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {name: value for name, value in draw.items() if value is not None}

    def check(self) -> None:
        """Refuse settings of a draw without a draw, and a temperature that none can have.

        Raises:
            UsageError: There are some.
        """
        if self.settings() and not self.sample:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in self.settings())
            raise UsageError(f"{flags} are of a draw; give --sample, or leave them out")
        if self.temperature is not None and not self.temperature > 0:
            raise UsageError(
                f"expected a --temperature above 0, got {self.temperature:g}; for the likeliest "
                "token leave out --sample"
            )


@command("generate")
def generate(
    prompt: PromptOptions,
    exits: ExitOptions,
    draw: DrawOptions,
    model: ModelOptions,
    heads: GenerationHeads,
    seed: Seed = 0,
) -> None:
    """Generate, and show at which layer each token left."""
    from cascade.decoding.transcript import transcribe
    from cascade.report.exits.generation import print_generation

    exits.check(heads)
    prompt.check()
    draw.check()
    stack, early = _early_exit_of(exits, model, heads, seed)
    settings: dict[str, Any] = {
        "max_new_tokens": prompt.max_new_tokens,
        "do_sample": draw.sample,
        "seed": seed,
        "stop_strings": draw.stop,
    }
    settings |= draw.settings()
    with status("Generating"):
        record = transcribe(
            early,
            prompt.prompt,
            settings,
            chat=draw.chat,
            verify=exits.verify,
            compare=draw.compare,
            full=stack,
        )
    print_record(print_generation, record)


def _early_exit_of(
    exits: ExitOptions, model: ModelOptions, heads: GenerationHeads, seed: int
) -> tuple[DecoderStack, EarlyExit]:
    """Load the model that generates, and return how it exits early."""
    if exits.cascade is not None:
        from cascade.cli.commands.stages import read_cascade

        staged = read_cascade(exits.cascade, model.dtype, model.device)
        return staged.base, staged.early_exit()
    stack = load_model(model)
    fitted = read_heads(heads.heads, stack)
    if exits.calibration is not None:
        return stack, _calibrated(exits.calibration, stack, fitted, exits.hard_ratio)
    propagation = heads.propagation or ("exact" if exits.verify else "frozen")
    return stack, _early_exit(
        stack, exits.layer, exits.rule or "cosine", exits.threshold, fitted, propagation, seed
    )


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

"""`cascade generate`: generate the full model's own text, or text with early exit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from cascade.cli import completion
from cascade.cli.app import command
from cascade.cli.console import show_record, status
from cascade.cli.generation_settings import SamplingOptions
from cascade.cli.inputs import (
    check_cascade_alone,
    load_model,
    read_drafter,
    read_heads,
    usual_layer,
)
from cascade.cli.options import (
    Bos,
    ExitLayerOfHeads,
    HeadsFile,
    ModelOptions,
    Seed,
)
from cascade.core.errors import UsageError
from cascade.core.printable import is_utf8
from cascade.core.schema import known

if TYPE_CHECKING:
    from cascade.core.provenance import CorpusProvenance
    from cascade.decoding.early_exit import EarlyExit
    from cascade.exits.fitted_heads import FittedHeads
    from cascade.models.stack import DecoderStack


#: The number of new tokens if the command line gives none.
DEFAULT_NEW_TOKENS = 40


@dataclass(frozen=True)
class PromptOptions:
    """The prompt, and how many tokens are generated."""

    panel: ClassVar[str] = "Text"

    prompt: Annotated[str, typer.Option(help="Text to continue.")]
    bos: Bos = "auto"
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Generate at most this many tokens (default: 40).")
    ] = None
    stop: Annotated[list[str] | None, typer.Option(help="Stop after this text; repeatable.")] = None
    compare: Annotated[bool, typer.Option(help="Compare with the full model's text.")] = True

    def check(self) -> None:
        """Check that the prompt has text.

        Raises:
            UsageError: It has none, or is not UTF-8.
        """
        if not self.prompt.strip():
            raise UsageError("expected text in --prompt, got an empty one; add some")
        if not is_utf8(self.prompt):
            raise UsageError("expected a --prompt in UTF-8, got other bytes; convert it first")
        if not all(map(is_utf8, self.stop or ())):
            raise UsageError("expected --stop in UTF-8, got other bytes; convert it first")


@dataclass(frozen=True)
class ExitOptions:
    """Where tokens exit: set by single options, by a calibration, or by a cascade."""

    panel: ClassVar[str] = "Exit"

    layer: ExitLayerOfHeads = None
    rule: Annotated[
        str | None,
        typer.Option(
            help="Exit rule, e.g. top2_gap (default: cosine).", autocompletion=completion.rules
        ),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(help="Let tokens with this confidence or more exit (default: none exits)."),
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(help="calibration.json to take layer, rule and threshold from."),
    ] = None
    hard_ratio: Annotated[
        float | None, typer.Option(help="Use the calibration's threshold for this hard ratio.")
    ] = None
    cascade: Annotated[
        Path | None,
        typer.Option(help="Folder of `cascade train` to take the model and its stages from."),
    ] = None
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Let the full model confirm every token (default: if nothing exits)."
        ),
    ] = False
    drafter: Annotated[
        Path | None,
        typer.Option(help="Folder of `cascade train-drafter`; it drafts tokens without exits."),
    ] = None

    def has_exits(self, heads: GenerationHeads) -> bool:
        """Return whether an option asks for exits."""
        own = (self.layer, self.rule, self.threshold, self.calibration, self.cascade)
        return any(value is not None for value in (*own, heads.heads, heads.propagation))

    def check(self, heads: GenerationHeads) -> None:
        """Check that no two options set the same thing.

        Raises:
            UsageError: Two of them do.
        """
        one_by_one: dict[str, Any] = {
            "--layer": self.layer,
            "--rule": self.rule,
            "--threshold": self.threshold,
            "--propagation": heads.propagation,
        }
        if self.calibration is not None and _given(one_by_one):
            raise UsageError(
                "--calibration sets layer, rule, threshold and propagation; leave out "
                f"{', '.join(_given(one_by_one))}"
            )
        if self.cascade is not None:
            others = {"--calibration": self.calibration, "--heads": heads.heads}
            check_cascade_alone(_given(one_by_one | others))
        if self.verify and heads.propagation not in (None, "exact"):
            raise UsageError(
                f"--verify needs --propagation exact, got {heads.propagation}; leave one out"
            )
        if self.drafter is not None and self.has_exits(heads):
            raise UsageError(
                "--drafter drafts for the full model, and exits were asked for as well; leave out "
                "--drafter, or all options for exits"
            )
        if self.hard_ratio is not None and self.calibration is None:
            raise UsageError("--hard-ratio needs --calibration; add it, or leave --hard-ratio out")


def _given(options: dict[str, Any]) -> list[str]:
    return [name for name, value in options.items() if value is not None]


@dataclass(frozen=True)
class GenerationHeads:
    """Exit heads, and the propagation if the command line has one."""

    heads: HeadsFile = None
    propagation: Annotated[
        str | None,
        typer.Option(
            help="Keys and values of exited tokens above the exit: frozen, ridge or exact "
            "(default: frozen).",
            autocompletion=completion.propagations,
        ),
    ] = None


@command("generate")
def generate(
    prompt: PromptOptions,
    exits: ExitOptions,
    sampling: SamplingOptions,
    model: ModelOptions,
    heads: GenerationHeads,
    seed: Seed = 0,
) -> None:
    """Generate text, and show at which layer each token exited.

    Without options for exits, the text is the full model's own: several tokens are drafted from the
    text so far, and the full model checks them in one pass.
    """
    from cascade.decoding.transcript import transcribe
    from cascade.report.exits.generation import print_generation

    exits.check(heads)
    prompt.check()
    settings = sampling.settings()
    stack, early, made_on = _early_exit_of(exits, model, heads, seed)
    if prompt.max_new_tokens is not None or not {"max_new_tokens", "max_length"} & settings.keys():
        settings["max_new_tokens"] = prompt.max_new_tokens or DEFAULT_NEW_TOKENS
    if prompt.stop is not None:
        settings["stop_strings"] = prompt.stop
    with status("Generating"):
        record = transcribe(
            early,
            prompt.prompt,
            {"seed": seed} | settings,
            chat=prompt.chat,
            verify=exits.verify or not exits.has_exits(heads),
            drafter=read_drafter(exits.drafter, stack),
            compare=prompt.compare,
            full=stack,
            bos=_bos(prompt.bos, stack, made_on),
        )
    show_record(record, print_generation)


def _early_exit_of(
    exits: ExitOptions, model: ModelOptions, heads: GenerationHeads, seed: int
) -> tuple[DecoderStack, EarlyExit, list[CorpusProvenance]]:
    """Load the model that generates; return how it exits early, and the texts it was fitted on."""
    if exits.cascade is not None:
        from cascade.cli.cascades import read_cascade

        staged = read_cascade(exits.cascade, model.dtype, model.device)
        return staged.base, staged.early_exit(), staged.trained_on()
    stack = load_model(model, exits=exits.has_exits(heads))
    if not exits.has_exits(heads):
        from cascade.decoding.early_exit import EarlyExit

        return stack, EarlyExit(stack, seed=seed), []
    fitted = read_heads(heads.heads, stack)
    if exits.calibration is not None:
        from cascade.evaluation.calibration import early_exit_of, read_calibration

        record = read_calibration(exits.calibration)
        early = early_exit_of(record, stack, heads=fitted, hard_ratio=exits.hard_ratio)
        return stack, early, [record.provenance.corpus]
    propagation = heads.propagation or ("exact" if exits.verify else "frozen")
    early = _early_exit(
        stack, exits.layer, exits.rule or "cosine", exits.threshold, fitted, propagation, seed
    )
    corpus = None if fitted is None else known(fitted.provenance.corpus)
    return stack, early, [] if corpus is None else [corpus]


def _bos(choice: str, stack: DecoderStack, made_on: list[CorpusProvenance]) -> str:
    """Return whether the prompt begins with BOS, after checking that fitted texts begin alike."""
    from cascade.corpora.bos import bos_rule, check_same_bos, recorded_choice

    if stack.tokenizer is None or not made_on:
        return choice
    if choice == "auto":
        choice = recorded_choice(made_on[0])
    for corpus in made_on:
        recorded = bos_rule(stack.tokenizer, choice).recorded
        check_same_bos(
            corpus.bos, recorded, what="the exits were fitted on text", again="fit them again"
        )
    return choice


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

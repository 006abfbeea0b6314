"""Exit rules: how confident a token is at an exit layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from cascade.core.arguments import read_threshold
from cascade.core.errors import UsageError
from cascade.exits.history import HiddenHistory, exit_entries
from cascade.stats.cosine import cosine


@dataclass
class ExitPoint:
    """The input of an exit rule: n tokens at one exit layer.

    Attributes:
        layer: The exit layer.
        history: States `[n, D]`: the entry of the exit layer and the earlier ones that the rule
            needs.
        compute_logits: Computes the exit head's logits, `[n, V]`; called at most once.
        token_ids: Token ids, `[n]`.
        positions: Positions of the tokens, `[n]`, from 0.
        earlier: Predictions `[n]` of the exit layers before this one, nearest last.
        full_prediction: The full model's predictions, `[n]`; only for rules that need them.
        seed: Seed for rules that draw random numbers.
    """

    layer: int
    history: HiddenHistory
    compute_logits: Callable[[], Tensor]
    token_ids: Tensor
    positions: Tensor
    earlier: Sequence[Tensor] = ()
    full_prediction: Tensor | None = None
    seed: int = 0

    @cached_property
    def logits(self) -> Tensor:
        """The exit head's logits, `[n, V]`, in fp32."""
        return self.compute_logits().float()

    @property
    def has_logits(self) -> bool:
        """Whether the logits have been computed."""
        return "logits" in self.__dict__

    @cached_property
    def log_probabilities(self) -> Tensor:
        """The log-softmax of the logits, `[n, V]`."""
        return self.logits.log_softmax(dim=-1)

    @cached_property
    def prediction(self) -> Tensor:
        """The exit head's most likely token, `[n]`."""
        return self.logits.argmax(dim=-1)

    def with_computed_logits(self) -> ExitPoint:
        """Return a copy with computed logits and without cached probabilities or predictions.

        It lets a caller time several rules on the same logits, each with its full work.
        """
        logits = self.logits
        return replace(self, compute_logits=lambda: logits)

    def similarity(self, layer: int) -> Tensor:
        """Cosine of a layer's input and output, `[n]`, in [-1, 1]."""
        before, after = (state.float() for state in self.history.pair(layer))
        return cosine(before, after)


@dataclass(frozen=True)
class ExitRule:
    """Gives each token a confidence at an exit layer; tokens with confidence >= threshold exit.

    Attributes:
        name: The name on the command line.
        confidence: Returns `[n]` from an `ExitPoint`; larger means more confident.
        low: The smallest possible confidence.
        high: The largest possible confidence.
        needs_logits: Whether the exit head has to run to decide.
        entries: How many entries of the history before the exit layer's own the rule needs.
        needs_earlier: Whether it needs the predictions of earlier exit layers.
        needs_full: Whether it needs the full model's prediction. Such a rule can score text, but
            not generate.
        what: A description of one line, for tables.
        source: The paper or project that the rule comes from.
    """

    name: str
    confidence: Callable[[ExitPoint], Tensor]
    low: float
    high: float
    needs_logits: bool
    entries: int
    needs_earlier: bool
    needs_full: bool
    what: str
    source: str

    def check(self, threshold: float, *, infinite: bool = True) -> None:
        """Check that a threshold is valid for this rule.

        The next fp32 number above the rule's range is valid: a fitted threshold has this value if
        even the most confident tokens must not exit.

        Args:
            threshold: Tokens with a confidence at or above it exit.
            infinite: Accept +inf (no token exits, as in the full model) and -inf (all tokens exit).

        Raises:
            UsageError: The threshold is not a number, is NaN, or is outside the rule's range.
        """
        threshold = read_threshold(threshold)
        above = torch.nextafter(torch.tensor(self.high), torch.tensor(math.inf)).item()
        if self.low <= threshold <= above or (infinite and math.isinf(threshold)):
            return
        also = " (or inf, or -inf)" if infinite else ""
        high = "" if math.isinf(self.high) else f" to {self.high:g}"
        raise UsageError(
            f"the rule {self.name} gives confidences from {self.low:g}{high}; expected a threshold"
            f" in this range{also}, got {threshold:g}"
        )


#: Every rule by name.
RULES: dict[str, ExitRule] = {}


def exit_rule(
    name: str,
    *,
    low: float = 0.0,
    high: float = 1.0,
    needs_logits: bool = True,
    entries: int = 0,
    needs_earlier: bool = False,
    needs_full: bool = False,
    source: str = "",
) -> Callable[[Callable[[ExitPoint], Tensor]], Callable[[ExitPoint], Tensor]]:
    """Register a confidence function as an exit rule; its docstring becomes the rule's `what`."""

    def register(confidence: Callable[[ExitPoint], Tensor]) -> Callable[[ExitPoint], Tensor]:
        what = (confidence.__doc__ or name).strip().splitlines()[0]
        RULES[name] = ExitRule(
            name,
            confidence,
            low,
            high,
            needs_logits,
            entries,
            needs_earlier,
            needs_full,
            what,
            source,
        )
        return confidence

    return register


def find_rule(name: str) -> ExitRule:
    """Return the rule called `name`.

    Raises:
        UsageError: There is no such rule; lists the rules.

    Example:
        >>> find_rule("cosine").needs_logits
        False
    """
    if not isinstance(name, str) or name not in RULES:
        raise UsageError(f"expected a rule among {', '.join(RULES)}, got {name!r}")
    return RULES[name]


def deciding_at(rule: ExitRule, layer: int, *, exit_layer: int) -> ExitRule:
    """Return a rule that decides by the similarity of a layer below the exit layer.

    For example, tokens that are easy at layer 29 can exit after layer 30, through the model's own
    LM head.

    Args:
        rule: A rule that needs only similarities, since these do not depend on the exit layer.
        layer: The layer whose states are compared.
        exit_layer: The layer at which tokens exit; `layer` or above.

    Raises:
        UsageError: The layer is outside 1..`exit_layer`, or the rule does not decide by
            similarities alone.
    """
    if layer == exit_layer:
        return rule
    exit_entries(layer, exit_layer)
    if rule.needs_logits or not rule.entries:
        raise UsageError(
            f"the rule {rule.name} can only decide at the exit layer, {exit_layer}; expected "
            f"cosine or mean_cosine to decide at layer {layer}"
        )

    def confidence(at: ExitPoint) -> Tensor:
        return rule.confidence(replace(at, layer=layer))

    return replace(
        rule,
        name=f"{rule.name}@{layer}",
        confidence=confidence,
        entries=rule.entries + exit_layer - layer,
    )


@exit_rule("cosine", low=-1.0, needs_logits=False, entries=1, source="the seed study")
def _cosine(at: ExitPoint) -> Tensor:
    """Similarity of the exit layer's input and output."""
    return at.similarity(at.layer)


@exit_rule("mean_cosine", low=-1.0, needs_logits=False, entries=2, source="the first CASCADE")
def _mean_cosine(at: ExitPoint) -> Tensor:
    """Mean similarity of the exit layer and the one before it."""
    return (at.similarity(at.layer) + at.similarity(at.layer - 1)) / 2


@exit_rule("top2_gap", source="CALM, Schuster et al. 2022, section 3.5, softmax response")
def _top2_gap(at: ExitPoint) -> Tensor:
    """Gap between the exit head's two largest probabilities."""
    best = at.log_probabilities.topk(2, dim=-1).values.exp()
    return best[:, 0] - best[:, 1]


@exit_rule("max_probability", source="BranchyNet, Teerapittayanon et al. 2016; CALM")
def _max_probability(at: ExitPoint) -> Tensor:
    """The exit head's largest probability."""
    return at.log_probabilities.amax(dim=-1).exp()


@exit_rule("entropy", source="BranchyNet, Teerapittayanon et al. 2016; DeeBERT, Xin et al. 2020")
def _entropy(at: ExitPoint) -> Tensor:
    """One minus the entropy of the exit head's distribution, in units of its largest, ln V."""
    logs = at.log_probabilities
    entropy = -(logs.exp() * logs.nan_to_num(neginf=0.0)).sum(dim=-1)
    return (1 - entropy / math.log(logs.shape[-1])).clamp(0.0, 1.0)


@exit_rule("patience", high=math.inf, needs_earlier=True, source="PABEE, Zhou et al. 2020")
def _patience(at: ExitPoint) -> Tensor:
    """Number of consecutive exit layers directly below this one that predict the same token."""
    streak = torch.zeros_like(at.prediction)
    unbroken = torch.ones_like(at.prediction, dtype=torch.bool)
    for prediction in reversed(at.earlier):
        unbroken = unbroken & (prediction == at.prediction)
        streak = streak + unbroken
    return streak.float()


@exit_rule("fixed", needs_logits=False, source="a static exit layer")
def _fixed(at: ExitPoint) -> Tensor:
    """Constant: all tokens exit at the exit layer."""
    return torch.ones(len(at.token_ids), device=at.token_ids.device)


@exit_rule("random", needs_logits=False, source="control at equal exit share")
def _random(at: ExitPoint) -> Tensor:
    """Pseudo-random number from token, position, layer and seed (control at equal exit share)."""
    mixed = at.token_ids * 0x9E3779B1 + at.positions * 0x85EBCA77 + at.layer * 0x27D4EB2F
    mixed = (mixed + (at.seed * 0x165667B1 & 0xFFFFFFFF)) & 0xFFFFFFFF
    # The finalizer of a 32-bit integer hash; every product stays below 2**63.
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    # fp32 represents the upper 24 bits exactly, and the result is below 1.
    return (mixed >> 8).float() / 2**24


@exit_rule("oracle", needs_full=True, source="control: knows the full model's answer")
def _oracle(at: ExitPoint) -> Tensor:
    """1 if the exit head and the full model predict the same token, else 0."""
    if at.full_prediction is None:
        raise UsageError(
            "the rule oracle needs the full model's prediction, so it can score but not generate; "
            "use another rule"
        )
    return (at.prediction == at.full_prediction).float()


def check_layers(rules: Mapping[int, ExitRule], num_layers: int) -> None:
    """Check that every exit layer exists and has enough layers below it for its rule.

    Args:
        rules: Exit layer -> its rule.
        num_layers: N.

    Raises:
        UsageError: A layer is outside the valid range; names the range.
    """
    for layer, rule in rules.items():
        exit_entries(layer, num_layers)
        if rule.entries > layer:
            raise UsageError(
                f"the rule {rule.name} compares {rule.entries} layers; expected an exit layer in "
                f"{rule.entries}..{num_layers}, got {layer}"
            )

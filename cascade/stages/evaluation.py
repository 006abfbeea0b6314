"""What a cascade is worth: base alone, with each stage, and against the controls of its routing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cascade.core.arguments import check_seed
from cascade.core.arrays import Array
from cascade.core.errors import CorpusError, UsageError
from cascade.core.provenance import provenance_of
from cascade.core.schema import to_plain
from cascade.corpora.blocks import TokenBlocks, check_blocks
from cascade.decoding.early_exit import EarlyExit
from cascade.models.flops import Counts, flops
from cascade.stages.cascades import Cascade
from cascade.stats.resampling import draws, interval

#: What every figure is given for; a token counts by the text that it predicts.
SCOPES = ("all", "easy", "hard", "response", "easy_response", "hard_response")


@dataclass
class _Way:
    """One row of the table: a cascade up to some stage, or a control."""

    name: str
    early: EarlyExit
    stages: int
    trained_on: str | None
    entered_by: str | None
    cascade: Cascade
    counts: Counts = field(init=False)
    losses: list[Array] = field(default_factory=list)
    hits: list[Array] = field(default_factory=list)
    left: list[Array] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = Counts.of(self.early.stack.num_layers)


def evaluate_cascade(
    cascade: Cascade,
    blocks: TokenBlocks,
    *,
    controls: Mapping[str, Cascade] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    command: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure a cascade on text, stage by stage, beside its controls.

    Easy and hard tokens are those of the first stage's entry, the same ones in every row, so that
    rows can be compared.

    Args:
        cascade: At least one stage.
        blocks: Held-out text, read with `marks=True`.
        controls: Routing -> a cascade whose only difference is a last stage trained on other
            tokens: "all" of them, or as many drawn at "random". Each is measured with its own
            entry and with the cascade's.
        batch_size: Sequences per pass.
        seed: Of the intervals.
        command: For the provenance.
        progress: Called with the number of tokens done since the last call.

    Returns:
        A record of kind `cascade-evaluation`: `rows`, each with figures per scope (perplexity,
        accuracy, the perplexity's ratio to the base's with a 95 % interval over sequences), the
        share of tokens leaving at each place, layers per token, operations relative to the base,
        and token rows computed per stage; `comparisons` of the cascade with each control; and a
        `verdict`.

    Raises:
        UsageError: A cascade without stages.
        CorpusError: Text without marks.
    """
    check_seed(seed)
    if not cascade.stages:
        raise UsageError("expected a cascade with at least one stage, got the base alone")
    if blocks.response is None:
        raise CorpusError("the text does not say what is response; read it with marks=True")
    check_blocks(cascade.base, blocks, batch_size)
    ways = _ways(cascade, controls or {})
    hard: list[Array] = []
    first_exit = cascade.early_exit(1).exits[0].layer
    for ids, numbers in blocks.batches(batch_size):
        batch = torch.from_numpy(ids).long().to(cascade.base.device)
        for way in ways:
            score = way.early.score(batch, torch.ones_like(batch))
            way.losses.append(-score.log_probabilities.double().cpu().numpy())
            way.hits.append((score.predictions[:, :-1] == batch[:, 1:]).cpu().numpy())
            way.left.append(score.exit_layers.cpu().numpy())
            way.counts = way.counts + score.counts
        hard.append((ways[1].left[-1] > first_exit)[:, :-1])
        (progress or (lambda _: None))(len(numbers) * ids.shape[1])
    masks = _masks(np.concatenate(hard), blocks.response[:, 1:])
    figures = [_figures(way, masks) for way in ways]
    rows = [
        _row(way, own, figures[0], ways[0], blocks.tokens, seed)
        for way, own in zip(ways, figures, strict=True)
    ]
    main = next(place for place, way in enumerate(ways) if way.name == "cascade")
    comparisons = [
        _compared(way, figures[main], own, seed)
        for way, own in zip(ways, figures, strict=True)
        if way.trained_on not in (None, "hard")
    ]
    return {
        "schema": 1,
        "kind": "cascade-evaluation",
        "provenance": to_plain(provenance_of(cascade.base, blocks, command)),
        "cascade": cascade.config(),
        "rows": rows,
        "comparisons": comparisons,
        "verdict": _verdict(rows[main], comparisons),
    }


def _ways(cascade: Cascade, controls: Mapping[str, Cascade]) -> list[_Way]:
    ways = [_Way("base", cascade.early_exit(0), 0, None, None, cascade)]
    last = len(cascade.stages)
    for count in range(1, last + 1):
        name = "cascade" if count == last else f"stage {count}"
        ways.append(_Way(name, cascade.early_exit(count), count, "hard", "hard", cascade))
    for routing, control in controls.items():
        routed = control.entered_like(cascade)
        ways.append(
            _Way(f"trained on {routing}", routed.early_exit(), last, routing, "hard", routed)
        )
        own = control.early_exit()
        ways.append(_Way(f"{routing} tokens", own, last, routing, routing, control))
    return ways


def _masks(hard: Array, response: Array) -> dict[str, Array]:
    return {
        "all": np.ones_like(hard),
        "easy": ~hard,
        "hard": hard,
        "response": response,
        "easy_response": response & ~hard,
        "hard_response": response & hard,
    }


@dataclass(frozen=True)
class _Figures:
    """Sums per sequence and scope, `[S]` each."""

    losses: dict[str, Array]
    hits: dict[str, Array]
    tokens: dict[str, Array]


def _figures(way: _Way, masks: Mapping[str, Array]) -> _Figures:
    losses, hits = np.concatenate(way.losses), np.concatenate(way.hits)
    return _Figures(
        {scope: np.where(mask, losses, 0.0).sum(axis=1) for scope, mask in masks.items()},
        {scope: (mask & hits).sum(axis=1) for scope, mask in masks.items()},
        {scope: mask.sum(axis=1) for scope, mask in masks.items()},
    )


def _row(
    way: _Way, own: _Figures, base: _Figures, alone: _Way, tokens: int, seed: int
) -> dict[str, Any]:
    left = np.concatenate(way.left)
    places = [at.layer for at in way.early.exits] + [way.early.stack.num_layers]
    return {
        "name": way.name,
        "stages": way.stages,
        "trained_on": way.trained_on,
        "entered_by": way.entered_by,
        "scopes": {
            scope: _scope(own, base, scope, seed) for scope in SCOPES if own.tokens[scope].any()
        },
        "exits": [
            {"layer": place, "share": float((left == place).mean())}
            for place in sorted(set(places))
        ],
        "layers_per_token": sum(way.counts.layer_rows) / tokens,
        "operations_ratio": flops(way.early.stack, way.counts)
        / flops(alone.early.stack, alone.counts),
        "stage_rows": way.cascade.stage_rows(way.counts)[: way.stages],
        "counts": to_plain(way.counts.record()),
    }


def _scope(own: _Figures, base: _Figures, scope: str, seed: int) -> dict[str, Any]:
    tokens = own.tokens[scope]
    ratio, between = _ratio(own, base, scope, seed)
    return {
        "tokens": int(tokens.sum()),
        "perplexity": math.exp(own.losses[scope].sum() / tokens.sum()),
        "accuracy": float(own.hits[scope].sum() / tokens.sum()),
        "ratio": ratio,
        "ratio_interval": between,
    }


def _ratio(own: _Figures, other: _Figures, scope: str, seed: int) -> tuple[float, list[float]]:
    """Return the ratio of two perplexities, and its interval over resampled sequences."""
    difference, tokens = own.losses[scope] - other.losses[scope], own.tokens[scope]
    sequences = draws(len(tokens), seed)
    drawn = tokens[sequences].sum(axis=1)
    kept = drawn > 0
    resampled = np.exp(difference[sequences].sum(axis=1)[kept] / drawn[kept])
    return math.exp(difference.sum() / tokens.sum()), interval(resampled)


def _compared(way: _Way, main: _Figures, control: _Figures, seed: int) -> dict[str, Any]:
    """Return whether the cascade's perplexity is below a control's, on all and response text."""
    found: dict[str, Any] = {
        "control": way.name,
        "trained_on": way.trained_on,
        "entered_by": way.entered_by,
    }
    for scope in ("all", "response"):
        if not main.tokens[scope].any():
            continue
        ratio, (low, high) = _ratio(main, control, scope, seed)
        wins = "cascade" if high < 1 else "control" if low > 1 else "neither"
        found[scope] = {"ratio": ratio, "interval": [low, high], "wins": wins}
    return found


def _verdict(main: dict[str, Any], comparisons: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say whether the stage pays, and whether sending it the hard tokens does."""
    scope = "response" if "response" in main["scopes"] else "all"
    figures = main["scopes"][scope]
    low, high = figures["ratio_interval"]
    text = "response text" if scope == "response" else "all text"
    ratio = f"{figures['ratio']:.3f} x ({low:.3f} to {high:.3f})"
    if high < 1:
        stage = f"the stage helps: perplexity of {text} {ratio}"
    elif low > 1:
        stage = f"the stage harms: perplexity of {text} {ratio}"
    else:
        stage = f"nothing can be said of the stage: perplexity of {text} {ratio}"
    found = {(one["trained_on"], one["entered_by"]): one for one in comparisons}
    random, trained = found.get(("random", "random")), found.get(("all", "hard"))
    return {
        "stage": stage,
        "helps": high < 1,
        "routing": None if random is None else _routing(random, scope),
        "training": None if trained is None else _training(trained, scope),
        "earns_its_keep": None if random is None else random[scope]["wins"] == "cascade",
    }


def _routing(random: dict[str, Any], scope: str) -> str:
    """Say what sending hard tokens is worth against as many random ones: the same work."""
    ratio, (low, high) = random[scope]["ratio"], random[scope]["interval"]
    against = f"{ratio:.3f} x ({low:.3f} to {high:.3f}) the perplexity of as many random tokens"
    return {
        "cascade": f"routing by hardness earns its keep: {against}",
        "control": f"routing by hardness does not earn its keep: {against}",
        "neither": f"routing by hardness and at random cannot be told apart: {against}",
    }[random[scope]["wins"]]


def _training(trained: dict[str, Any], scope: str) -> str:
    """Say what training on hard tokens alone is worth, where hard tokens enter in any case."""
    ratio, (low, high) = trained[scope]["ratio"], trained[scope]["interval"]
    against = f"{ratio:.3f} x ({low:.3f} to {high:.3f}) the perplexity of a stage trained on all"
    return {
        "cascade": f"training on hard tokens alone is better: {against}",
        "control": f"training on all tokens is better: {against}",
        "neither": f"training on hard tokens alone and on all cannot be told apart: {against}",
    }[trained[scope]["wins"]]

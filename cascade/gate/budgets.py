"""Budgets: what early exit may cost at stored points, and whether an evaluation keeps to them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.core.errors import RecordError, first_line
from cascade.core.files import write_text
from cascade.core.records import Record, read_record, to_json
from cascade.core.shapes import (
    COUNT,
    INTERVAL,
    NUMBER,
    POSITIVE,
    SHARE,
    TEXT,
    Kind,
    Maybe,
    Shape,
    flaw,
)
from cascade.gate.baselines import baseline_paths

KIND = "budgets"

#: What a point may lose against the run that was accepted. On one machine a repeated run differs
#: by nothing; other arithmetic moves single tokens over a threshold, some 2e-4 each of 4,096.
SLACK = {
    "perplexity_ratio": 0.005,
    "agreement": 0.003,
    "exit_share": 0.003,
    "layers_per_token": 0.02,
    # Of the measured ratio: seconds are this machine's, on that day.
    "seconds_ratio": 0.15,
}

#: What all budgets of one file share.
_FILE_IDENTITY = (
    ("provenance", "model", "weights_hash"),
    ("provenance", "model", "revision"),
    ("provenance", "model", "dtype"),
    ("provenance", "tokenizer_hash"),
    ("provenance", "corpus", "fingerprint"),
)

#: Two evaluations are comparable only where all of these agree.
_IDENTITY = (
    *_FILE_IDENTITY,
    ("provenance", "heads_fingerprint"),
    ("settings", "propagation"),
)

_SOURCE: Mapping[str, Shape] = {
    "provenance": {
        "model": {"weights_hash": TEXT, "revision": Maybe(TEXT), "dtype": TEXT},
        "tokenizer_hash": Maybe(TEXT),
        "corpus": {"fingerprint": TEXT},
        "heads_fingerprint": Maybe(TEXT),
        "command": Maybe(TEXT),
    },
    "settings": {"propagation": TEXT},
}

_PLACE: Mapping[str, Shape] = {"exit_layer": COUNT, "rule": TEXT, "head": TEXT, "threshold": NUMBER}

_EVALUATION: Shape = {
    **_SOURCE,
    "points": [
        {
            **_PLACE,
            "threshold_from": TEXT,
            "exit_share": SHARE,
            "agreement": SHARE,
            "perplexity_ratio": POSITIVE,
            "layers_per_token": POSITIVE,
            "seconds_ratio": POSITIVE,
            "seconds_ratio_interval": Maybe(INTERVAL),
        }
    ],
}

_LIMITS = Kind(
    "numbers for least, most or both",
    lambda value: (
        isinstance(value, dict)
        and len(value) > 0
        and value.keys() <= {"least", "most"}
        and not any(flaw(limit, NUMBER) for limit in value.values())
    ),
)
_BUDGETS: Shape = {
    "groups": [
        {**_SOURCE, "points": [{**_PLACE, "budget": dict.fromkeys(SLACK, _LIMITS)}]},
    ]
}


@dataclass(frozen=True)
class Overrun:
    """One budget that was not kept.

    Attributes:
        point: The point, in words.
        figure: E.g. "perplexity_ratio"; "point" where the whole point was not measured.
        limit: The budget, in words; empty where the point was not measured.
        measured: What came, in words.
        command: What to run to look closer.
    """

    point: str
    figure: str
    limit: str
    measured: str
    command: str

    @property
    def found(self) -> str:
        """Budget and measurement, in words."""
        if not self.limit:
            return self.measured
        return f"{self.figure} budget {self.limit}, measured {self.measured}"

    def __str__(self) -> str:
        return f"{self.point}: {self.found}; look closer with `{self.command}`"


@dataclass(frozen=True)
class Accepted:
    """What came of accepting an evaluation.

    Attributes:
        path: The file.
        overruns: What of the budgets before the evaluation does not keep.
        replaced_heads: The fingerprint of the heads whose budgets gave way, where the evaluation's
            are others; None where the same were measured again, or nothing was there.
    """

    path: Path
    overruns: list[Overrun]
    replaced_heads: str | None


def budget_of(row: Record) -> Record:
    """Return the budget that a measured point gets: its own figures with their slack.

    Args:
        row: A point of an evaluation.
    """
    seconds = row["seconds_ratio_interval"] or [row["seconds_ratio"]] * 2
    return {
        "perplexity_ratio": {"most": round(row["perplexity_ratio"] + SLACK["perplexity_ratio"], 4)},
        "agreement": {"least": round(row["agreement"] - SLACK["agreement"], 4)},
        "exit_share": {
            "least": round(row["exit_share"] - SLACK["exit_share"], 4),
            "most": round(row["exit_share"] + SLACK["exit_share"], 4),
        },
        "layers_per_token": {"most": round(row["layers_per_token"] + SLACK["layers_per_token"], 3)},
        "seconds_ratio": {"most": round(seconds[1] * (1 + SLACK["seconds_ratio"]), 2)},
    }


def accept_budgets(folder: Path, evaluation: Record) -> Accepted:
    """Store the points of an evaluation that were given as they are, with their budgets.

    Points with the other kind of head or another propagation that the file has already stay in it;
    those of heads that were fitted anew are replaced.

    Args:
        folder: The folder of all baselines.
        evaluation: A record of kind `evaluation`.

    Raises:
        RecordError: The evaluation is torn or has no given point; or the stored budgets are torn,
            or another model's, tokenizer's, dtype's or corpus's.
    """
    _check_shape(evaluation, _EVALUATION, "the evaluation", "evaluate anew")
    rows = [row for row in evaluation["points"] if row["threshold_from"] == "given"]
    if not rows:
        raise RecordError(
            "this evaluation has no point to budget; name some with `cascade evaluate --point "
            "LAYER:RULE:THRESHOLD`"
        )
    path, _ = baseline_paths(folder, evaluation | {"kind": KIND})
    group = {
        "provenance": evaluation["provenance"],
        "settings": evaluation["settings"],
        "points": [row | {"budget": budget_of(row)} for row in rows],
    }
    stored = _stored_groups(path, evaluation)
    overruns = [
        overrun
        for old in stored
        if _mismatch(old, evaluation) is None
        for overrun in _overruns(old, evaluation)
    ]
    replaced = {_heads(old) for old in stored if _key(old) == _key(group)} - {_heads(group)}
    groups = sorted([*(old for old in stored if _key(old) != _key(group)), group], key=_key)
    try:
        text = to_json({"schema": 1, "kind": KIND, "groups": groups}) + "\n"
    except ValueError as error:  # NaN where no figure is
        raise RecordError(
            f"the evaluation is torn or edited ({first_line(error)}); evaluate anew"
        ) from error
    write_text(path, text)
    return Accepted(path, overruns, next(iter(replaced), None))


def _stored_groups(path: Path, evaluation: Record) -> list[Record]:
    """Return what a file of budgets holds, all of it of the evaluation's model and corpus."""
    if not path.exists():
        return []
    stored = read_record(path, kind=KIND)
    _check_shape(stored, _BUDGETS, str(path), "restore it, or remove it to start anew")
    groups: list[Record] = stored["groups"]
    for group in groups:
        mismatch = _mismatch(group, evaluation, _FILE_IDENTITY)
        if mismatch is not None:
            raise RecordError(
                f"{path} holds budgets that the evaluation cannot join: {mismatch}; accept it into "
                "another --baselines, or remove that file to start anew"
            )
    return groups


def _check_shape(record: Record, shape: Shape, name: str, remedy: str) -> None:
    found = flaw(record, shape)
    if found is not None:
        raise RecordError(f"{name} is torn or edited ({found}); {remedy}")


def _heads(group: Record) -> str | None:
    fingerprint: str | None = group["provenance"].get("heads_fingerprint")
    return fingerprint


def _key(group: Record) -> tuple[str, str]:
    """Tell groups of one file apart: by the kind of head and the propagation."""
    heads = "logit_lens" if _heads(group) is None else "ridge"
    return heads, group["settings"]["propagation"]


def check_budgets(evaluation: Record, budgets: Record) -> list[Overrun]:
    """Hold an evaluation to the budgets of its heads and propagation.

    Quality and layers are hard limits: they are the same in every run. Seconds fail only where
    even the good end of the interval misses the budget.

    Args:
        evaluation: A record of kind `evaluation`.
        budgets: A record of kind `budgets`.

    Returns:
        What is not kept; nothing where all is well.

    Raises:
        RecordError: They cannot be compared: another model, corpus, heads or propagation; or the
            budgets are torn.
    """
    _check_shape(budgets, _BUDGETS, "the file of budgets", "restore it, or accept new ones")
    reasons = []
    for group in budgets["groups"]:
        mismatch = _mismatch(group, evaluation)
        if mismatch is None:
            return _overruns(group, evaluation)
        reasons.append(mismatch)
    raise RecordError(
        f"not comparable with any stored budget: {'; '.join(reasons) or 'there is none'}; measure "
        "what was budgeted, or accept new budgets"
    )


def _mismatch(
    group: Record, evaluation: Record, identity: Sequence[Sequence[str]] = _IDENTITY
) -> str | None:
    for path in identity:
        expected, got = _at(group, path), _at(evaluation, path)
        if expected != got:
            return f"{'.'.join(path[-2:])} is {got}, the budget's is {expected}"
    return None


def _at(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _overruns(group: Record, evaluation: Record) -> list[Overrun]:
    rows = {_point_key(row): row for row in evaluation["points"]}
    found = []
    for point in group["points"]:
        row = rows.get(_point_key(point))
        if row is None:
            words = "not measured at all"
            found.append(Overrun(_named(point), "point", "", words, _command(group)))
            continue
        for figure, limit in point["budget"].items():
            got = row.get(figure)
            if not all(_keeps(figure, row, limit)):
                limits = " and ".join(f"at {side} {value:g}" for side, value in limit.items())
                shown = "nothing" if got is None else f"{got:.4f}"
                found.append(Overrun(_named(point), figure, limits, shown, _command(group)))
    return found


def _keeps(figure: str, row: Record, limit: Record) -> Iterator[bool]:
    # A comparison with NaN is false, so that NaN keeps no budget.
    low = high = row.get(figure)
    if low is None:
        yield False
        return
    if figure == "seconds_ratio" and row.get("seconds_ratio_interval") is not None:
        low = row["seconds_ratio_interval"][0]
    if "most" in limit:
        yield low <= limit["most"]
    if "least" in limit:
        yield high >= limit["least"]


def _point_key(row: Record) -> tuple[int, str, float]:
    return int(row["exit_layer"]), str(row["rule"]), round(float(row["threshold"]), 6)


def _named(point: Record) -> str:
    return (
        f"layer {point['exit_layer']}, {point['rule']} >= {point['threshold']:g}, {point['head']}"
    )


def _command(group: Record) -> str:
    command = group["provenance"].get("command")
    if command:
        return str(command)
    points = [
        part
        for point in group["points"]
        for part in ("--point", f"{point['exit_layer']}:{point['rule']}:{point['threshold']:g}")
    ]
    return shlex.join(["cascade", "evaluate", *points])

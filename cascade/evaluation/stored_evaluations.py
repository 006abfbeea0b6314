"""Searches in stored evaluations: what `cascade evaluate --output` kept is not measured again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cascade.core.errors import RecordError
from cascade.core.records import at, read_record
from cascade.core.schema import from_plain
from cascade.core.shapes import COUNT, INTERVAL, NUMBER, SHARE, TEXT, WHOLE, Maybe, Shape, flaw
from cascade.evaluation.exit_curves import lowest_kept
from cascade.evaluation.records import ExitCurve
from cascade.evaluation.search_choice import EXACT_TABLE, TABLE, Wish, point_row, search_record
from cascade.evaluation.verdict import CONTROLS

Row = dict[str, Any]

_CORPUS: Shape = {
    "source": TEXT,
    "name": TEXT,
    "fingerprint": TEXT,
    "tokens": COUNT,
    "sequences": COUNT,
    "seq_len": COUNT,
}

#: What of an evaluation a search reads.
_EVALUATION: Shape = {
    "provenance": {
        "model": {"name": TEXT, "dtype": TEXT, "num_layers": COUNT},
        "corpus": _CORPUS,
        "heads_fingerprint": Maybe(TEXT),
    },
    "settings": {
        "propagation": TEXT,
        "layers": [COUNT],
        "rules": [TEXT],
        "agreement": SHARE,
        "batch_size": COUNT,
        "seed": WHOLE,
        "computes_every_token_because": Maybe(TEXT),
        "interval": TEXT,
        "seconds": TEXT,
    },
    "full": {"perplexity": NUMBER, "sequences": COUNT},
    "points": [
        {
            "exit_layer": COUNT,
            "rule": TEXT,
            "head": TEXT,
            "threshold": NUMBER,
            "threshold_from": TEXT,
            "exit_share": SHARE,
            "agreement": SHARE,
            "agreement_interval": INTERVAL,
            "perplexity_ratio": NUMBER,
            "layers_per_token": NUMBER,
            "flops_ratio": NUMBER,
            "seconds_ratio": NUMBER,
            "seconds_ratio_interval": Maybe(INTERVAL),
        }
    ],
    "search": {"points": [WHOLE]},
    "curves": Maybe(
        {
            "fit_tokens": COUNT,
            "tokens": COUNT,
            "rows": [
                {
                    "exit_layer": COUNT,
                    "rule": TEXT,
                    "thresholds": [NUMBER],
                    "fit_exits": [WHOLE],
                    "fit_wrong": [WHOLE],
                    "exits": [WHOLE],
                    "wrong": [WHOLE],
                    "low": [SHARE],
                    "high": [SHARE],
                }
            ],
        }
    ),
}

#: Evaluations are searched together only where all of these agree.
_IDENTITY = (
    ("provenance", "model", "name"),
    ("provenance", "model", "weights_hash"),
    ("provenance", "model", "revision"),
    ("provenance", "model", "dtype"),
    ("provenance", "corpus", "fingerprint"),
    ("provenance", "fitted_on", "fingerprint"),
)

#: What takes part only where its agreement and no other is searched for.
_NO_CURVES = "it was made without exit curves, so its thresholds are those for agreement {:g} alone"


@dataclass(frozen=True)
class Found:
    """What a stored evaluation says of a wanted agreement.

    Attributes:
        points: What was tried or can be read off its curves (see `point_row`).
        nothing: Layers and rules at which nothing may leave.
        lacks: What the record lacks to answer, in words; None where it has what is needed.
    """

    points: list[Row] = field(default_factory=list)
    nothing: list[Row] = field(default_factory=list)
    lacks: str | None = None

    @property
    def on_table(self) -> list[Row]:
        """Thresholds that nobody has run."""
        return [row for row in self.points if row["confirmed_by"] == TABLE]


def read_evaluations(paths: Sequence[Path]) -> list[Row]:
    """Read evaluations that can be searched together.

    Args:
        paths: Files `evaluation.json`, or the folders that `cascade evaluate --output` wrote.

    Raises:
        RecordError: One is missing, torn, or fitted nothing; or two are of different models or
            texts, or measured the same.
    """
    files = [path / "evaluation.json" if path.is_dir() else path for path in paths]
    records = []
    for path in files:
        record = read_record(path, kind="evaluation")
        found = flaw(record, _EVALUATION) or _uneven(record)
        if found is not None:
            raise RecordError(f"{path} is torn or edited ({found}); evaluate anew")
        fitted = at(record, ("provenance", "fitted_on"))
        if fitted is None:
            raise RecordError(
                f"{path} holds given points alone, for which nothing was fitted; make a record "
                "with `cascade evaluate --output`, without --only-points"
            )
        if flaw(fitted, _CORPUS) is not None:
            raise RecordError(f"{path} is torn or edited (fitted_on); evaluate anew")
        records.append(record)
    _check_alike(files, records)
    return records


def _uneven(record: Row) -> str | None:
    """Return what is wrong with the numbers of points and the columns of curves; None if nothing.

    Every index in `search` is one of the points.
    """
    count = len(record["points"])
    if any(number >= count for number in record["search"]["points"]):
        return f"a searched point beyond the {count} points"
    for row in (record.get("curves") or {"rows": []})["rows"]:
        columns = ("thresholds", "fit_exits", "fit_wrong", "exits", "wrong", "low", "high")
        if len({len(row[name]) for name in columns}) != 1:
            return "a curve whose columns differ in length"
    return None


def _check_alike(files: Sequence[Path], records: Sequence[Row]) -> None:
    for path, record in zip(files[1:], records[1:], strict=True):
        for place in _IDENTITY:
            expected, got = at(records[0], place), at(record, place)
            if expected != got:
                raise RecordError(
                    f"{path} and {files[0]} differ in {' '.join(place[1:])} ({got} and {expected});"
                    " search evaluations of one model on one corpus"
                )
    seen: dict[tuple[Any, ...], Path] = {}
    for path, record in zip(files, records, strict=True):
        for layer in record["settings"]["layers"]:
            for rule in record["settings"]["rules"]:
                what = (layer, rule, record["settings"]["propagation"])
                key = (*what, record["provenance"].get("heads_fingerprint"))
                if key in seen:
                    raise RecordError(
                        f"{path} and {seen[key]} both measured layer {layer} with {rule} and the "
                        "same heads and propagation; leave one out"
                    )
                seen[key] = path


def look_up(record: Row, wish: Wish, *, source: int = 0) -> Found:
    """Return what a stored evaluation says of a wanted agreement, without any pass.

    Where it has exit curves, every layer's and rule's boldest threshold on them that keeps the
    agreement on the sequences to fit on is a candidate, and so is every more cautious one that was
    run. A curve's threshold that was not run is confirmed on the table alone, which with exact
    propagation says the same. A record without curves answers for its own agreement alone.

    Args:
        record: Of kind `evaluation` (see `read_evaluations`).
        wish: What is searched for.
        source: Its number among the records.
    """
    curves = record.get("curves")
    settings = record["settings"]
    if curves is None and settings["agreement"] != wish.agreement:
        return Found(lacks=_NO_CURVES.format(settings["agreement"]))
    found = Found()
    searched = {
        (row["exit_layer"], row["rule"]): row["threshold"]
        for row in (record["points"][number] for number in record["search"]["points"])
    }
    own: dict[tuple[int, str], list[Row]] = {}
    for row in record["points"]:
        if row["rule"] not in CONTROLS:
            own.setdefault((row["exit_layer"], row["rule"]), []).append(row)
    known = {} if curves is None else {_name(row): row for row in curves["rows"]}
    for pair in dict.fromkeys([*own, *known]):
        rows = own.get(pair, [])
        curve = known.get(pair)
        lowest = searched.get(pair)
        if curve is not None and curves is not None:
            place = lowest_kept(from_plain(curve, ExitCurve), curves["fit_tokens"], wish.agreement)
            lowest = None if place is None else curve["thresholds"][place]
        fits = {} if curves is None or curve is None else _fits(curve, curves["fit_tokens"])
        found.points.extend(_run_points(rows, fits, lowest, settings["propagation"], source))
        if lowest is None:
            found.nothing.append(_nothing(record, pair, rows, source))
        elif curve is not None and all(row["threshold"] != lowest for row in rows):
            found.points.append(_table_point(record, curve, lowest, rows, wish, source))
    return found


def _name(row: Row) -> tuple[int, str]:
    return row["exit_layer"], row["rule"]


def _fits(curve: Row, tokens: int) -> dict[float, tuple[float, float]]:
    """Return exit share and agreement on the sequences to fit on, by threshold."""
    columns = zip(curve["thresholds"], curve["fit_exits"], curve["fit_wrong"], strict=True)
    return {
        threshold: (exits / tokens, (tokens - wrong) / tokens)
        for threshold, exits, wrong in columns
    }


def _run_points(
    rows: Sequence[Row],
    fits: dict[float, tuple[float, float]],
    lowest: float | None,
    propagation: str,
    source: int,
) -> list[Row]:
    points = []
    for row in rows:
        share, agreement = fits.get(row["threshold"], (None, None))
        # On the table, a more cautious threshold never keeps less. What was given may have been
        # chosen with the very sequences that would confirm it.
        kept = lowest is not None and row["threshold"] >= lowest
        points.append(
            point_row(
                row,
                propagation=propagation,
                source=source,
                fit=(share, agreement, "table"),
                candidate=kept and row["threshold_from"] != "given",
            )
        )
    return points


def _head(record: Row, rows: Sequence[Row]) -> str:
    heads = [row["head"] for row in (*rows, *record["points"])]
    return heads[0] if heads else "logit_lens"


def _nothing(record: Row, pair: tuple[int, str], rows: Sequence[Row], source: int) -> Row:
    return {
        "exit_layer": pair[0],
        "rule": pair[1],
        "head": _head(record, rows),
        "propagation": record["settings"]["propagation"],
        "source": source,
        "why": "no threshold that lets a token leave keeps it on the sequences to fit on",
    }


def _table_point(
    record: Row, curve: Row, lowest: float, rows: Sequence[Row], wish: Wish, source: int
) -> Row:
    """Return a point that nobody ran, as the curve has it; its cost lies on the line of others."""
    curves, place = record["curves"], curve["thresholds"].index(lowest)
    tokens = curves["tokens"]
    share = curve["exits"][place] / tokens
    exact = record["settings"]["propagation"] == "exact"
    row = {
        "exit_layer": curve["exit_layer"],
        "rule": curve["rule"],
        "head": _head(record, rows),
        "threshold": lowest,
        "threshold_from": f"agreement {wish.agreement:g}, on the curve",
        "exit_share": share,
        "agreement": (tokens - curve["wrong"][place]) / tokens,
        "agreement_interval": [curve["low"][place], curve["high"][place]],
        "perplexity_ratio": None,
        "layers_per_token": _on_line(rows, share, "layers_per_token"),
        "flops_ratio": _on_line(rows, share, "flops_ratio"),
        "seconds_ratio": _on_line(rows, share, "seconds_ratio"),
        "seconds_ratio_interval": None,
    }
    return point_row(
        row,
        propagation=record["settings"]["propagation"],
        source=source,
        fit=(*_fits(curve, curves["fit_tokens"])[lowest], "table"),
        candidate=True,
        confirmed_by=EXACT_TABLE if exact else TABLE,
    )


def _on_line(rows: Sequence[Row], share: float, name: str) -> float | None:
    """Return what a cost would be: it grows in proportion to the tokens that stay."""
    shares = np.array([row["exit_share"] for row in rows])
    if len(np.unique(shares)) < 2:
        return None
    slope, start = np.polyfit(shares, [row[name] for row in rows], 1)
    return max(0.0, float(start + slope * share))


def search_evaluations(
    records: Sequence[Row],
    found: Sequence[Found],
    wish: Wish,
    *,
    names: Sequence[str],
    command: str | None = None,
) -> Row:
    """Return the record of a search in stored evaluations.

    Args:
        records: Of kind `evaluation`, of one model and corpus.
        found: What each says (see `look_up`), or was measured since.
        wish: What is searched for.
        names: What each record is called, for the report.
        command: What the user ran, for the provenance.

    Raises:
        RecordError: A record lacks what is needed.
    """
    for name, one in zip(names, found, strict=True):
        if one.lacks is not None:
            raise RecordError(
                f"{name} does not have what agreement {wish.agreement:g} needs: {one.lacks}; "
                "measure them with --measure, or evaluate anew"
            )
    first = records[0]
    settings = first["settings"]
    parts = {
        "provenance": first["provenance"] | {"command": command},
        "settings": {
            "layers": sorted({n for record in records for n in record["settings"]["layers"]}),
            "rules": list(
                dict.fromkeys(name for record in records for name in record["settings"]["rules"])
            ),
            "batch_size": settings["batch_size"],
            "seed": settings["seed"],
            "computes_every_token_because": settings["computes_every_token_because"],
            "interval": settings["interval"],
            "seconds": settings["seconds"],
        },
        "sources": [
            {
                "name": name,
                "command": at(record, ("provenance", "command")),
                "heads_fingerprint": at(record, ("provenance", "heads_fingerprint")),
                "propagation": record["settings"]["propagation"],
                "words": _words(name, record, one),
            }
            for name, record, one in zip(names, records, found, strict=True)
        ],
        "full": first["full"],
    }
    points = [row for one in found for row in one.points]
    return search_record(parts, points, [row for one in found for row in one.nothing], wish)


def _words(name: str, record: Row, found: Found) -> str:
    run = len(found.points) - len(found.on_table)
    table = f", {len(found.on_table)} read off its curves" if found.on_table else ""
    return (
        f"{name}: {run} points that were run{table}, "
        f"{record['settings']['propagation']} propagation"
    )

"""Points of a search for an exit layer, made by hand."""

from __future__ import annotations

from typing import Any

from cascade.evaluation.search.records import ConfirmedBy, NoThreshold, TriedPoint


def a_point(
    layer: int,
    agreement: float,
    flops: float | None,
    *,
    seconds: tuple[float, float, float] | None = None,
    half: float = 0.01,
    threshold: float = 0.9,
    confirmed_by: ConfirmedBy = "running",
    **changes: Any,
) -> TriedPoint:
    """Return a candidate.

    Args:
        layer: The exit layer.
        agreement: The share of agreeing tokens.
        flops: Operations relative to the full model; None where they are not known.
        seconds: Seconds relative to the full model, and the ends of their interval; about `flops`
            where not given.
        half: Half of the width of the agreement's interval.
        threshold: The threshold.
        confirmed_by: How the agreement was confirmed.
        changes: Other fields of the point.
    """
    time = seconds or (None if flops is None else (flops, flops - 0.01, flops + 0.01))
    fields = {
        "exit_layer": layer,
        "rule": "cosine",
        "head": "ridge",
        "threshold": threshold,
        "threshold_from": "agreement 0.95",
        "exit_share": 0.3,
        "agreement": agreement,
        "agreement_interval": [agreement - half, min(1.0, agreement + half)],
        "perplexity_ratio": 1.01,
        "layers_per_token": 28.0,
        "flops_ratio": flops,
        "seconds_ratio": None if time is None else time[0],
        "seconds_ratio_interval": None if time is None else list(time[1:]),
        "propagation": "ridge",
        "source": 0,
        "fit_exit_share": 0.31,
        "fit_agreement": 0.951,
        "fit_by": "running",
        "candidate": True,
        "confirmed_by": confirmed_by,
    }
    return TriedPoint(**fields | changes)


def no_threshold(
    layer: int = 12, rule: str = "cosine", why: str = "nothing kept it"
) -> NoThreshold:
    """Return a layer and rule at which no token may exit."""
    return NoThreshold(
        exit_layer=layer, rule=rule, head="ridge", propagation="ridge", source=0, why=why
    )

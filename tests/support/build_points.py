"""Operating points made by hand."""

from __future__ import annotations

from typing import Any

from cascade.evaluation.search_choice import point_row

Row = dict[str, Any]


def a_point(
    layer: int,
    agreement: float,
    flops: float | None,
    *,
    seconds: tuple[float, float, float] | None = None,
    half: float = 0.01,
    rule: str = "cosine",
    threshold: float = 0.9,
    candidate: bool = True,
    confirmed_by: str = "running",
) -> Row:
    interval = [agreement - half, min(1.0, agreement + half)]
    time = seconds or (None if flops is None else (flops, flops - 0.01, flops + 0.01))
    row = {
        "exit_layer": layer,
        "rule": rule,
        "head": "ridge",
        "threshold": threshold,
        "threshold_from": "agreement 0.95",
        "exit_share": 0.3,
        "agreement": agreement,
        "agreement_interval": interval,
        "perplexity_ratio": 1.01,
        "layers_per_token": 28.0,
        "flops_ratio": flops,
        "seconds_ratio": None if time is None else time[0],
        "seconds_ratio_interval": None if time is None else list(time[1:]),
    }
    return point_row(
        row,
        propagation="ridge",
        source=0,
        fit=(0.31, 0.951, "running"),
        candidate=candidate,
        confirmed_by=confirmed_by,
    )

"""The record of what was computed."""

from __future__ import annotations

from cascade.core.schema import Index, Part


class CountsRecord(Part, frozen=True, kw_only=True):
    """What was really computed, in token rows; index 0 is layer 1. See `flops.Counts`."""

    layer_rows: list[Index]
    pairs: list[Index]
    key_value_rows: list[Index]
    predicted_rows: list[Index]
    lm_head_rows: Index
    head_rows: dict[str, Index]

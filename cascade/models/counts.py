"""The record of counted token rows."""

from __future__ import annotations

from cascade.core.schema import Index, Part


class CountsRecord(Part, frozen=True, kw_only=True):
    """The token rows that were computed; index 0 is layer 1. See `flops.Counts`."""

    layer_rows: list[Index]
    pairs: list[Index]
    key_value_rows: list[Index]
    predicted_rows: list[Index]
    lm_head_rows: Index
    head_rows: dict[str, Index]

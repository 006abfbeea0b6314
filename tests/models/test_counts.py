"""Counts of computed token rows."""

from __future__ import annotations

from support.reference_early_exit import (
    LAYERS,
)

from cascade.core.schema import to_plain
from cascade.models.flops import Counts


def some_counts(start: int) -> Counts:
    a, b, c, d = (list(range(start + part, start + part + LAYERS)) for part in range(4))
    return Counts(a, b, c, d, lm_head_rows=start, head_rows={start: 5, 2: 7})


def test_counts_add_up_by_layer() -> None:
    total = some_counts(0) + some_counts(10)
    assert total == Counts(
        layer_rows=[10, 12, 14, 16],
        pairs=[12, 14, 16, 18],
        key_value_rows=[14, 16, 18, 20],
        predicted_rows=[16, 18, 20, 22],
        lm_head_rows=10,
        head_rows={0: 5, 2: 14, 10: 5},
    )
    assert total + Counts.of(LAYERS) == total


def test_record_of_counts_is_a_plain_copy() -> None:
    counts = Counts.of(2)
    counts.head_rows[1] = 3
    record = counts.record()
    assert to_plain(record) == {
        "layer_rows": [0, 0],
        "pairs": [0, 0],
        "key_value_rows": [0, 0],
        "predicted_rows": [0, 0],
        "lm_head_rows": 0,
        "head_rows": {"1": 3},
    }
    record.pairs[0] = 9
    assert counts.pairs == [0, 0]


def test_zero_counts_share_no_list() -> None:
    counts = Counts.of(2)
    counts.layer_rows[0] += 1
    assert counts.pairs == counts.key_value_rows == counts.predicted_rows == [0, 0]

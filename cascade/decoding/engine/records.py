"""The record of which kernels were chosen for a shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from cascade.core.schema import Count, Positive, StoredRecord, Text
from cascade.decoding.engine.matrices import MOST, Choice

#: The numbers of tokens for which passes are timed.
_TIMED = 8


class KernelRecord(StoredRecord, frozen=True, kw_only=True):
    """The kernels of a product on this machine, as stored in the cache: kind `kernels`.

    Attributes:
        outputs: The weight's outputs.
        inputs: The weight's inputs.
        dtype: The weight's dtype.
        bias: Whether a bias is added.
        processor: The processor.
        capability: Its vector instructions, as torch names them.
        threads: The threads of torch.
        torch: The version of torch.
        by_rows: The kernel for 1 to 16 rows.
        milliseconds: The time of each kernel for 1, 2, 4, 8 and 16 rows; null where it was far too
            long.
    """

    KIND: ClassVar[str] = "kernels"
    COMMAND: ClassVar[str] = "generate"

    schema: int = 1
    kind: Literal["kernels"] = "kernels"
    outputs: Count
    inputs: Count
    dtype: Text
    bias: bool
    processor: str | None
    capability: Text
    threads: Count
    torch: Text
    by_rows: list[Literal["linear", "single", "packed", "transposed"]]
    milliseconds: dict[str, list[Positive | None]]

    def inconsistency(self) -> str | None:
        """Return which entries contradict each other, or None."""
        if len(self.by_rows) != MOST:
            return f"by_rows has {len(self.by_rows)} kernels, expected {MOST}"
        if len({*self.by_rows} - {"linear", "single"}) > 1:
            return "by_rows has two forms of copies, expected at most one"
        return None

    @classmethod
    def of(cls, about: Mapping[str, Any], choice: Choice) -> KernelRecord:
        """Return the record of a choice and of what it was measured for."""
        return cls(
            **about,
            by_rows=list(choice.by_rows),  # type: ignore[arg-type]
            milliseconds={
                name: [value if math.isfinite(value) else None for value in times]
                for name, times in choice.milliseconds.items()
            },
        )

    def choice(self) -> Choice:
        """Return the choice."""
        times = {
            name: tuple(math.inf if value is None else value for value in values)
            for name, values in self.milliseconds.items()
        }
        return Choice(tuple(self.by_rows), times)


class PassRecord(StoredRecord, frozen=True, kw_only=True):
    """The times of passes of a model on this machine, as stored in the cache: kind `passes`.

    Attributes:
        model: A hash of the shapes of the weights.
        dtype: The dtype of the weights.
        engine: What computes the layers.
        processor: The processor.
        threads: The threads of torch.
        torch: The version of torch.
        milliseconds: The time of a pass over 1, 2, 3, 4, 6, 8, 12 and 16 tokens.
    """

    KIND: ClassVar[str] = "passes"
    COMMAND: ClassVar[str] = "generate"

    schema: int = 1
    kind: Literal["passes"] = "passes"
    model: Text
    dtype: Text
    engine: Text
    processor: str | None
    threads: Count
    torch: Text
    milliseconds: list[Positive]

    def inconsistency(self) -> str | None:
        """Return which entries contradict each other, or None."""
        if len(self.milliseconds) == _TIMED:
            return None
        return f"milliseconds has {len(self.milliseconds)} times, expected {_TIMED}"

"""Records of prompts that are continued without loss and with exits, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cascade.core.schema import Count, Index, Interval, Part, Positive, Text, beyond

#: Ways to continue a prompt.
DecodingMethod = Literal["modules", "engine", "drafts", "drafter", "exits"]

#: The ways that give the full model's own text, without the one that all are compared with.
LOSSLESS: tuple[DecodingMethod, ...] = ("engine", "drafts", "drafter")


class DecodingRow(Part, frozen=True, kw_only=True):
    """One way to continue the prompts.

    Attributes:
        method: "modules" (the full model by its own modules, which all are compared with), "engine"
            (the full model by the engine, without drafts), "drafts" (lossless decoding, with drafts
            by n-gram lookup and runner-ups), "drafter" (with those of a trained drafter as well) or
            "exits" (the operating point).
        engine: What computed the passes; None for the model's own modules, one token per pass.
        tokens_per_pass: New tokens per pass of the model behind the prompts.
        tokens: The number of new tokens of each prompt.
        equal: The number of texts that equal those of "modules", token for token.
        seconds: The seconds of each prompt, with the prompt's own pass.
        seconds_ratio: Seconds per new token divided by those of "modules", over all prompts.
        seconds_ratio_interval: Its 95 % interval.
    """

    method: DecodingMethod
    engine: Text | None
    tokens_per_pass: Positive
    tokens: list[Count]
    equal: Index
    seconds: list[Positive]
    seconds_ratio: Positive
    seconds_ratio_interval: Interval

    @property
    def per_token(self) -> list[float]:
        """The seconds per new token of each prompt."""
        return [spent / count for spent, count in zip(self.seconds, self.tokens, strict=True)]


class LosslessFigures(Part, frozen=True, kw_only=True):
    """The beginnings of some sequences, continued greedily in several ways, in one process.

    Attributes:
        prompts: The number of prompts.
        prompt_tokens: The number of tokens of a prompt.
        new_tokens: The largest number of new tokens of a prompt.
        fingerprint: SHA-256 of the prompts.
        pass_costs: The milliseconds of a pass over 1, 2, ... tokens that decided how much was
            drafted; empty where nothing could be drafted.
        trees: Whether drafts could be trees; otherwise they were chains.
        drafter: SHA-256 of the weights of the trained drafter; None without one.
        point: The operating point of the row "exits"; None if none has the wanted quality.
        rows: The ways to continue, "modules" first.
    """

    prompts: Count
    prompt_tokens: Count
    new_tokens: Count
    fingerprint: Text
    pass_costs: list[Positive]
    trees: bool
    drafter: Text | None
    point: Index | None
    rows: list[DecodingRow]

    def row(self, method: DecodingMethod) -> DecodingRow | None:
        """Return the row of a way to continue; None if it was not measured."""
        return next((row for row in self.rows if row.method == method), None)

    def wrong_row(self) -> str | None:
        """Describe the first row that contradicts the number of prompts; None if none does."""
        if not self.rows or self.rows[0].method != "modules":
            return "expected the row of modules first in lossless.rows"
        for row in self.rows:
            where = f"the row of {row.method} in lossless.rows"
            if {len(row.tokens), len(row.seconds)} != {self.prompts}:
                return f"expected tokens and seconds of {self.prompts} prompts in {where}"
            if row.equal > self.prompts:
                return f"expected at most {self.prompts} equal texts in {where}, got {row.equal}"
        return None


class LosslessVerdict(Part, frozen=True, kw_only=True):
    """Which saves more at the wanted quality: lossless decoding or exits.

    Attributes:
        saves_more: "lossless", "exits", "neither" (none of them is significantly faster than the
            full model) or "undecided" (the interval of their ratio includes 1, or texts differ
            from the full model's).
        method: The fastest lossless way; None if texts of all of them differ.
        point: The operating point that it is compared with; None if none has the wanted quality.
        seconds_ratio: Seconds per new token of the lossless way divided by those of the operating
            point; None without one of them.
        seconds_ratio_interval: Its 95 % interval.
        headline: The answer in one sentence.
    """

    saves_more: Literal["lossless", "exits", "neither", "undecided"]
    method: DecodingMethod | None
    point: Index | None
    seconds_ratio: Positive | None
    seconds_ratio_interval: Interval | None
    headline: Text


def wrong_lossless(
    figures: LosslessFigures | None, verdict: LosslessVerdict | None, points: Sequence[object]
) -> str | None:
    """Describe the first contradiction in what a record says of lossless decoding, or None.

    Args:
        figures: The figures, if there are any.
        verdict: What they say, if anything.
        points: The operating points of the record.
    """
    if figures is None:
        return None if verdict is None else "expected lossless next to verdict.lossless"
    numbers = {
        "lossless.point": figures.point,
        "verdict.lossless.point": None if verdict is None else verdict.point,
    }
    wrong = figures.wrong_row() or beyond(numbers, len(points), "points")
    if wrong is not None or verdict is None or verdict.method is None:
        return wrong
    if figures.row(verdict.method) is None:
        return f"expected the row of {verdict.method} in lossless.rows"
    return None

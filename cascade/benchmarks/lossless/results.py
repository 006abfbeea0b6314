"""Speed, equality and acceptance of the variants, from their timed runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest

import numpy as np

from cascade.benchmarks.lossless.records import (
    DraftCounts,
    DraftPosition,
    LosslessVariant,
    ProposerCounts,
    TextDifference,
)
from cascade.benchmarks.lossless.rounds import Round, TimedRun
from cascade.benchmarks.lossless.variants import REFERENCE, DecodingVariant, PromptBatch
from cascade.benchmarks.timing import median_interval
from cascade.decoding.growing_text import Generation
from cascade.stats.resampling import RESAMPLES

#: Description of the speedup and its interval, as stored in the record.
INTERVAL = (
    "speedup: median over batches of the time per new token of generate divided by that of the "
    "variant, both on the same batch, prompt included; 95 % percentile bootstrap of the median, "
    f"{RESAMPLES} resamples of whole batches"
)

Texts = list[list[int]]


def new_texts(run: TimedRun, batch: PromptBatch, ends: Collection[int]) -> Texts:
    """Return the new tokens of each row, up to and including its end-of-sequence token.

    Args:
        run: A run.
        batch: Its batch.
        ends: End-of-sequence tokens.
    """
    found = []
    for row in run.made.sequences[:, batch.ids.shape[1] :].tolist():
        stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        found.append(row[:stop])
    return found


def first_difference(texts: Texts, expected: Texts) -> TextDifference | None:
    """Return where the first unequal text differs; None if all are equal.

    Args:
        texts: The new tokens of each text.
        expected: Those of `generate`.
    """
    for number, (text, other) in enumerate(zip(texts, expected, strict=True), start=1):
        for place, (one, two) in enumerate(zip_longest(text, other), start=1):
            if one != two:
                return TextDifference(prompt=number, token=place)
    return None


def variant_rows(
    variants: Mapping[str, DecodingVariant],
    reasons: Mapping[str, str | None],
    rounds: Sequence[Round],
    batches: Sequence[PromptBatch],
    ends: Collection[int],
    seed: int,
) -> list[LosslessVariant]:
    """Return times and texts of each variant, in the order of `variants`.

    Args:
        variants: The variants.
        reasons: Why a variant was not timed; None if it was.
        rounds: The timed rounds, one per batch.
        batches: The batches.
        ends: End-of-sequence tokens.
        seed: Seed of the resamples.
    """
    expected = [
        new_texts(found.runs[REFERENCE], batch, ends)
        for found, batch in zip(rounds, batches, strict=True)
    ]
    reference = [found.runs[REFERENCE].seconds for found in rounds]
    rows = []
    for name, variant in variants.items():
        if reasons[name] is not None:
            rows.append(LosslessVariant(name=name, what=variant.what, reason=reasons[name]))
            continue
        runs = [found.runs[name] for found in rounds if name in found.runs]
        texts = [new_texts(run, batch, ends) for run, batch in zip(runs, batches, strict=False)]
        timed = timed_row(
            name,
            variant.what,
            [(run.seconds, run.cpu_seconds) for run in runs],
            [sum(map(len, made)) for made in texts],
            [
                seconds / sum(map(len, made))
                for seconds, made in zip(reference, expected, strict=True)
            ],
            seed,
        )
        flat = [text for made in texts for text in made]
        own = [text for made in expected[: len(texts)] for text in made]
        generations = [run.made.generation for run in runs if run.made.generation is not None]
        rows.append(
            replaced(
                timed,
                texts=len(flat),
                equal=sum(one == other for one, other in zip(flat, own, strict=True)),
                first_difference=first_difference(flat, own),
                drafts=_drafts(generations) if generations else None,
            )
        )
    return rows


def timed_row(
    name: str,
    what: str,
    seconds: Sequence[tuple[float, float]],
    new_tokens: Sequence[int],
    reference: Sequence[float],
    seed: int,
) -> LosslessVariant:
    """Return the times of a variant, and its speedup.

    Args:
        name: Name of the variant.
        what: Description of the variant.
        seconds: Seconds and CPU seconds of each batch.
        new_tokens: New tokens of each batch.
        reference: Seconds per new token of `generate`, at least as many batches.
        seed: Seed of the resamples.
    """
    each = np.array([wall for wall, _ in seconds]) / np.maximum(1, new_tokens)
    speedups = np.array(reference[: len(each)]) / each
    return LosslessVariant(
        name=name,
        what=what,
        seconds=[wall for wall, _ in seconds],
        cpu_seconds=[cpu for _, cpu in seconds],
        new_tokens=list(new_tokens),
        milliseconds_per_token=1e3 * float(np.median(each)),
        speedup=float(np.median(speedups)),
        interval=median_interval(speedups, seed),
    )


def replaced(row: LosslessVariant, **changes: object) -> LosslessVariant:
    """Return a row with some values changed."""
    from msgspec.structs import replace

    return replace(row, **changes)


def fastest_first(rows: Sequence[LosslessVariant]) -> list[LosslessVariant]:
    """Return the rows by speed; those without times are last."""
    return sorted(rows, key=lambda row: -(row.speedup or 0.0))


def _drafts(generations: Sequence[Generation]) -> DraftCounts | None:
    """Return passes and drafts of a variant; None if the package decoded without counting them."""
    if any(made.sources is None for made in generations):
        return None
    drafted: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    positions: list[tuple[int, int]] = []
    for made in generations:
        for number, name in enumerate(made.proposers):
            drafted[name] += made.proposed[number]
            assert made.sources is not None
            accepted[name] += int((made.sources == number + 1).sum())
        positions = [
            (one[0] + other[0], one[1] + other[1])
            for one, other in zip_longest(positions, made.positions, fillvalue=(0, 0))
        ]
    passes = sum(made.passes for made in generations)
    new = sum(int((made.exit_layers > 0).sum()) - len(made.sequences) for made in generations)
    by_row = sum(made.passes * len(made.sequences) for made in generations)
    return DraftCounts(
        engine=generations[0].engine or "",
        passes=passes,
        tokens_per_pass=new / by_row if by_row else 0.0,
        drafted=sum(made.drafted for made in generations),
        accepted=sum(made.accepted for made in generations),
        positions=[DraftPosition(drafts=tries, accepted=right) for tries, right in positions],
        proposers=[
            ProposerCounts(name=name, drafted=drafted[name], accepted=accepted[name])
            for name in drafted
        ],
    )

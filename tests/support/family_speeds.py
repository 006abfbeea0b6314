"""How fast lossless decoding of tiny models is, next to `generate` of `transformers`.

`PYTHONPATH=tests python -m support.family_speeds` measures all families and writes
`docs/family-speeds.csv`; it takes minutes, and nothing should run next to it.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cascade.benchmarks.timing import ratio_rows, time_variants
from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.growing_text import Generation
from cascade.models.stack import DecoderStack
from support.paths import ROOT
from support.tiny_models import FAMILIES, random_ids, tiny_model

RECORD = ROOT / "docs/family-speeds.csv"
DTYPES = (torch.float32, torch.bfloat16)
BATCHES = (1, 4, 16)
#: Tokens of a prompt, and new tokens.
PROMPT, NEW = 12, 32
ROUNDS = 19


@dataclass(frozen=True)
class Speed:
    """How fast one family decodes.

    Attributes:
        family: The family.
        dtype: The dtype of the weights.
        batch: The number of prompts.
        speed: The time of `generate` divided by ours; median over rounds.
        low: Lower end of its 95 % interval.
        high: Upper end.
        equal: "yes" if all texts are those of `generate`.
        engine: What computed the passes.
    """

    family: str
    dtype: str
    batch: str
    speed: str
    low: str
    high: str
    equal: str
    engine: str


def speeds_of(
    family: str,
    dtype: torch.dtype,
    batches: Iterable[int] = BATCHES,
    rounds: int = ROUNDS,
) -> Iterator[Speed]:
    """Yield the speeds of one tiny model.

    Args:
        family: The family.
        dtype: The dtype of the weights.
        batches: Numbers of prompts.
        rounds: Timed rounds of each.
    """
    weights: Any = copy.deepcopy(tiny_model(family))
    stack = DecoderStack(weights.to(dtype))
    early = EarlyExit(stack)
    for batch in batches:
        ids = random_ids(batch, PROMPT)
        mask = torch.ones_like(ids)
        common: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        model: Any = stack.model
        own = partial(model.generate, ids, attention_mask=mask, pad_token_id=0, **common)
        ours = partial(
            early.generate, ids, mask, verify=True, return_dict_in_generate=True, **common
        )
        timings = time_variants({"generate": own, "lossless": ours}, rounds=rounds, seed=0)
        (ratio,) = ratio_rows(timings.seconds, [("generate", "lossless")], seed=0)
        made: Generation = timings.results["lossless"]
        low, high = ratio.interval
        yield Speed(
            family=family,
            dtype=str(dtype).removeprefix("torch."),
            batch=str(batch),
            speed=f"{ratio.median:.2f}",
            low=f"{low:.2f}",
            high=f"{high:.2f}",
            equal="yes" if torch.equal(made.sequences, timings.results["generate"]) else "no",
            engine=made.engine or "",
        )


def stored() -> list[Speed]:
    """Return the speeds that were measured last."""
    with RECORD.open(encoding="utf-8", newline="") as file:
        return [Speed(**row) for row in csv.DictReader(file)]


def write(speeds: Iterable[Speed], path: Path = RECORD) -> None:
    """Store speeds."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Speed)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(speed) for speed in speeds)


def main(families: Iterable[str] = FAMILIES) -> None:
    """Measure all families, print each row, and store them."""
    found = []
    for dtype in DTYPES:
        for family in families:
            for speed in speeds_of(family, dtype):
                found.append(speed)
                print(*asdict(speed).values(), flush=True)
    write(found)


if __name__ == "__main__":
    main()

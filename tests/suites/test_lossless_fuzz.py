"""Lossless decoding of tiny models with random drafts, for thousands of passes (`-m slow`).

Families, engines, dtypes, batches, lengths of prompts (also around the blocks of 512 keys of
attention kernels), chains and trees, drafts that are right, half right and wrong. Every text must
be that of `generate` of transformers for the row alone.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from support.drafting import FREE, Oracle, Stubborn
from support.engines import KINDS
from support.tiny_models import VOCABULARY, random_ids, tiny_model
from torch import Tensor

from cascade import EarlyExit
from cascade.decoding.drafting.proposers import Proposer
from cascade.decoding.drafting.tables import NgramTable
from cascade.decoding.growing_text import Generation
from cascade.models.stack import DecoderStack

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "smollm3")

#: Passes of the full model in each dtype.
PASSES = 4000

#: Lengths of prompts: short ones, and those whose texts cross a block of 512 keys.
LENGTHS = [*range(1, 40), *range(500, 514), *range(1008, 1026)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_random_drafts_never_change_a_text(dtype: torch.dtype) -> None:
    draw = random.Random(16)
    early = {
        (family, kind): EarlyExit(
            DecoderStack(tiny_model(family, max_position_embeddings=1200).to(dtype)), engine=kind
        )
        for family in FAMILIES
        for kind in ("auto", *(KINDS if dtype == torch.float32 else ()))
    }
    passes, kinds = 0, Counter[str]()
    while passes < PASSES:
        (family, kind), model = draw.choice(list(early.items()))
        made, own = one_case(model, draw)
        assert made.sequences.equal(own), (family, kind, passes)
        passes += made.passes
        kinds[f"{family} {kind} {made.engine}"] += made.passes
        kinds["accepted"] += made.accepted
        kinds["rejected"] += made.drafted - made.accepted
    # Everything took part.
    assert all(any(key.startswith(f"{family} ") for key in kinds) for family in FAMILIES)
    assert kinds["accepted"] > PASSES / 4
    assert kinds["rejected"] > PASSES / 4


def one_case(early: EarlyExit, draw: random.Random) -> tuple[Generation, Tensor]:
    """Decode random prompts with a random drafter; return that, and the texts of each row alone."""
    batch, new = draw.choice([1, 1, 1, 2, 3]), draw.randrange(2, 40)
    lengths = [draw.choice(LENGTHS) for _ in range(batch)]
    longest = max(lengths)
    ids = torch.zeros((batch, longest), dtype=torch.long)
    mask, own = torch.zeros_like(ids), []
    model: Any = early.stack.model
    for row, length in enumerate(lengths):
        prompt = random_ids(1, length, seed=draw.randrange(10**6))
        ids[row, longest - length :], mask[row, longest - length :] = prompt[0], 1
        own.append(
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )[0]
        )
    texts = {row: text.tolist() for row, text in enumerate(own)}
    made = early.generate(
        ids,
        mask,
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=(),
        verify=True,
        drafter=a_drafter(texts, draw),
        draft_length=draw.randrange(1, 14),
        pass_costs=draw.choice([FREE, [1.0 + 0.3 * rows for rows in range(16)]]),
        return_dict_in_generate=True,
    )
    assert isinstance(made, Generation)
    expected = torch.stack(
        [torch.cat([ids[row, :longest], text[-new:]]) for row, text in enumerate(own)]
    )
    return made, expected


def a_drafter(texts: dict[int, list[int]], draw: random.Random) -> Proposer:
    """Return a drafter that knows the texts more or less."""
    kind = draw.randrange(4)
    if kind == 0:
        return Stubborn([draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 8))])
    if kind == 1:  # a table of the texts with errors
        wrong = [
            [token if draw.random() < 0.7 else draw.randrange(VOCABULARY) for token in text]
            for text in texts.values()
        ]
        return NgramTable.of(wrong, least=1)
    return Oracle(
        texts,
        VOCABULARY,
        wrong=draw.choice([0.0, 0.2, 0.6, 1.0]),
        siblings=draw.randrange(4),
        length=draw.randrange(1, 9),
        seed=draw.randrange(10**6),
    )

"""Tiny models that can have a drafter, texts of theirs, and drafters that do something."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from cascade.core.run_folder import RunFolder
from cascade.decoding.drafting.tables import NgramTable
from cascade.drafters.acceptance import CHAIN
from cascade.drafters.config import Architecture, DrafterConfig
from cascade.drafters.network.architectures import new_network
from cascade.drafters.network.drafter_network import DrafterNetwork, embeddings_of
from cascade.drafters.network.eagle3_network import Eagle3Network
from cascade.drafters.network.layers import attend, rotary_tables
from cascade.drafters.stored import RECORD, WEIGHTS, Drafter, write_drafter
from cascade.drafters.texts.batches import BatchedGenerator, GeneratedText, Job
from cascade.models.stack import DecoderStack
from support.build_drafters import a_record
from support.tiny_models import random_ids, tiny_model, tiny_tokenizer

#: Families whose layers have Llama's modules: plain, with biases, with norms of heads, and with a
#: sliding window; and one in which some layers do not rotate.
DRAFTED = ("llama", "qwen2", "qwen3", "mistral", "smollm3")

#: The layers whose inputs the tiny drafters read: of four.
LAYERS = (1, 3, 4)

#: A training that takes a second or two.
BRIEF = DrafterConfig(
    tokens=400,
    max_new_tokens=16,
    longest_prompt=40,
    batch_size=8,
    held_out_texts=8,
    vocabulary=60,
    steps=8,
    step_tokens=128,
    evaluations=2,
)

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

#: The table of their drafters.
TABLE = NgramTable.of([[5, 6, 7, 8, 5, 6, 7, 9], [4, 5, 6, 7]])


@functools.cache
def a_drafted_stack(family: str = "llama", *, chat: bool = False) -> DecoderStack:
    """Return a tiny model with its tokenizer, made once; for tests that leave it as it is."""
    tokenizer = tiny_tokenizer()
    if chat:
        tokenizer.chat_template = TEMPLATE
    return DecoderStack(tiny_model(family), tokenizer=tokenizer)


def a_moved_network(
    stack: DecoderStack,
    layers: Sequence[int] = LAYERS,
    seed: int = 0,
    architecture: Architecture = "cascade",
) -> DrafterNetwork:
    """Return a network with random input matrices: none of them is zero."""
    network = new_network(architecture, stack, layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if architecture == "eagle3" or not name.startswith(("layer.", "norm.")):
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        if isinstance(network, Eagle3Network):
            network.scales.copy_(torch.tensor([4.0, 1.0, 0.5]))
    return network


def jobs(
    count: int = 5, *, longest: int = 12, temperature: float = 0.0, seed: int = 0
) -> list[Job]:
    """Return jobs with random prompts of different lengths."""
    return [
        Job(
            tuple(random_ids(1, 3 + 2 * number % 7, seed=seed + number)[0].tolist()),
            temperature,
            f"{seed} {number}",
            longest - number % 3,
        )
        for number in range(count)
    ]


def generated(
    stack: DecoderStack,
    wanted: Sequence[Job],
    *,
    batch_size: int = 2,
    layers: Sequence[int] = LAYERS,
) -> list[GeneratedText]:
    """Generate texts, in the order of their jobs."""
    waiting, found = list(wanted), dict[str, GeneratedText]()
    generator = BatchedGenerator(
        stack, layers, batch_size=batch_size, longest_prompt=10, longest=24, ends=(1,)
    )
    generator.run(
        lambda: waiting.pop(0) if waiting else None,
        lambda job, text: found.__setitem__(job.seed, text),
        lambda tokens: None,
    )
    return [found[job.seed] for job in wanted]


@functools.cache
def some_texts(family: str = "llama", count: int = 6) -> tuple[GeneratedText, ...]:
    """Return greedy texts of a tiny model, made once."""
    return tuple(generated(a_drafted_stack(family), jobs(count)))


def states_of(stack: DecoderStack, ids: Tensor, layers: Sequence[int] = LAYERS) -> Tensor:
    """Return the states that a drafter reads, `[T, F + 1, D]`, by the model itself."""
    history: dict[int, Tensor] = {}
    last = stack.visit(ids[None].long(), history.__setitem__)
    assert last is not None
    return torch.stack([*(history[layer - 1][0] for layer in layers), last[0]], dim=1)


@torch.no_grad()
def drafted_alone(
    network: DrafterNetwork,
    stack: DecoderStack,
    text: GeneratedText,
    place: int,
    tokens_of_head: Sequence[int],
) -> tuple[list[int], list[float]]:
    """Draft behind one place, token by token, each step over everything before it."""
    embedding, tables = embeddings_of(stack), rotary_tables(stack, 64)
    prompt = text.ids[: text.prompt].tolist()
    candidates = list(dict.fromkeys([*tokens_of_head, *prompt]))
    known = text.ids[1 : place + 2].long()
    inputs = network.first_input(embedding[known], text.features[: place + 1])
    tokens, probabilities = [], []
    for _ in range(CHAIN):
        cut = (tables[0][:, : len(inputs)], tables[1][:, : len(inputs)])
        attended = attend(network.layer, *network.heads(inputs[None], cut), None)
        state = network.output(inputs[None], attended)[0, -1:]
        logits = stack.decode_normed(network.norm(state)[None])[0, 0, candidates]
        shares = logits.softmax(dim=-1)
        tokens.append(candidates[int(shares.argmax())])
        probabilities.append(float(shares.max()))
        new = network.next_input(embedding[tokens[-1]][None], state)
        inputs = torch.cat([inputs, new])
    return tokens, probabilities


def stored(
    folder: Path,
    stack: DecoderStack | None = None,
    architecture: Architecture = "cascade",
    tokens: Tensor | None = None,
    **changes: Any,
) -> Path:
    """Store a drafter of a tiny model; return its folder."""
    stack = stack or a_drafted_stack()
    record = a_record()
    record = replace(record, config=replace(record.config, architecture=architecture))
    model = replace(stack.provenance, weights_hash=stack.weights_hash())
    record = replace(record, provenance=replace(record.provenance, model=model), **changes)
    with RunFolder(folder, (RECORD, WEIGHTS)) as out:
        network = a_moved_network(stack, architecture=architecture)
        tokens = torch.arange(1, 97, 2) if tokens is None else tokens
        write_drafter(out, Drafter(network, tokens, TABLE, record))
    return folder

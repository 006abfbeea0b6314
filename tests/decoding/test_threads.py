"""Several threads decode with one model and get the results of a single thread."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.reference_early_exit import (
    ALL_FAMILIES,
    LAYERS,
    SKIPPING_FAMILIES,
    some_heads,
    state_of,
)
from support.tiny_models import random_ids, tiny_model
from torch import Tensor

from cascade.decoding.early_exit import EarlyExit, Propagation
from cascade.decoding.growing_text import Generation
from cascade.models.stack import DecoderStack

#: How often each thread repeats its work.
REPEATS = 3

Work = Callable[[], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    """Switch threads 500 times as often as usual, so that few repeats reveal a conflict."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 500)
    yield
    sys.setswitchinterval(before)


def together(*works: Work) -> list[list[tuple[Tensor, ...]]]:
    """Run each work `REPEATS` times in a separate thread; return all results by work."""
    barrier = threading.Barrier(len(works))

    def repeated(work: Work) -> list[tuple[Tensor, ...]]:
        barrier.wait()
        return [work() for _ in range(REPEATS)]

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(repeated, work) for work in works]]


def check_threads_do_not_matter(*works: Work) -> None:
    """Raise AssertionError unless concurrent works give the same results as each work alone."""
    alone = [work() for work in works]
    for expected, results in zip(alone, together(*works), strict=True):
        for result in results:
            for one, other in zip(expected, result, strict=True):
                assert torch.equal(one, other)


def scoring(early: EarlyExit, ids: Tensor) -> Work:
    def work() -> tuple[Tensor, ...]:
        score = early.score(ids, keep_logits=True)
        assert score.logits is not None
        return score.logits, score.exit_layers, score.log_probabilities

    return work


def generating(early: EarlyExit, ids: Tensor, *, verify: bool = False) -> Work:
    def work() -> tuple[Tensor, ...]:
        made = early.generate(
            ids,
            torch.ones_like(ids),
            max_new_tokens=6,
            eos_token_id=(),
            verify=verify,
            return_dict_in_generate=True,
        )
        assert isinstance(made, Generation)
        return made.sequences, made.exit_layers

    return work


def some_of_them_exit(
    stack: DecoderStack, propagation: Propagation = "frozen", *, layer: int = 2, skip: bool = True
) -> EarlyExit:
    """Return a model whose tokens exit at random, about half of them."""
    return EarlyExit(
        stack,
        layer=layer,
        rule="random",
        threshold=0.5,
        heads=some_heads(stack.model.config.model_type) if propagation == "ridge" else None,
        propagation=propagation,
        skip=skip,
    )


@ALL_FAMILIES
def test_two_threads_score_one_model(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    check_threads_do_not_matter(
        scoring(some_of_them_exit(stack), random_ids(3, 14, seed=1)),
        scoring(some_of_them_exit(stack, "ridge", layer=3), random_ids(2, 9, seed=2)),
    )


@ALL_FAMILIES
def test_two_threads_generate_with_one_model(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    check_threads_do_not_matter(
        generating(some_of_them_exit(stack), random_ids(3, 5, seed=1)),
        generating(some_of_them_exit(stack, "exact"), random_ids(2, 7, seed=2), verify=True),
    )


@SKIPPING_FAMILIES
def test_skipping_and_generic_layers_run_concurrently(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    check_threads_do_not_matter(
        scoring(some_of_them_exit(stack), random_ids(3, 14, seed=1)),
        scoring(some_of_them_exit(stack, "ridge", skip=False), random_ids(3, 14, seed=2)),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_threads_share_one_early_exit(family: str) -> None:
    early = some_of_them_exit(DecoderStack(tiny_model(family)), "ridge")
    check_threads_do_not_matter(
        generating(early, random_ids(1, 5, seed=1)),
        scoring(early, random_ids(3, 14, seed=2)),
    )


@SKIPPING_FAMILIES
def test_model_forward_runs_while_another_thread_decodes(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    ids = random_ids(2, 9, seed=2)

    @torch.no_grad()
    def own() -> tuple[Tensor, ...]:
        return (stack.model(input_ids=ids, use_cache=False).logits,)

    check_threads_do_not_matter(own, generating(some_of_them_exit(stack), random_ids(3, 5, seed=1)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_visit_runs_while_another_thread_decodes(family: str) -> None:
    stack = DecoderStack(tiny_model(family))
    ids = random_ids(2, 9, seed=2)

    def visit() -> tuple[Tensor, ...]:
        states: list[Tensor] = []
        normed = stack.visit(ids, lambda _, hidden: states.append(hidden))
        assert normed is not None
        assert len(states) == LAYERS + 1
        return (*states, normed)

    check_threads_do_not_matter(visit, scoring(some_of_them_exit(stack), random_ids(3, 14, seed=1)))


@pytest.mark.parametrize("path", ["", "self_attn"], ids=["layer", "attention"])
@pytest.mark.parametrize("propagation", ["frozen", "ridge"])
def test_model_with_replaced_forward_is_restored_after_each_call(
    path: str, propagation: Propagation
) -> None:
    stack = DecoderStack(tiny_model("llama"))
    work = scoring(some_of_them_exit(stack, propagation), random_ids(3, 14, seed=1))
    generic = scoring(some_of_them_exit(stack, propagation, skip=False), random_ids(3, 14, seed=1))
    expected, all_computed = work(), generic()
    for layer in stack.layers:
        module = layer.get_submodule(path)
        module.forward = functools.partial(type(module).forward, module)  # as accelerate does
    before = state_of(stack)
    # A replaced forward turns the engine off, which sums in another order.
    for one, other in zip((*work(), *generic()), (*expected, *all_computed), strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=0, atol=1e-6)
    assert state_of(stack) == before
    attention: Any = stack.layers[0].self_attn
    assert attention.config is stack.model.config

"""Graphed forwards are compared with the model, kept, lent, and given up when something changed."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from support.drafting import FREE
from support.recorded_graphs import RecordedGraphs
from support.tiny_models import random_ids, tiny_model
from torch import Tensor
from transformers.cache_utils import StaticLayer

from cascade.core import float32_products
from cascade.core.errors import UsageError
from cascade.decoding import graph_pool
from cascade.decoding.drafting.proposers import Proposer
from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.engine.engine import EngineKind
from cascade.decoding.graph_pool import GraphPool, graphs_of
from cascade.decoding.graphed_forward import Compute, GraphedForward, graph_obstacle
from cascade.decoding.growing_text import Generation
from cascade.models.stack import DecoderStack

IDS = random_ids(1, 8)


def new_stack(family: str = "llama") -> DecoderStack:
    return DecoderStack(copy.deepcopy(tiny_model(family)))


def taken(pool: GraphPool, batch: int = 1, capacity: int = 30, most: int = 3) -> GraphedForward:
    made = pool.take(batch, capacity, most)
    assert isinstance(made, GraphedForward), made
    return made


def pool_of(stack: DecoderStack, capture: Any = None) -> GraphPool:
    return GraphPool(stack, capture, rounds_as_static=False)


def as_on_cuda(stack: DecoderStack, capture: Any) -> EarlyExit:
    stack.engines["passes of graphs"] = pool_of(stack, capture)
    return EarlyExit(stack, engine="graphs")


def generated(early: EarlyExit, ids: Tensor = IDS, **kwargs: Any) -> Generation:
    settings: dict[str, Any] = {
        "do_sample": False,
        "eos_token_id": None,
        "pass_costs": FREE,
        "max_new_tokens": 9,
    }
    made = early.generate(ids, verify=True, return_dict_in_generate=True, **settings | kwargs)
    assert isinstance(made, Generation)
    return made


def own_text(stack: DecoderStack, ids: Tensor = IDS) -> Tensor:
    model: Any = stack.model
    made: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made


def embeddings_of(stack: DecoderStack) -> Tensor:
    found: Any = stack.model.get_input_embeddings()
    weight: Tensor = found.weight
    return weight


# --- What is chosen -----------------------------------------------------------------------------


def test_graphs_are_not_used_on_a_cpu_unless_asked_for() -> None:
    stack = new_stack()
    assert graphs_of(stack, "auto") is None
    assert graphs_of(stack, "model") is None
    pool = graphs_of(stack, "graphs")
    assert pool is not None
    assert graphs_of(stack, "graphs") is pool


def test_graphs_are_chosen_by_themselves_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = new_stack()
    monkeypatch.setattr(DecoderStack, "device", torch.device("cuda"))
    pool = graphs_of(stack, "auto")
    assert pool is not None
    assert graphs_of(stack, "graphs") is not pool  # other rounding in half precision
    kinds: tuple[EngineKind, ...] = ("compiled", "fused", "model")
    for kind in kinds:
        assert graphs_of(stack, kind) is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "its forward takes no position_ids"),
        ("mistral", "its static cache has layers of the kind StaticSlidingWindowLayer"),
    ],
)
def test_unsupported_families_are_named(family: str, reason: str) -> None:
    stack = new_stack(family)
    assert graph_obstacle(stack) == reason
    message = f"the graphs engine does not support this model: {reason}; use the engine auto"
    with pytest.raises(UsageError, match=message):
        EarlyExit(stack, engine="graphs")


def test_models_on_several_devices_are_not_supported() -> None:
    stack = new_stack()
    stack.model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, device="meta"))
    assert graph_obstacle(stack) == "its weights are on several devices (cpu, meta)"


def test_other_attention_is_not_supported() -> None:
    stack = new_stack()
    stack.model.config._attn_implementation = "flex_attention"
    assert graph_obstacle(stack) == "its attention flex_attention takes no masks of a fixed size"


def test_autocast_is_not_supported() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert graph_obstacle(new_stack()) == "autocast is on"


def test_more_than_text_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.decoding.own_forward.has_text_decoder", lambda model: True)
    assert graph_obstacle(new_stack()) == "its forward may take more than text"


def test_eager_attention_gets_the_same_mask() -> None:
    stack = new_stack()
    stack.model.set_attn_implementation("eager")
    made = generated(as_on_cuda(stack, RecordedGraphs()))
    assert str(made.engine).startswith("graphs (")
    assert made.sequences.equal(own_text(stack))


# --- Where graphs are not possible --------------------------------------------------------------


def fallen_back(stack: DecoderStack, capture: Any, reason: str) -> None:
    """Check that the text is the model's own without graphs, and that the record says why."""
    made = generated(as_on_cuda(stack, capture))
    assert made.sequences.equal(own_text(stack))
    assert made.engine == f"model (graphs were asked for) (no graphs: {reason})"


def test_a_failed_capture_takes_the_usual_passes() -> None:
    def forbidden(compute: Compute) -> Compute:
        return RecordedGraphs()(lambda: print(torch.ones(1).item()))

    reason = "a pass cannot be captured (_local_scalar_dense while a stream is capturing)"
    fallen_back(new_stack(), forbidden, reason)


def test_a_cache_that_does_not_fit_takes_the_usual_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    own, stack = StaticLayer.lazy_initialization, new_stack()

    def too_large(self: Any, *args: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    monkeypatch.setattr(StaticLayer, "lazy_initialization", too_large)
    fallen_back(stack, None, "a cache of 64 columns does not fit (Tried to allocate 20 GiB)")
    monkeypatch.setattr(StaticLayer, "lazy_initialization", own)
    assert str(generated(EarlyExit(stack, engine="graphs")).engine).startswith("passes of a fixed")


def test_a_drafter_that_reads_states_takes_the_usual_passes() -> None:
    class Reader(Proposer):
        feature_layers = (2,)

        def propose(self, row: int, limit: int) -> list[Any]:
            return []

    made = generated(as_on_cuda(new_stack(), RecordedGraphs()), drafter=Reader())
    assert str(made.engine).endswith("(no graphs: the drafter reads states)")


def replaying_nothing(compute: Compute) -> Compute:
    return lambda: None


def test_graphs_that_replay_nothing_are_found_by_the_comparison() -> None:
    reason = "a token behind 5 others gets other logits than without graphs"
    fallen_back(new_stack(), replaying_nothing, reason)


@pytest.mark.parametrize("buffer", ["_start", "_first", "ids"])
def test_graphs_with_stale_inputs_are_found_by_the_comparison(
    buffer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = new_stack()
    own = GraphedForward._logits

    def stale(self: GraphedForward, ids: Tensor) -> Tensor:
        if buffer == "ids":
            return own(self, ids.clone().detach().fill_(3))
        kept = getattr(self, buffer)
        setattr(self, buffer, torch.full_like(kept, 5 if buffer == "_start" else 0))
        made = own(self, ids)
        setattr(self, buffer, kept)
        return made

    monkeypatch.setattr(GraphedForward, "_logits", stale)
    for batch in (1, 2):
        made = pool_of(stack, RecordedGraphs()).take(batch, 30, 3)
        assert isinstance(made, str) or (buffer == "_first" and batch == 1)


def test_what_failed_is_not_tried_again() -> None:
    tried = []

    def capture(compute: Compute) -> Compute:
        tried.append(compute)
        return lambda: None

    pool = pool_of(new_stack(), capture)
    first = pool.take(1, 30, 3)
    assert isinstance(first, str)
    count = len(tried)
    assert pool.take(1, 30, 3) == first
    assert len(tried) == count


# --- What is kept -------------------------------------------------------------------------------


def test_a_forward_serves_one_generation_at_a_time() -> None:
    pool = pool_of(new_stack())
    first, second = taken(pool), taken(pool)
    assert first is not second
    pool.give_back(first)
    assert taken(pool) is first


def test_a_forward_serves_passes_over_fewer_tokens() -> None:
    pool = pool_of(new_stack())
    wide = taken(pool, most=3)
    pool.give_back(wide)
    assert taken(pool, most=1) is wide
    narrow = taken(pool, most=1)
    pool.give_back(narrow)
    assert taken(pool, most=3) is not narrow


def test_only_the_last_two_are_kept() -> None:
    pool = pool_of(new_stack())
    made = [taken(pool, batch) for batch in (1, 2, 3)]
    for forward in made:
        pool.give_back(forward)
    assert taken(pool, 3) is made[2]
    assert taken(pool, 2) is made[1]
    assert taken(pool, 1) is not made[0]


@pytest.mark.parametrize("change", ["weight", "module", "attention", "precision"])
def test_a_changed_model_is_captured_again(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_products, "_rounds", lambda *_: True)
    stack, graphs = new_stack(), RecordedGraphs()
    early = as_on_cuda(stack, graphs)
    generated(early)
    before = graphs.captures
    generated(early)
    assert graphs.captures == before
    layer: Any = stack.layers[1]
    if change == "weight":
        layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight * -2)
    elif change == "module":
        layer.mlp.act_fn = torch.nn.ReLU()
    elif change == "attention":
        stack.model.set_attn_implementation("eager")
    else:
        torch.set_float32_matmul_precision("high")
    try:
        assert generated(early).sequences.equal(own_text(stack))
        assert graphs.captures > before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_where_products_are_rounded_bits_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, graphs = new_stack(), RecordedGraphs()
    early, compared = as_on_cuda(stack, graphs), []
    right = graph_pool._find_difference

    def watched(*given: Any, bits: bool) -> str | None:
        compared.append(bits)
        return right(*given, bits=bits)

    monkeypatch.setattr(graph_pool, "_find_difference", watched)
    for precision in (None, "tf32"):
        compared.clear()
        monkeypatch.setattr(graph_pool, "product_precision", lambda _, now=precision: now)
        assert generated(early).sequences.equal(own_text(stack))
        assert compared[:1] == [precision is not None]


def test_weights_changed_in_place_are_used() -> None:
    stack, graphs = new_stack(), RecordedGraphs()
    early = as_on_cuda(stack, graphs)
    before = generated(early).sequences
    captures = graphs.captures
    with torch.no_grad():
        embeddings_of(stack).mul_(-3)
    made = generated(early).sequences
    assert made.equal(own_text(stack))
    assert not made.equal(before)
    assert graphs.captures == captures


def test_hooks_added_later_are_called() -> None:
    stack, called = new_stack(), []
    early = as_on_cuda(stack, RecordedGraphs())
    generated(early)
    stack.layers[1].register_forward_pre_hook(lambda *_: called.append(1))
    made = generated(early)
    assert called
    assert "no graphs: its module model.layers.1 has hooks" in str(made.engine)


def test_threads_do_not_share_a_cache() -> None:
    stack = new_stack()
    early = as_on_cuda(stack, None)
    texts = [random_ids(1, 8, seed=seed) for seed in range(4)]
    expected = [own_text(stack, ids) for ids in texts]
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        found[number] = generated(early, texts[number]).sequences

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number].equal(text) for number, text in enumerate(expected))


def test_copies_of_a_model_have_their_own_graphs() -> None:
    stack = new_stack()
    generated(as_on_cuda(stack, None))
    other = copy.deepcopy(stack)
    with torch.no_grad():
        embeddings_of(other).mul_(-3)
    assert generated(EarlyExit(other, engine="graphs")).sequences.equal(own_text(other))

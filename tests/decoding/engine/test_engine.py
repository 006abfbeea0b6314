"""The engine computes what the model computes, or says why it cannot."""

from __future__ import annotations

import copy
import ctypes
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import CLOSE, KINDS, filled, needs_compiler, own_states, states_of
from support.tiny_models import FAMILIES, random_ids, tiny_model
from torch import Tensor, nn

from cascade.core.errors import UsageError
from cascade.core.float32_products import product_precision
from cascade.decoding.early_exit import EarlyExit
from cascade.decoding.engine import compiled_layers, compiler, fused_layers
from cascade.decoding.engine import engine as engines
from cascade.decoding.engine.engine import DecodingEngine, EngineKind, engine_of
from cascade.decoding.engine.rows import MAX_ROWS, Rows
from cascade.decoding.growing_text import Generation
from cascade.decoding.kv_cache import KeyValueCache
from cascade.models.stack import DecoderStack

#: The families whose layers combine their modules as Llama does.
SUPPORTED = ("llama", "qwen2", "qwen3", "mistral", "smollm3")


def stack_of(family: str, dtype: torch.dtype = torch.float32) -> DecoderStack:
    return DecoderStack(copy.deepcopy(tiny_model(family)).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SUPPORTED)
def test_engine_supports_families_like_llama(family: str, kind: EngineKind) -> None:
    engine = DecodingEngine(stack_of(family), kind)
    assert engine.obstacle is None
    assert engine.is_ready()
    assert engine.description.startswith(kind)


@pytest.mark.parametrize("family", SUPPORTED)
def test_engine_is_exact_in_half_precision(family: str) -> None:
    engine = DecodingEngine(stack_of(family, torch.bfloat16))
    assert engine.obstacle is None
    assert engine.exact


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*SUPPORTED}))
def test_other_families_say_why_there_is_no_engine(family: str) -> None:
    engine = DecodingEngine(stack_of(family))
    assert engine.obstacle
    assert "\n" not in engine.obstacle
    assert engine.description == "model"
    assert not engine.is_ready()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("length", [1, 5, 20])
def test_chain_matches_the_model(family: str, kind: EngineKind, length: int) -> None:
    engine = DecodingEngine(stack_of(family), kind)
    ids = random_ids(1, 12 + length)[0]
    cache = filled(engine, ids[:12], 40)
    made = states_of(engine, Rows.chains([0], [12], [length]), ids[12:], cache)
    expected = own_states(engine.stack, ids)[12:]
    assert (made - expected).abs().max() <= CLOSE
    logits = engine.stack.decode(expected[None])[0]
    assert (engine.logits(made) - logits).abs().max() <= CLOSE


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_path_of_a_tree_matches_the_model(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(SUPPORTED))
    engine = engine_of(_stacks()[family], data.draw(st.sampled_from(KINDS)))
    prompt = data.draw(st.integers(1, 20))
    size = data.draw(st.integers(1, 8))
    parents = [-1] + [data.draw(st.integers(0, row - 1)) for row in range(1, size)]
    ids = random_ids(1, prompt + size, seed=data.draw(st.integers(0, 99)))[0]
    cache = filled(engine, ids[:prompt], prompt + size)
    made = states_of(engine, Rows.trees([0], [prompt], [parents]), ids[prompt:], cache)
    for row in range(size):
        path = [row]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        text = torch.cat([ids[:prompt], ids[prompt:][path]])
        assert (made[row] - own_states(engine.stack, text)[-1]).abs().max() <= CLOSE


_cached: dict[str, DecoderStack] = {}


def _stacks() -> dict[str, DecoderStack]:
    if not _cached:
        _cached.update({family: stack_of(family) for family in SUPPORTED})
    return _cached


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_different_lengths_match_the_model(kind: EngineKind) -> None:
    engine = DecodingEngine(stack_of("qwen3"), kind)
    texts = [random_ids(1, length, seed=length)[0] for length in (9, 4, 14)]
    cache = KeyValueCache(engine.stack.num_layers, 3, 20)
    cache.allocate(*engine.cache_shape, engine.embed(texts[0][:1]))
    news = (1, 3, 2)
    for number, (text, new) in enumerate(zip(texts, news, strict=True)):
        own = filled(engine, text[:-new], 20)
        for layer in range(engine.stack.num_layers):
            pairs = zip(cache.buffers(layer), own.buffers(layer), strict=True)
            for buffer, other in pairs:
                buffer[number] = other[0]
    # The order of the rows does not matter.
    order = [2, 0, 1]
    rows = Rows.chains(order, [len(texts[n]) - news[n] for n in order], [news[n] for n in order])
    ids = torch.cat([texts[number][-news[number] :] for number in order])
    made = states_of(engine, rows, ids, cache)
    expected = torch.cat(
        [own_states(engine.stack, texts[number])[-news[number] :] for number in order]
    )
    assert (made - expected).abs().max() <= CLOSE


@pytest.mark.parametrize("count", [11, 23])  # a tile of AMX has 16 rows
@pytest.mark.parametrize("kind", ["auto", "fused"])
@pytest.mark.parametrize("family", SUPPORTED)
def test_rows_in_half_precision_are_those_of_single_tokens(
    family: str, kind: EngineKind, count: int
) -> None:
    # Compiled layers are exact on some processors only, so "auto" takes what passes the test.
    engine = DecodingEngine(stack_of(family, torch.bfloat16), kind)
    ids = random_ids(1, 9 + count)[0]
    one, other = filled(engine, ids[:9], 9 + count), filled(engine, ids[:9], 9 + count)
    joint = states_of(engine, Rows.chains([0], [9], [count]), ids[9:], one)
    single = [
        states_of(engine, Rows.chains([0], [column], [1]), ids[column : column + 1], other)
        for column in range(9, 9 + count)
    ]
    assert torch.equal(joint, torch.cat(single))
    assert torch.equal(engine.logits(joint), torch.cat([engine.logits(row) for row in single]))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_can_be_run_in_parts(kind: EngineKind) -> None:
    engine = DecodingEngine(stack_of("llama"), kind)
    ids = random_ids(1, 10)[0]
    rows = Rows.chains([0], [7], [3])
    whole = states_of(engine, rows, ids[7:], filled(engine, ids[:7], 12))
    cache = filled(engine, ids[:7], 12)
    below = engine.run(engine.embed(ids[7:]), rows, cache, last=2)
    assert torch.equal(engine.run(below, rows, cache, below=2), whole)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "module"), [("compiled", compiled_layers), ("fused", fused_layers)]
)
def test_planted_bug_is_found_by_the_self_test(
    name: EngineKind, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"compiled": "CompiledLayers", "fused": "FusedLayers"}[name]
    run = getattr(module, kind).run

    def wrong(self: Any, *args: Any) -> Tensor:
        return run(self, *args) * 1.01

    monkeypatch.setattr(getattr(module, kind), "run", wrong)
    engine = DecodingEngine(stack_of("llama"), name)
    assert engine.obstacle == "its layers compute something else than Llama's"


@needs_compiler
def test_wrong_keys_are_found_by_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    run = compiled_layers.CompiledLayers.run

    def wrong(self: Any, below: int, last: int, hidden: Tensor, rows: Rows, *rest: Any) -> Tensor:
        made = run(self, below, last, hidden, rows, *rest)
        rest[1].buffers(last - 1)[0][:, :, rows.column[-1]] += 0.1
        return made

    monkeypatch.setattr(compiled_layers.CompiledLayers, "run", wrong)
    engine = DecodingEngine(stack_of("llama"), "compiled")
    assert engine.obstacle == "layer 4 writes other keys and values than Llama's"


class Doubled(nn.Module):
    """An MLP with the same modules as Llama's but twice its output."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, rows: Tensor) -> Tensor:
        made: Tensor = self.down_proj(self.act_fn(self.gate_proj(rows)) * self.up_proj(rows))
        return 2 * made


def test_layer_with_another_mlp_has_no_engine() -> None:
    model: Any = copy.deepcopy(tiny_model("llama"))
    model.model.layers[2].mlp = Doubled(model.model.layers[2].mlp)
    assert DecodingEngine(DecoderStack(model)).obstacle is not None


def test_hooked_layers_have_no_engine() -> None:
    stack = stack_of("llama")
    stack.layers[1].get_submodule("mlp.up_proj").register_forward_hook(lambda *_: None)
    assert (
        DecodingEngine(stack).obstacle == "its module mlp.up_proj has hooks or a replaced forward"
    )


def test_engine_without_a_compiler_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    compiler.compiled_library.cache_clear()
    try:
        stack = stack_of("llama")
        assert DecodingEngine(stack).description.startswith("fused")
        with pytest.raises(
            UsageError, match=r"no C compiler \(no-such-compiler is not on the PATH"
        ):
            engine_of(stack, "compiled")
    finally:
        compiler.compiled_library.cache_clear()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'error: no OpenMP' >&2; exit 1", "fails (error: no OpenMP)"),
        ('case "$2" in -dM) echo 1;; *) echo junk > "${@: -2:1}";; esac', "cannot be loaded"),
    ],
)
def test_compiler_that_fails_is_reported(
    script: str, reason: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "cc"
    fake.write_text(f"#!/bin/bash\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    compiler.compiled_library.cache_clear()
    try:
        with pytest.raises(compiler.CompilerError) as error:
            compiler.compiled_library("fp32")
        assert reason in str(error.value)
    finally:
        compiler.compiled_library.cache_clear()


@needs_compiler
def test_library_that_the_kernel_does_not_permit_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles of AMX need the kernel's permission; without it, their instructions end the process."""
    compiler.compiled_library("fp32")
    compiler.compiled_library.cache_clear()
    refused = SimpleNamespace(cascade_permission=lambda: -1)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: refused)
    try:
        with pytest.raises(compiler.CompilerError, match=r"does not permit .* tiles"):
            compiler.compiled_library("fp32")
    finally:
        compiler.compiled_library.cache_clear()


@needs_compiler
def test_libraries_belong_to_the_instructions_of_a_processor(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Virtual machines share names of processors that have different instructions."""
    names = set()
    for flags in ("", "-mno-avx2"):
        fake = tmp_path / f"cc{flags}"
        fake.write_text(f'#!/bin/bash\nexec cc "$@" {flags}\n')
        fake.chmod(0o755)
        monkeypatch.setenv("CC", str(fake))
        names.add(compiler.library_path("fp32").name)
    assert len(names) == 2 or "avx2" not in Path("/proc/cpuinfo").read_text()


@needs_compiler
def test_damaged_library_is_compiled_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = ctypes.CDLL

    def damaged_once(path: str) -> ctypes.CDLL:
        loaded.append(path)
        if len(loaded) == 1:
            raise OSError("file too short")
        return load(path)

    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path))
    digest = compiler.library_path("fp32").name
    torn = tmp_path / "kernels" / digest
    torn.parent.mkdir()
    torn.write_bytes(b"torn")
    monkeypatch.setattr(ctypes, "CDLL", damaged_once)
    compiler.compiled_library.cache_clear()
    try:
        compiler.compiled_library("fp32")
    finally:
        compiler.compiled_library.cache_clear()
    assert loaded == [str(torn)] * 2
    assert torn.stat().st_size > 1000


def test_weights_changed_in_place_are_used() -> None:
    stack = stack_of("llama")
    ids = random_ids(1, 8)[0]
    for kind in KINDS:
        engine_of(stack, kind)
    layer: Any = stack.layers[0]
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(0.5)
    for kind in KINDS:
        engine = engine_of(stack, kind)
        cache = filled(engine, ids[:7], 9)
        made = states_of(engine, Rows.chains([0], [7], [1]), ids[7:], cache)
        assert (made - own_states(stack, ids)[7:]).abs().max() <= CLOSE


def test_replaced_modules_are_used() -> None:
    stack = stack_of("llama")
    before = engine_of(stack)
    layer: Any = stack.layers[0]
    layer.input_layernorm = copy.deepcopy(layer.input_layernorm)
    with torch.no_grad():
        layer.input_layernorm.weight.mul_(3.0)
    assert not before.is_ready()
    engine, ids = engine_of(stack), random_ids(1, 8)[0]
    assert engine is not before
    made = states_of(engine, Rows.chains([0], [7], [1]), ids[7:], filled(engine, ids[:7], 9))
    assert (made - own_states(stack, ids)[7:]).abs().max() <= CLOSE


@needs_compiler
def test_rows_outside_the_cache_are_refused() -> None:
    engine = DecodingEngine(stack_of("llama"), "compiled")
    ids = random_ids(1, 8)[0]
    cache = filled(engine, ids[:7], 8)
    with pytest.raises(IndexError, match="exceed the KV cache, 1 x 8"):
        states_of(engine, Rows.chains([0], [7], [2]), ids[:2], cache)
    with pytest.raises(IndexError):
        states_of(engine, Rows.chains([1], [7], [1]), ids[:1], cache)
    many = Rows.chains([0], [0], [MAX_ROWS + 1])
    with pytest.raises(ValueError, match="cannot run 33 rows"):
        engine.run(torch.zeros(MAX_ROWS + 1, 16), many, cache)


@needs_compiler
def test_nan_is_not_hidden() -> None:
    stack = stack_of("llama")
    engine = DecodingEngine(stack, "compiled")
    ids = random_ids(1, 8)[0]
    cache = filled(engine, ids[:7], 8)
    cache.buffers(2)[0][0, :, 3] = float("nan")
    assert states_of(engine, Rows.chains([0], [7], [1]), ids[7:], cache).isnan().all()


def test_unknown_engine_is_refused() -> None:
    with pytest.raises(
        UsageError, match="expected an engine among auto, compiled, fused, graphs, model"
    ):
        engine_of(_stacks()["llama"], "fast")  # type: ignore[arg-type]


@needs_compiler
def test_copies_are_counted_and_freed() -> None:
    stack = stack_of("llama")
    fused = DecodingEngine(stack, "fused")
    joined = sum(
        module.weight.nbytes
        for layer in stack.layers
        for name, module in layer.named_modules()
        if name.split(".")[-1] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    )
    assert fused.copied_bytes == joined
    assert DecodingEngine(stack, "compiled").copied_bytes == 0


@needs_compiler
def test_order_of_rows_does_not_matter() -> None:
    engine = DecodingEngine(stack_of("llama"), "compiled")
    ids = random_ids(1, 12)[0]
    generator = random.Random(0)
    expected = own_states(engine.stack, ids)[8:]
    order = [0, 1, 2, 3]
    generator.shuffle(order)
    rows = Rows.chains([0], [8], [4]).picked(torch.tensor(order))
    made = states_of(engine, rows, ids[8:][order], filled(engine, ids[:8], 12))
    assert (made - expected[order]).abs().max() <= CLOSE


@pytest.mark.parametrize("kind", KINDS)
def test_texts_behind_a_window_in_half_precision_are_those_of_generate(kind: EngineKind) -> None:
    # `generate` keeps only the columns of the window, and rounds with them.
    stack = stack_of("mistral", torch.bfloat16)  # windows of 8
    early = EarlyExit(stack, engine="auto" if kind == "compiled" else kind)
    engine = early.layers.engine
    assert engine is not None
    assert engine.longest == 8
    assert DecodingEngine(stack_of("mistral"), kind).longest is None
    model: Any = stack.model
    for new, seed in ((3, 0), (12, 0), (7, 72), (20, 1), (20, 2)):
        ids = random_ids(1, 15 if seed else 5, seed=seed)
        made = early.generate(
            ids, max_new_tokens=new, eos_token_id=(), verify=True, return_dict_in_generate=True
        )
        assert isinstance(made, Generation)
        assert made.engine is not None
        own = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert torch.equal(made.sequences, own)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stack: pickle.loads(pickle.dumps(stack))])
def test_copies_of_a_model_make_their_own_engines(copied: Any) -> None:
    stack = stack_of("llama")
    engine = engine_of(stack)
    other = copied(stack)
    assert other.engines == {}
    assert engine_of(other) is not engine
    assert engine_of(other).is_ready()
    assert engine_of(stack) is engine


def test_kernels_are_chosen_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str | None] = []
    right = engines.choose_kernels

    def watched() -> Any:
        found.append(product_precision(torch.device("cpu")))
        return right()

    monkeypatch.setattr(engines, "choose_kernels", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        DecodingEngine(DecoderStack(tiny_model("llama")), "fused")
    assert found == [None]

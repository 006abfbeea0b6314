"""The text decoder of a model that also reads images or audio is measured, and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.stacks import difference, differences, one_line, own_run, visited
from support.tiny_models import random_ids, tiny_tokenizer
from support.tiny_wrappers import tiny_wrapper
from torch import nn

from cascade.core.errors import UnsupportedModelError
from cascade.decoding.early_exit import EarlyExit
from cascade.models.loading import load
from cascade.models.stack import DecoderStack

#: kind -> type of the text decoder, and the parts that text does not use.
KINDS = {
    "llava": ("llama", "multi_modal_projector, vision_tower"),
    "mistral3": ("mistral", "multi_modal_projector, vision_tower"),
    "qwen2_5_vl": ("qwen2_5_vl_text", "visual"),
    "gemma3": ("gemma3_text", "multi_modal_projector, vision_tower"),
    "llama4": ("llama4_text", "multi_modal_projector, vision_model"),
    "qwen2_audio": ("qwen2", "audio_tower, multi_modal_projector"),
}


def text_ids() -> torch.Tensor:
    """Return random ids below those of images."""
    return random_ids() % 88 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_decoder_of_a_folder_has_the_states_and_logits_of_the_whole_model(
    kind: str, tmp_path: Path
) -> None:
    model, ids = tiny_wrapper(kind), text_ids()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    own = own_run(model, ids)
    stack = load(tmp_path)
    history, normed = visited(stack, ids)
    assert differences(history[:-1], list(own.hidden_states[:-1])) == [0.0] * 4
    assert normed is not None
    assert difference(normed, own.hidden_states[-1]) == 0.0
    assert difference(stack.decode(history[-1]), own.logits) == 0.0
    found = stack.provenance
    assert (found.family, found.text_decoder, found.unused_parts) == (kind, *KINDS[kind])


def test_a_model_in_memory_is_measured_by_its_text_decoder() -> None:
    model = tiny_wrapper("mistral3")
    stack = DecoderStack(model)
    assert list(stack.layers) == list(model.get_decoder().layers)
    assert (stack.provenance.text_decoder, stack.provenance.unused_parts) == KINDS["mistral3"]


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_exits_in_a_text_decoder_keep_the_laws(kind: str) -> None:
    model, ids = tiny_wrapper(kind), text_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    settings["pad_token_id"] = 1
    stack = DecoderStack(model)
    own = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(EarlyExit(stack).generate(ids, mask, **settings), own)
    history, _ = visited(stack, own)
    found = torch.cosine_similarity(history[1], history[2], dim=-1).flatten().sort().values
    middle = found[len(found) // 4 : -len(found) // 4]
    # Between two similarities: rounding differs between batches, and must not decide.
    below = int(middle.diff().argmax())
    half = float(middle[below] + middle[below + 1]) / 2
    early = EarlyExit(stack, layer=2, threshold=half)
    text = early.generate(ids, mask, **settings)
    new = ids.shape[1]
    score = early.score(text, torch.cat([mask, torch.ones_like(text[:, new:])], dim=1))
    assert set(score.exit_layers.flatten().tolist()) == {2, 4}
    assert torch.equal(score.predictions[:, new - 1 : -1], text[:, new:])


def test_earlier_calls_of_the_model_change_no_measurement() -> None:
    model, ids = tiny_wrapper("qwen2_5_vl"), text_ids()
    stack = DecoderStack(model)
    before, _ = visited(stack, ids)
    # Qwen-VL keeps the position offsets of its last call, here of one padded row.
    mask = torch.tensor([[0, 0, 1, 1]])
    model.generate(ids[:1, :4], attention_mask=mask, max_new_tokens=2, eos_token_id=None)
    after, _ = visited(stack, ids)
    assert differences(after, before) == [0.0] * 5


def test_a_model_that_needs_an_image_is_rejected() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(tiny_wrapper("blip-2"))
    assert one_line(error).startswith("blip-2 does not run on text alone (")


def test_a_model_whose_whole_computes_other_logits_is_rejected() -> None:
    model = tiny_wrapper("llava")
    head = model.lm_head
    assert isinstance(head, nn.Linear)

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = type(model).forward(model, *args, **kwargs)
        output.logits = output.logits + kwargs["input_ids"][..., None]
        return output

    model.forward = forward
    with pytest.raises(UnsupportedModelError) as error:
        DecoderStack(model)
    assert one_line(error).startswith("the text decoder of llava alone has other logits")

"""An exported drafter, loaded and run by the library whose layout it has.

The library pins other releases than this project's, so it is not among the packages for tests.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_drafters import DRAFTED, a_drafted_stack, stored
from support.tiny_models import random_ids
from torch import Tensor

from cascade.drafters.export.exporting import export_drafter
from cascade.drafters.network.drafter_network import embeddings_of
from cascade.drafters.network.layers import rotary_tables
from cascade.drafters.stored import Drafter, read_drafter
from cascade.models.stack import DecoderStack

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("speculators") is None, reason="needs the package speculators"
)

STEPS = 3


def rounded(weight: Tensor) -> Tensor:
    """Return a weight as a checkpoint in bfloat16 has it."""
    return weight.detach().bfloat16().float()


def loaded(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of imports
        from speculators import SpeculatorModel, SpeculatorModelConfig

        config = SpeculatorModelConfig.from_pretrained(folder)
        config.transformer_layer_config._attn_implementation = "eager"
        return SpeculatorModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()


@torch.no_grad()
def its_logits(model: Any, hidden: Tensor, following: Tensor) -> list[Tensor]:
    """Return the logits of each step, `[T, V']`, where row t of any step began at position t."""
    found: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _, __, made: found.append(made[0]))
    model(
        hidden_states=hidden[None],
        input_ids=following[None],
        document_ids=torch.zeros_like(following)[None],
        ttt_steps=STEPS,
    )
    hook.remove()
    return found


@torch.no_grad()
def own_logits(
    drafter: Drafter, stack: DecoderStack, features: Tensor, following: Tensor
) -> list[Tensor]:
    """Return the logits of each step, `[T, V']`, where row t of step s began at t - s."""
    network: Any = drafter.network.float()
    states = network.unroll(
        rounded(embeddings_of(stack))[following][None],
        features[None],
        rotary_tables(stack, len(following)),
        STEPS,
    )
    head: Any = stack.lm_head
    rows = rounded(head.weight[drafter.tokens])
    return [network.norm(state[0]) @ rows.T for state in states]


@pytest.mark.parametrize("family", DRAFTED)
def test_its_own_loader_computes_the_logits_of_the_network(family: str, tmp_path: Path) -> None:
    stack = a_drafted_stack(family)
    stack.model.save_pretrained(tmp_path / "model")
    folder = stored(tmp_path / "drafter", stack, "eagle3")
    export_drafter(folder, stack, tmp_path / "out", verifier=str(tmp_path / "model"))
    model, drafter = loaded(tmp_path / "out"), read_drafter(folder, stack)
    ids = random_ids(1, 20)[0]
    with torch.no_grad():
        history = stack.model(ids[None], output_hidden_states=True).hidden_states
    read = [history[number][0, :-1] for number in model.config.eagle_aux_hidden_state_layer_ids]
    theirs = its_logits(model, torch.cat(read, dim=-1), ids[1:])
    # The last state is one that this network does not read.
    features = torch.stack([*read, read[0]], dim=1)
    ours = own_logits(drafter, stack, features, ids[1:])
    for step, (made, wanted) in enumerate(zip(theirs, ours, strict=True)):
        rows = len(made) - step
        # In fp32 both, in another order of operations.
        torch.testing.assert_close(made[:rows], wanted[step:], rtol=1e-5, atol=1e-5)
        assert wanted.std() > 0.1


def test_its_own_config_reads_every_field(tmp_path: Path) -> None:
    stack = a_drafted_stack("qwen3")
    stack.model.save_pretrained(tmp_path / "model")
    folder = stored(tmp_path / "drafter", stack, "eagle3")
    export_drafter(folder, stack, tmp_path / "out", verifier=str(tmp_path / "model"))
    model = loaded(tmp_path / "out")
    config = model.config
    assert type(model).__name__ == "Eagle3DraftModel"
    assert config.draft_vocab_size == 48
    assert config.eagle_aux_hidden_state_layer_ids == [0, 2, 3]
    assert config.transformer_layer_config.model_type == "qwen3"
    assert config.speculators_config.verifier.architectures == ["Qwen3ForCausalLM"]
    assert config.speculators_config.proposal_methods[0].speculative_tokens == 3
    tokens = torch.arange(48) + model.d2t
    assert torch.equal(tokens, read_drafter(folder, stack).tokens)
    assert torch.equal(model.t2d.nonzero()[:, 0], tokens)

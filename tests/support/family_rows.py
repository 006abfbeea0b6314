"""What CASCADE does with a family: the laws that hold of a tiny model, or the refusal."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from cascade.core.errors import CascadeError, first_line
from cascade.decoding.early_exit import PROPAGATIONS, EarlyExit, make_exit
from cascade.decoding.forward import Exit
from cascade.exits.head_fitting import fit_heads
from cascade.models.stack import DecoderStack
from cascade.saturation.profile import similarities
from support.family_configs import tiny_config
from support.reference_early_exit import random_blocks, some_mask
from support.tiny_models import perturbed, random_ids

INF = math.inf
NEW = 6
PROMPT = random_ids(2, 9, seed=3)
#: The first row is three tokens shorter, padded on the left.
MASK = some_mask(2, 9)
#: Between two orders of summation in fp32, in parts of the largest logit, or of 1.
CLOSE = 1e-5
#: Between a cosine in fp32 and one in fp64.
CLOSE_COSINE = 1e-5

#: Best first: exited tokens skip work, tokens exit, `analyze` measures, or nothing of these.
Result = Literal["skips", "exits", "measured", "refused", "not built"]


@dataclass(frozen=True)
class FamilyRow:
    """What a family can be used for.

    Attributes:
        family: Its model type.
        result: The most that it can be used for.
        propagation: The kinds of propagation with which tokens exit.
        reason: Why it is not used for more.
    """

    family: str
    result: Result
    propagation: str = ""
    reason: str = ""


def row_of(family: str) -> FamilyRow:
    """Return a family's row, after checking all that it says.

    Raises:
        AssertionError: A number is wrong.
    """
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    except Exception as error:  # whatever the classes of transformers raise
        return FamilyRow(family, "not built", reason=_one_line(error))
    try:
        stack = DecoderStack(perturbed(model))
        stack.model.generation_config = GenerationConfig(pad_token_id=1)
    except CascadeError as error:
        return FamilyRow(family, "refused", reason=_one_line(error))
    check_measured(stack)
    exiting, reasons = [], []
    for propagation in PROPAGATIONS:
        try:
            _Laws(stack, propagation).check()
            exiting.append(propagation)
        except CascadeError as error:
            reasons.append(_one_line(error))
    if exiting and (slow := EarlyExit(stack).fallback_reason):
        reasons.append(slow)
    result: Result = "skips" if exiting and not slow else "exits" if exiting else "measured"
    return FamilyRow(family, result, ", ".join(exiting), "; ".join(dict.fromkeys(reasons)))


def _one_line(error: Exception) -> str:
    """Return an error's text; of a missing package, its name alone."""
    text = str(error)
    if isinstance(error, ImportError) and "pip install" in text:
        return f"needs the package {text.partition('pip install ')[2].split('`')[0]}"
    return text if isinstance(error, CascadeError) else first_line(error)


# --- Measuring -------------------------------------------------------------------------------


@torch.no_grad()
def own_history(model: PreTrainedModel, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return what a model says of itself: entries 0..N and the state after the final norm.

    `output_hidden_states` has the final norm's output in the place of entry N. Entry N is what the
    last layer returns: the module in an `nn.ModuleList` that takes entry N-1 and is done last.
    """
    blocks = {
        child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module
    }
    calls: list[tuple[Any, Any]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module in blocks:
            taken = args[0] if args else kwargs.get("hidden_states")
            calls.append((taken, output[0] if isinstance(output, (tuple, list)) else output))

    with nn.modules.module.register_module_forward_hook(keep, with_kwargs=True):
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    *states, final = output.hidden_states
    taking = [made for taken, made in calls if _same(taken, states[-1])]
    if taking:
        states.append(taking[-1])
    else:  # Mamba has what layers return, and not what the first one takes.
        states.insert(0, next(taken for taken, made in calls if _same(made, states[0])))
    return [_joined(state, ids) for state in states], final


def _same(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other)


def _joined(state: Tensor, ids: Tensor) -> Tensor:
    """Return the streams `[n, B, T, D]` or `[B, T, n, D]` of a token as one vector."""
    if state.ndim == 4 and state.shape[:2] != ids.shape:
        state = state.movedim(0, 2)
    return state.flatten(2)


def check_measured(stack: DecoderStack) -> None:
    """Check history, similarities and logits against the model's own."""
    ids = random_ids()
    own, final = own_history(stack.model, ids)
    history: dict[int, Tensor] = {}
    normed = stack.visit(ids, history.__setitem__)
    assert len(history) == len(own) == stack.num_layers + 1, f"{len(own)} own states"
    for entry, state in enumerate(own):
        # RWKV halves states between layers.
        factor = history[entry].norm() / state.norm() if stack.step_obstacle else 1
        assert torch.equal(history[entry], factor * state), f"entry {entry} is not the model's"
    pairs = list(itertools.pairwise(own))
    if normed is not None:
        assert torch.equal(normed, final), "the normed state is not the model's"
        pairs.append((own[-2], final))
    else:
        assert final.shape != own[-1].shape or torch.equal(own[-1], final), "a norm is missing"
    expected = torch.stack([_cosine(one.double(), other.double()) for one, other in pairs])
    found = similarities(stack, ids)
    assert (found - expected).abs().max() <= CLOSE_COSINE, "other similarities"
    with torch.no_grad():
        logits = stack.model(input_ids=ids, use_cache=False).logits
    with contextlib.suppress(CascadeError):
        assert torch.equal(stack.decode(history[stack.num_layers]), logits), "other logits"


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(-1) / one.norm(dim=-1) / other.norm(dim=-1)


# --- Exits -----------------------------------------------------------------------------------


@functools.cache
def own_text(stack: DecoderStack) -> Tensor:
    """Return what the model writes by itself, computing each token from the whole text."""
    model: Any = stack.model
    text: Tensor = model.generate(
        PROMPT,
        attention_mask=MASK,
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=1,
        do_sample=False,
        use_cache=False,
    )
    return text


class _Laws:
    """The laws of early exit, with one kind of propagation.

    Args:
        stack: The model.
        propagation: The kind.
    """

    def __init__(self, stack: DecoderStack, propagation: Any) -> None:
        self.stack = stack
        self.layers = range(1, stack.num_layers)
        heads = None
        if propagation == "ridge":
            heads = fit_heads(stack, random_blocks(8), self.layers)
        self.always = [
            make_exit(stack, layer, "top2_gap", -INF, heads=heads, propagation=propagation)
            for layer in self.layers
        ]
        self.early = EarlyExit(stack, exits=self.always, propagation=propagation)

    def check(self) -> None:
        """Check that exits at +inf are the full model, at -inf the head, and others consistent."""
        self.check_never()
        self.check_always()
        self.check_generating_is_scoring()

    def with_exits(self, exits: list[Exit]) -> EarlyExit:
        """Return early exit with other exits, without testing again what the layers can do."""
        early = copy.copy(self.early)
        early.exits = tuple(exits)
        return early

    def check_never(self) -> None:
        early = self.with_exits([replace(at, threshold=INF) for at in self.always])
        with torch.no_grad():
            logits = self.stack.model(input_ids=PROMPT, use_cache=False).logits
        score = early.score(PROMPT, torch.ones_like(PROMPT), keep_logits=True)
        assert score.logits is not None
        assert _apart(score.logits, logits) <= CLOSE, "+inf: other logits"
        text = own_text(self.stack)
        assert torch.equal(_generated(early).sequences, text), "+inf: other text"
        if self.early.propagation == "exact":
            verified = _generated(self.some(), verify=True).sequences
            assert torch.equal(verified, text), "verified: other text"

    def check_always(self) -> None:
        states = own_history(self.stack.model, PROMPT)[0]
        for at in (self.always[0], self.always[-1]):
            score = self.with_exits([at]).score(PROMPT, torch.ones_like(PROMPT), keep_logits=True)
            expected = at.head.logits(states[at.layer].flatten(0, 1)).unflatten(0, PROMPT.shape)
            assert score.logits is not None
            assert _apart(score.logits, expected.float()) <= CLOSE, "-inf: other logits"
            assert (score.exit_layers == at.layer).all(), "-inf: other exits"

    @functools.cache  # noqa: B019 (dropped with the row)
    def some(self) -> EarlyExit:
        """Return early exit at every layer but the last; some tokens reach each and exit there."""
        states = own_history(self.stack.model, random_ids(4, 12, seed=5))[0]
        exits = []
        for at in self.always:
            best = at.head.logits(states[at.layer].flatten(0, 1)).float().softmax(-1).topk(2).values
            gaps = (best[:, 0] - best[:, 1]).double()
            exits.append(replace(at, threshold=gaps.quantile(0.7).item()))
        return self.with_exits(exits)

    def check_generating_is_scoring(self) -> None:
        early = self.some()
        made = _generated(early)
        whole = torch.cat([MASK, MASK.new_ones((len(MASK), NEW))], dim=1)
        score = early.score(made.sequences, whole)
        places = slice(PROMPT.shape[1] - 1, -1)
        new = made.sequences[:, PROMPT.shape[1] :]
        assert torch.equal(score.predictions[:, places], new), "scored: other predictions"
        assert torch.equal(score.exit_layers[:, places], made.exit_layers), "scored: other exits"


def _generated(early: EarlyExit, **settings: Any) -> Any:
    return early.generate(
        PROMPT,
        MASK,
        max_new_tokens=NEW,
        eos_token_id=None,
        do_sample=False,
        return_dict_in_generate=True,
        **settings,
    )


def _apart(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return (got - expected).abs().max().item() / max(1.0, expected.abs().max().item())

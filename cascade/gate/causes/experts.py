"""Trials of a mixture of experts: its routers choose by their own weights, and normalize or not.

A router returns its logits, the weights of the chosen experts, and which are chosen. The trials
compute the last two again from the router's input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cascade.gate.causes.bench import Change
from cascade.gate.causes.hypotheses import Hypothesis
from cascade.gate.causes.trial_runs import FOUND, TrialRuns
from cascade.models.stack import DecoderStack

#: Weights of experts add up to 1 if their sum is this close; half precision has 3 digits.
_IS_ONE = 1e-2

#: How many more or fewer experts per token are tried.
_OTHER_COUNTS = (1, -1)

#: Settings that say what the trials compute.
_SETTINGS = ("top_k", "norm_topk_prob", "num_experts_per_tok")

#: Logits, weights of the chosen experts, and which are chosen, `[tokens, k]` each.
Routing = tuple[Tensor, Tensor, Tensor]
Reroute = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def expert_trials(trials: TrialRuns) -> Iterator[Hypothesis]:
    """Yield other weights and other choices of experts; nothing without routers.

    A setting of the routers that differs from the baseline's is tried as a setting.

    Args:
        trials: The bench and the evidence.
    """
    found = routers(trials.bench.stack)
    changed = [] if trials.differences is None else trials.differences.settings
    if not found or any(setting.attribute in _SETTINGS for setting in changed):
        return
    tries = [
        (
            "weights of experts",
            "the weights of the chosen experts do not add up to 1; normalized",
            _normalized,
        ),
        (
            "weights of experts",
            "the weights of the chosen experts are normalized; as the router's softmax gives them",
            _not_normalized,
        ),
        (
            "choice of experts",
            "the routers do not choose the experts with their highest scores; with those",
            _highest(0),
        ),
    ]
    counts = {int(module.top_k) for module in found}  # type: ignore[arg-type]  # of `routers`
    most = min(len(module.weight) for module in found)  # type: ignore[arg-type]
    for more in _OTHER_COUNTS:
        if not all(0 < count + more <= most for count in counts):
            continue
        side = "few" if more > 0 else "many"
        text = f"each token goes to {abs(more)} expert too {side}; with {abs(more)} "
        text += "more" if more > 0 else "less"
        tries.append(("experts per token", text, _highest(more)))
    for name, text, reroute in tries:
        yield from trials.undone(
            name, "model", trials.first, f"{text}, {FOUND}", _rerouted(found, reroute)
        )


def routers(stack: DecoderStack) -> list[nn.Module]:
    """Return the routers of a model that hold the weights that they choose by.

    Args:
        stack: The model.
    """
    return [
        module
        for module in stack.model.modules()
        if "Router" in type(module).__name__
        and isinstance(getattr(module, "weight", None), Tensor)
        and hasattr(module, "top_k")
    ]


def _rerouted(found: list[nn.Module], reroute: Reroute) -> Change:
    """Return a change of what routers return."""

    def hook(module: Any, args: tuple[Tensor, ...], routing: Routing) -> Routing:
        hidden = args[0].reshape(-1, args[0].shape[-1])
        logits = functional.linear(hidden, module.weight, getattr(module, "bias", None))
        probabilities = logits.float().softmax(dim=-1)
        weights, chosen = reroute(probabilities, routing[1], routing[2])
        return routing[0], weights.to(routing[1].dtype), chosen

    @contextlib.contextmanager
    def change() -> Iterator[None]:
        with contextlib.ExitStack() as restore:
            for module in found:
                restore.callback(module.register_forward_hook(hook).remove)
            yield

    return change


def _normalized(_: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return weights / weights.sum(dim=-1, keepdim=True), chosen


def _not_normalized(
    probabilities: Tensor, weights: Tensor, chosen: Tensor
) -> tuple[Tensor, Tensor]:
    return probabilities.gather(-1, chosen), chosen


def _highest(more: int) -> Reroute:
    """Return a choice of the best experts: as many as before, or more or fewer."""

    def reroute(probabilities: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        top = torch.topk(probabilities, chosen.shape[-1] + more, dim=-1)
        is_normalized = bool(((weights.float().sum(dim=-1) - 1).abs() < _IS_ONE).all())
        values = top.values
        if is_normalized:
            values = values / values.sum(dim=-1, keepdim=True)
        return values, top.indices

    return reroute

"""Trials of positions: the rotary frequencies of the config, and positions that are shifted."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cascade.gate.causes.bench import Bench, Change, tensors_set, values_set
from cascade.gate.causes.hypotheses import MOST_LEFT, Hypothesis
from cascade.gate.causes.part_differences import PartDifferences
from cascade.gate.causes.trial_runs import FOUND, TrialRuns
from cascade.models.architecture import text_config_of
from cascade.models.stack import DecoderStack
from cascade.saturation.model_parts import from_text

#: Offsets of positions that are tried. OPT adds 2 to every position.
_SHIFTS = (-1, 1, -2, 2)

_NAME = "rotary frequencies"
_CONFIG = "config."


# --- Rotary embeddings -----------------------------------------------------------------------


def rotary_trials(trials: TrialRuns) -> Iterator[Hypothesis]:
    """Yield the rotary frequencies that the config gives, and those of the baseline's config.

    Args:
        trials: The bench and the evidence.
    """
    found = [
        module
        for module in trials.bench.stack.model.modules()
        if type(module).__name__.endswith("RotaryEmbedding")
    ]
    if len(found) != 1:
        return
    (module,) = found
    now = getattr(module, "inv_freq", None)
    original = getattr(module, "original_inv_freq", None)
    if (
        isinstance(now, Tensor)
        and isinstance(original, Tensor)
        and original.shape == now.shape
        and not torch.allclose(original.to(now.device), now, rtol=1e-6)
    ):
        text = f"the rotary frequencies are not those of the config; with those, {FOUND}"
        change = tensors_set((now, lambda: original.to(now.device)))
        yield from trials.undone(_NAME, "model", trials.first, text, change)
    config, settings = _config_of_baseline(trials.bench.stack, trials.differences)
    made = _made_again(module, config, trials.bench.stack)
    if made is None:
        return
    of = f"the baseline's config ({settings})" if settings else "the config"
    text = f"the rotary embedding does not compute what {of} says; made again from it, {FOUND}"
    change = values_set((module, "forward", made.forward))
    yield from trials.undone(_NAME, "model", trials.first, text, change)


def _config_of_baseline(
    stack: DecoderStack, differences: PartDifferences | None
) -> tuple[Any, str]:
    """Return the model's config with the baseline's values of what differs, and which these are."""
    config = copy.deepcopy(text_config_of(stack.model.config))
    undone = []
    for setting in [] if differences is None else differences.settings:
        if not setting.name.startswith(_CONFIG):
            continue
        *path, key = setting.name.removeprefix(_CONFIG).split(".")
        owner: Any = vars(config)
        for part in path:
            owner = owner.get(part, {})
        if key in owner:
            owner[key] = from_text(setting.old[0])
            undone.append(f"{'.'.join([*path, key])} {setting.old[0]}")
    return config, ", ".join(undone)


def _made_again(module: nn.Module, config: Any, stack: DecoderStack) -> nn.Module | None:
    """Return a rotary embedding of a config; None if the family makes its own from something else.

    Its type may need more than the config, or settings that another release has.
    """
    make = type(module)
    needed = [
        name
        for name, each in inspect.signature(make).parameters.items()
        if each.default is inspect.Parameter.empty
    ]
    if needed != ["config"]:
        return None
    made: nn.Module | None = None
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        made = make(config).to(stack.device)
    return made


# --- Shifted positions -----------------------------------------------------------------------


def shifted_positions(trials: TrialRuns) -> Iterator[Hypothesis]:
    """Yield shifted positions, until one of them moves nothing at all.

    Args:
        trials: The bench and the evidence.
    """
    for shift in _SHIFTS if may_shift(trials.bench) else ():
        by = f"{abs(shift)} too {'high' if shift < 0 else 'low'}"
        text = f"the positions are {by}; shifted back, {FOUND}"
        rows = trials.bench.rows(shift=shift)
        if rows is None and shift < 0:
            # A table has no position before the first; a rolled one has it at its end.
            rows = trials.bench.rows(_wrapped(trials.bench), shift=shift)
        if rows is None:
            continue
        if trials.evidence.distance(rows, trials.plain) <= MOST_LEFT:
            return
        left = trials.evidence.distance(rows, trials.evidence.expected)
        yield Hypothesis("positions shifted", "model", trials.first, text, left)


def _wrapped(bench: Bench) -> Change:
    changes = []
    for table in learned_positions(bench):
        count, forward = table.num_embeddings, table.forward
        changes.append((table, "forward", lambda ids, f=forward, n=count: f(ids % n)))
    return values_set(*changes)


def may_shift(bench: Bench) -> bool:
    """Return whether positions can be shifted without an error that a GPU does not survive.

    Args:
        bench: The bench with the model.
    """
    if "position_ids" not in inspect.signature(bench.stack.decoder.forward).parameters:
        return False
    return bench.stack.device.type == "cpu" or not learned_positions(bench)


def learned_positions(bench: Bench) -> Sequence[nn.Embedding]:
    """Return the embeddings of positions: those of the decoder that are not of tokens.

    Args:
        bench: The bench with the model.
    """
    tokens = bench.stack.model.get_input_embeddings()
    return [
        module
        for module in bench.stack.decoder.modules()
        if isinstance(module, nn.Embedding) and module is not tokens
    ]

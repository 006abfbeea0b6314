"""Trials of positions: rotary frequencies, sliding windows, and positions that are shifted."""

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
_WINDOW, _WINDOW_NAME = "sliding_window", "sliding window"


# --- Rotary embeddings -----------------------------------------------------------------------


def rotary_trials(trials: TrialRuns) -> Iterator[Hypothesis]:
    """Yield the rotary frequencies that the config gives, and those of the baseline's config.

    They move the first layer, or the first of its kind.

    Args:
        trials: The bench and the evidence.
    """
    kinds = getattr(text_config_of(trials.bench.stack.model.config), "layer_types", None) or ()
    if trials.evidence.first > 0 and len(set(kinds)) < 2:
        return
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


# --- Sliding windows -------------------------------------------------------------------------


def window_trials(trials: TrialRuns) -> Iterator[Hypothesis]:
    """Yield another length of the sliding window, and the windows that the config says.

    Args:
        trials: The bench and the evidence.
    """
    changed = [] if trials.differences is None else trials.differences.settings
    config = text_config_of(trials.bench.stack.model.config)
    window = getattr(config, _WINDOW, None)
    if not isinstance(window, int) or any(setting.attribute == _WINDOW for setting in changed):
        return
    owners = [
        owner
        for owner in (config, *trials.bench.stack.model.modules())
        if vars(owner).get(_WINDOW) == window
    ]
    for by, wrong in ((-1, "longer"), (1, "shorter")):
        text = (
            f"the sliding window is one token {wrong} than the {window} of the config; with "
            f"{window + by} in the config, {FOUND}"
        )
        change = values_set(*((owner, _WINDOW, window + by) for owner in owners))
        for found in trials.undone(_WINDOW_NAME, "model", trials.first, text, change):
            yield found
            if found.left <= MOST_LEFT:
                return
    layers = _layers_with_window(config, trials.bench.stack)
    if layers:
        text = (
            f"the sliding window is not the {window} tokens of the config in the layers "
            f"{', '.join(str(number + 1) for number in layers)} and no others; with masks that "
            f"are, {FOUND}"
        )
        change = _masked(trials.bench, window, layers)
        yield from trials.undone(_WINDOW_NAME, "model", trials.first, text, change)


def _layers_with_window(config: Any, stack: DecoderStack) -> list[int]:
    """Return the numbers of the layers, from 0, that have a sliding window by the config."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return list(range(stack.num_layers))
    return [number for number, kind in enumerate(kinds) if kind == "sliding_attention"]


def _masked(bench: Bench, window: int, layers: Sequence[int]) -> Change:
    """Return a change that gives each layer its causal mask, with a window in some layers."""
    places = torch.arange(bench.ids.shape[1], device=bench.ids.device)
    distance = places[:, None] - places

    def mask_of(number: int) -> Tensor:
        seen = (distance >= 0) & ((distance < window) | (number not in layers))
        closed = torch.finfo(bench.stack.dtype).min
        mask = torch.zeros(seen.shape, dtype=bench.stack.dtype, device=seen.device)
        return mask.masked_fill(~seen, closed)[None, None]

    @contextlib.contextmanager
    def change() -> Iterator[None]:
        with contextlib.ExitStack() as restore:
            for number, layer in enumerate(bench.stack.layers):

                def hook(
                    _: Any, args: Any, given: dict[str, Any], number: int = number
                ) -> tuple[Any, dict[str, Any]]:
                    return args, given | {"attention_mask": mask_of(number)}

                handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
                restore.callback(handle.remove)
            yield

    return change


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

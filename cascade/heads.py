"""Exit heads: what turns an exit state into logits, and how upper layers learn of exited tokens."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cascade.corpora import TokenBlocks
from cascade.errors import ModelError, OutputError, RecordError, UsageError, first_line
from cascade.exits import exit_entries
from cascade.files import atomic_path
from cascade.models import DecoderStack
from cascade.ridge import NormalEquations, fit, rms_normalized
from cascade.saturation import check_blocks
from cascade.shapes import COUNT, FLAG, TEXT, Maybe, Shape, flaw

_SCHEMA = 1
_KIND = "exit-heads"

#: Of every ten sequences, this one is kept aside: it chooses strengths and epochs.
CHECKED = 9

#: What two models must share, beside their weights, for the heads of one to serve the other.
_IDENTITY = ("revision", "family", "num_layers", "hidden_size", "dtype")


class ExitHead(Protocol):
    """Turns exit states into logits.

    Attributes:
        name: For tables: "logit_lens", "ridge", ...
        multiplications: Per row, those beside the LM head's own.
    """

    name: str
    multiplications: int

    def logits(self, hidden: Tensor) -> Tensor:
        """Return `[n, V]` from exit states `[n, D]`."""
        ...


class LogitLens:
    """The model's own final norm and LM head, applied to the exit state (nostalgebraist 2020).

    Args:
        stack: The model.
    """

    name = "logit_lens"
    multiplications = 0

    def __init__(self, stack: DecoderStack) -> None:
        self.stack = stack

    def logits(self, hidden: Tensor) -> Tensor:
        """Return `[n, V]` from exit states `[n, D]`."""
        return self.stack.decode(hidden[None])[0]


class RidgeHead:
    """An affine map from the RMS-normalized exit state to the final normed state, then the LM head.

    Args:
        stack: The model.
        weight: `[D, D]`, inputs first.
        bias: `[D]`.
        name: For tables.
    """

    def __init__(
        self, stack: DecoderStack, weight: Tensor, bias: Tensor, *, name: str = "ridge"
    ) -> None:
        self.stack = stack
        self.name = name
        self.weight = weight.to(stack.device)
        self.bias = bias.to(stack.device)
        self.multiplications = self.weight.numel()

    def normed(self, hidden: Tensor) -> Tensor:
        """Return the predicted final normed state, `[n, D]`."""
        return torch.addmm(self.bias, rms_normalized(hidden), self.weight).to(hidden.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return `[n, V]` from exit states `[n, D]`."""
        return self.stack.decode_normed(self.normed(hidden)[None])[0]


class PropagationMap:
    """Predicts from an exit state what every upper layer needs of a token that left.

    One product for all upper layers together: for layers with separate projections it gives keys
    and values before any norm and rotation, which costs what the projections would; for others it
    gives the layer's input.

    Args:
        weight: `[D, layers * width]`, inputs first, the lowest upper layer first.
        bias: `[layers * width]`.
        first: The lowest upper layer, exit layer + 1.
        width: Outputs per layer.
        of_states: Whether layer inputs are predicted, in units of the exit state's size.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, *, first: int, width: int, of_states: bool
    ) -> None:
        self.weight, self.bias = weight, bias
        self.first, self.width, self.of_states = first, width, of_states

    def predict(self, hidden: Tensor) -> Tensor:
        """Return `[n, layers, width]` from exit states `[n, D]`."""
        predicted: Tensor = torch.addmm(self.bias, rms_normalized(hidden), self.weight)
        if self.of_states:
            predicted = predicted * _size(hidden)
        by_layer: Tensor = predicted.to(hidden.dtype).unflatten(-1, (-1, self.width))
        return by_layer


def _size(hidden: Tensor) -> Tensor:
    size: Tensor = hidden.float().square().mean(dim=-1, keepdim=True).clamp_min(1e-30).sqrt()
    return size


@dataclass
class FittedHeads:
    """Ridge heads and propagation maps of several exit layers, and where they come from.

    Attributes:
        weights: Exit layer -> `(W [D, D], b [D])` of its head.
        maps: Exit layer -> `(W [D, layers * width], b)` of its propagation.
        width: Outputs of a propagation map per upper layer.
        of_states: Whether the maps predict layer inputs instead of keys and values.
        provenance: Model, corpus, strengths, versions.
    """

    weights: dict[int, tuple[Tensor, Tensor]]
    maps: dict[int, tuple[Tensor, Tensor]]
    width: int
    of_states: bool
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """The exit layers, ascending."""
        return sorted(self.weights)

    def _check_exit(self, stack: DecoderStack, layer: int) -> None:
        if layer not in self.weights:
            raise UsageError(
                f"these heads were fitted for the layers {', '.join(map(str, self.layers))}, "
                f"got layer {layer}; fit it with `cascade fit-heads --layers`"
            )
        self.check(stack)

    def head(self, stack: DecoderStack, layer: int) -> RidgeHead:
        """Return the ridge head of an exit layer.

        Raises:
            UsageError: None was fitted for it.
            ModelError: The heads belong to another model.
        """
        self._check_exit(stack, layer)
        return RidgeHead(stack, *self.weights[layer])

    def propagation(self, stack: DecoderStack, layer: int) -> PropagationMap | None:
        """Return the propagation map of an exit layer; None where no layer lies above it.

        Raises:
            UsageError: None was fitted for it.
            ModelError: The heads belong to another model.
        """
        self._check_exit(stack, layer)
        if layer == stack.num_layers:
            return None
        weight, bias = (tensor.to(stack.device) for tensor in self.maps[layer])
        return PropagationMap(
            weight, bias, first=layer + 1, width=self.width, of_states=self.of_states
        )

    def fingerprint(self) -> str:
        """Return a SHA-256 over every weight: equal exactly when all of them are."""
        digest = hashlib.sha256()
        for name, pairs in (("head", self.weights), ("propagation", self.maps)):
            for layer in sorted(pairs):
                digest.update(f"{name}.{layer}".encode())
                for tensor in pairs[layer]:
                    digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def saw(self, blocks: TokenBlocks) -> bool:
        """Say whether they were fitted on a corpus, a part of it, or one that it is a part of.

        On such text they are better than on any other: what is measured there holds for it alone.

        Args:
            blocks: A corpus to measure on.
        """
        fitted = self.provenance.get("corpus") or {}
        if fitted.get("fingerprint") == blocks.fingerprint():
            return True
        names = f"{fitted.get('name')}-", f"{blocks.name}-"
        same = names[0].startswith(names[1]) or names[1].startswith(names[0])
        return same and fitted.get("source") == blocks.source

    def check(self, stack: DecoderStack) -> None:
        """Refuse to serve another model.

        Raises:
            ModelError: Names both models and what differs.
        """
        check_same_model(self.provenance.get("model", {}), stack, what="these exit heads")

    def save(self, path: Path, *, half: bool = False) -> None:
        """Write a safetensors file, whole or not at all.

        Args:
            path: The file.
            half: Store in 16 bits (float16): half the size.

        Raises:
            OutputError: It cannot be written.
            UsageError: With `half`, a weight is too large for 16 bits.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {}
        for kind, pairs in (("head", self.weights), ("propagation", self.maps)):
            for layer, (weight, bias) in pairs.items():
                for part, tensor in (("weight", weight), ("bias", bias)):
                    stored = _halved(tensor, layer) if half else tensor
                    tensors[f"{kind}.{layer}.{part}"] = stored.cpu().contiguous()
        about = {
            "schema": _SCHEMA,
            "kind": _KIND,
            "width": self.width,
            "of_states": self.of_states,
            "provenance": self.provenance,
        }
        with atomic_path(path) as temporary:
            try:
                save_file(tensors, temporary, metadata={"cascade": json.dumps(about)})
            except SafetensorError as error:  # what a full disk is to safetensors
                raise OutputError(
                    f"cannot write {path}: {first_line(error)}; free some space or choose another"
                    " place (what was there before is unharmed)"
                ) from error


def heads_provenance(heads: FittedHeads | None, *corpora: TokenBlocks) -> dict[str, Any]:
    """Return what a record says of the heads behind its figures.

    Args:
        heads: None for the logit lens.
        corpora: What the figures are measured on.
    """
    return {
        "heads": None if heads is None else heads.provenance,
        "heads_fingerprint": None if heads is None else heads.fingerprint(),
        "heads_saw_corpus": heads is not None and any(map(heads.saw, corpora)),
    }


def _halved(tensor: Tensor, layer: int) -> Tensor:
    stored = tensor.half()
    if not torch.isfinite(stored).all():
        raise UsageError(
            f"the weights of exit layer {layer} reach {float(tensor.abs().max()):.3g}, more than 16"
            " bits hold; save them without half"
        )
    return stored


def check_same_model(expected: dict[str, Any], stack: DecoderStack, *, what: str) -> None:
    """Refuse heads or a calibration of another model, revision or dtype.

    Args:
        expected: The `model` part of the provenance of what is to be used.
        stack: The model at hand.
        what: What is to be used, for the error.

    Raises:
        ModelError: Names both models and what differs.
    """
    own = dict(stack.provenance)
    differs = [name for name in _IDENTITY if expected.get(name) != own.get(name)]
    if not differs:  # else there is no need to read all weights
        own["weights_hash"] = stack.weights_hash()
        differs = [name for name in ("weights_hash",) if expected.get(name) != own[name]]
    if differs:
        raise ModelError(
            f"{what} belong to {_named(expected, differs)}, but the model is "
            f"{_named(own, differs)}; make them anew for this model"
        )


def _named(model: dict[str, Any], differs: Sequence[str]) -> str:
    parts = ", ".join(f"{name} {model.get(name)}" for name in differs)
    return f"{model.get('name') or model.get('family') or 'an unknown model'} ({parts})"


def load_heads(path: Path, stack: DecoderStack) -> FittedHeads:
    """Read fitted heads and make sure that they belong to the model.

    Raises:
        RecordError: The file is missing, torn, or no exit heads.
        ModelError: They belong to another model (both are named).
    """
    from safetensors import safe_open

    if path.is_dir():
        raise RecordError(
            f"{path} is a folder, expected the .safetensors file of `cascade fit-heads`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("cascade", "null"))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise RecordError(f"no exit heads at {path}; make them with `cascade fit-heads`") from error
    except Exception as error:
        # safetensors has an error type of its own for each way a file can be torn.
        raise RecordError(
            f"{path} is no readable safetensors file ({first_line(error)}); make it anew with "
            "`cascade fit-heads`"
        ) from error
    if not isinstance(about, dict) or (about.get("kind"), about.get("schema")) != (_KIND, _SCHEMA):
        raise RecordError(f"{path} holds no exit heads; make them with `cascade fit-heads`")
    try:
        heads = _assembled(tensors, about)
    except ValueError as error:
        raise RecordError(
            f"{path} is torn or edited ({error}); make it anew with `cascade fit-heads`"
        ) from error
    heads.check(stack)
    return heads


#: What is read of a file's metadata.
_ABOUT: Shape = {
    "width": COUNT,
    "of_states": FLAG,
    "provenance": {
        "model": {"num_layers": COUNT, "hidden_size": COUNT},
        "corpus": Maybe(
            {
                "name": TEXT,
                "source": TEXT,
                "fingerprint": TEXT,
                "tokens": COUNT,
                "sequences": COUNT,
                "seq_len": COUNT,
            }
        ),
    },
}


def _assembled(tensors: dict[str, Tensor], about: dict[str, Any]) -> FittedHeads:
    """Return a file's content as heads; ValueError, in words, where it is not whole."""
    found = flaw(about, _ABOUT)
    if found is not None:
        raise ValueError(found)
    model, width = about["provenance"]["model"], about["width"]
    hidden, last = model["hidden_size"], model["num_layers"]
    if about["of_states"] and width != hidden:
        raise ValueError(
            f"expected a width of {hidden} where layer inputs are predicted, got {width}"
        )
    _check_tensors(tensors, _shapes(tensors, hidden, last, width))

    def pairs(kind: str) -> dict[int, tuple[Tensor, Tensor]]:
        layers = [int(name.split(".")[1]) for name in tensors if name.startswith(f"{kind}.")]
        return {
            layer: (tensors[f"{kind}.{layer}.weight"], tensors[f"{kind}.{layer}.bias"])
            for layer in layers
        }

    return FittedHeads(
        pairs("head"), pairs("propagation"), width, about["of_states"], about["provenance"]
    )


def _shapes(
    tensors: Iterable[str], hidden: int, last: int, width: int
) -> dict[str, tuple[int, ...]]:
    """Return every tensor that belongs into a file: those of all layers that any is named after."""
    named = [re.fullmatch(r"(?:head|propagation)\.([1-9]\d*)\.\w+", name) for name in tensors]
    layers = sorted({int(match[1]) for match in named if match is not None})
    return {
        f"{kind}.{layer}.{part}": shape
        for layer in layers
        if layer <= last
        for kind, outputs in (("head", hidden), ("propagation", (last - layer) * width))
        if outputs
        for part, shape in (("weight", (hidden, outputs)), ("bias", (outputs,)))
    }


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"it has {name}, which is no part of exit heads of its model")
    missing = sorted(expected.keys() - tensors.keys())
    if missing or not expected:
        raise ValueError(f"it lacks {', '.join(missing) or 'heads altogether'}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            got = list(tensors[name].shape)
            raise ValueError(f"expected {name} of shape {list(shape)}, got {got}")
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{name} holds NaN or infinite values")


# --- Fitting ---------------------------------------------------------------------------------


def fit_heads(
    stack: DecoderStack,
    blocks: TokenBlocks,
    layers: Sequence[int],
    *,
    batch_size: int = 32,
    provenance: dict[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> FittedHeads:
    """Fit a ridge head and a propagation map for every exit layer, in one pass over a corpus.

    Closed form, from streaming normal equations: memory grows with the square of the model's
    width, not with the corpus.

    Args:
        stack: The model.
        blocks: The corpus.
        layers: Exit layers, 1..N.
        batch_size: Sequences per forward pass.
        provenance: What is known beside model and corpus.
        progress: Called with the number of tokens done since the last call.

    Raises:
        UsageError: A layer is outside 1..N, or comes twice.
        CorpusError: Sequences beyond the model's positions, or batches of none.
        ModelError: A layer's output is NaN or infinite, or tokens lie beyond the vocabulary.
    """
    layers = [exit_entries(layer, stack.num_layers)[1] for layer in layers]  # numpy's as Python's
    if len(set(layers)) != len(layers) or not layers:
        raise UsageError(f"expected distinct exit layers, got {layers}")
    check_blocks(stack, blocks, batch_size)
    fitter = _Fitter(stack, sorted(layers))
    for ids, numbers in blocks.batches(batch_size):
        fitter.add(torch.from_numpy(ids).long().to(stack.device), numbers)
        if progress is not None:
            progress(ids.size)
    heads = fitter.fit()
    heads.provenance |= {
        "model": dict(stack.provenance),
        "corpus": blocks.provenance(),
    } | (provenance or {})
    model = heads.provenance["model"] | {"weights_hash": stack.weights_hash()}
    heads.provenance["model"] = model
    return heads


def rows_of(
    stack: DecoderStack, ids: npt.NDArray[np.int32], layers: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """Run the decoder once; return the exit states by layer and the final ones, `[B * T, D]`.

    Args:
        stack: The model.
        ids: `[B, T]`.
        layers: Exit layers.
    """
    states: dict[int, Tensor] = {}

    def keep(entry: int, hidden: Tensor) -> None:
        if entry in layers or entry == stack.num_layers:
            states[entry] = hidden.flatten(0, 1)

    normed = stack.visit(torch.from_numpy(ids).long().to(stack.device), keep)
    final = states[stack.num_layers] if normed is None else normed.flatten(0, 1)
    return states, final


class _Fitter:
    """Sums up what the fits of several exit layers need, batch by batch."""

    def __init__(self, stack: DecoderStack, layers: list[int]) -> None:
        self.stack, self.layers = stack, layers
        projections = [_projections(layer) for layer in stack.layers]
        self.of_states = any(found is None for found in projections)
        self.projections = [] if self.of_states else projections
        self.width = stack.hidden_size
        if not self.of_states:
            self.width = sum(projection.out_features for projection in projections[0] or ())
        self.equations = {
            layer: [
                NormalEquations(
                    stack.hidden_size,
                    stack.hidden_size + (stack.num_layers - layer) * self.width,
                    device=stack.device if stack.device.type != "mps" else torch.device("cpu"),
                )
                for _ in ("train", "check")
            ]
            for layer in layers
        }

    def add(self, ids: Tensor, numbers: Any) -> None:
        history: dict[int, Tensor] = {}
        wanted = set(self.layers) | {self.stack.num_layers}
        if self.of_states:
            wanted |= set(range(min(self.layers), self.stack.num_layers))

        def keep(entry: int, hidden: Tensor) -> None:
            if entry in wanted:
                history[entry] = hidden.flatten(0, 1)

        # Those kept aside come last: both kinds are then a slice, and nothing has to be copied.
        checked = numbers % 10 == CHECKED
        ids = ids[torch.from_numpy(np.argsort(checked, kind="stable")).to(ids.device)]
        with _captured(self.projections[min(self.layers) :]) as raw:
            normed = self.stack.visit(ids, keep)
        final = history[self.stack.num_layers] if normed is None else normed.flatten(0, 1)
        trained = int((~checked).sum()) * ids.shape[1]
        for layer in self.layers:
            targets = [final, *self._upper(layer, history, raw)]
            x = rms_normalized(history[layer])
            for equations, rows in zip(
                self.equations[layer], (slice(trained), slice(trained, None)), strict=True
            ):
                if len(x[rows]):
                    self._update(equations, x[rows], [y[rows] for y in targets], layer, history)

    def _update(
        self,
        equations: NormalEquations,
        x: Tensor,
        targets: list[Tensor],
        layer: int,
        history: dict[int, Tensor],
    ) -> None:
        device = equations.xx.device
        try:
            equations.update(x.to(device), *(y.to(device) for y in targets))
        except ValueError as error:
            for entry, states in sorted(history.items()):
                if not torch.isfinite(states).all():
                    raise ModelError(
                        f"layer {entry} gives NaN or infinite hidden states; use a wider --dtype, "
                        "or get the checkpoint again"
                    ) from error
            raise ModelError(f"exit layer {layer}: {error}; use a wider --dtype") from error

    def _upper(self, layer: int, history: dict[int, Tensor], raw: list[Tensor]) -> list[Tensor]:
        """Return the upper layers' targets, the lowest first: in all `width` outputs for each."""
        if self.of_states:
            size = _size(history[layer])
            return [history[entry].float() / size for entry in range(layer, self.stack.num_layers)]
        return [part.flatten(0, 1) for part in raw[2 * (layer - min(self.layers)) :]]

    def fit(self) -> FittedHeads:
        weights, maps, strengths = {}, {}, {}
        hidden = self.stack.hidden_size
        for layer, (train, check) in self.equations.items():
            groups = [hidden] + [self.width] * (self.stack.num_layers - layer)
            weight, bias, chosen = fit(train, check, groups)
            weights[layer] = (weight[:, :hidden].clone(), bias[:hidden].clone())
            if layer < self.stack.num_layers:
                maps[layer] = (weight[:, hidden:].clone(), bias[hidden:].clone())
            strengths[str(layer)] = chosen
        return FittedHeads(weights, maps, self.width, self.of_states, {"strengths": strengths})


def _projections(layer: nn.Module) -> list[Any] | None:
    """Return a layer's key and value projection, where it has them apart."""
    attention = getattr(layer, "self_attn", None)
    found = [getattr(attention, name, None) for name in ("k_proj", "v_proj")]
    if all(isinstance(projection, nn.Linear) for projection in found):
        return found
    return None


@contextlib.contextmanager
def _captured(projections: Sequence[Sequence[nn.Module] | None]) -> Iterator[list[Tensor]]:
    """Collect what the layers' key and value projections give: `[B, T, width]` each, in turn."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        kept.append(output)

    with contextlib.ExitStack() as hooks:
        for pair in projections:
            for projection in pair or ():
                hooks.callback(projection.register_forward_hook(keep).remove)
        yield kept

"""Direct evidence: the parts of a model that differ from those that the baseline recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cascade.models.stack import DecoderStack
from cascade.saturation.model_parts import layer_and_kind, parts_of
from cascade.saturation.records import ModelParts, TensorSummary

#: Buffers are computed when a model is loaded; another machine moves them by less than this share.
_SAME_BUFFER = 1e-6


#: The most settings that a text names.
MOST_SETTINGS = 3


#: The formats of weights, the finest first.
_FORMATS = ("float32", "float16", "bfloat16", "int8")


@dataclass(frozen=True)
class ChangedTensor:
    """A weight or buffer that differs from the baseline's.

    Attributes:
        name: Its name in the model.
        layer: Its decoder layer; None outside of the layers.
        kind: Its name within the layer.
        old: The baseline's; None if it had none.
        new: The model's; None if it has none.
    """

    name: str
    layer: int | None
    kind: str
    old: TensorSummary | None
    new: TensorSummary | None

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight, and no buffer."""
        return any(side is not None and side.digest for side in (self.old, self.new))

    @property
    def rounded_to(self) -> str | None:
        """The coarser format that the values have now; None if they do not."""
        if self.old is None or self.new is None:
            return None
        finer = _FORMATS.index(self.new.format) > _FORMATS.index(self.old.format)
        return self.new.format if finer else None


@dataclass(frozen=True)
class ChangedSetting:
    """A setting that differs from the baseline's: its name, and the values of both sides."""

    name: str
    old: list[str]
    new: list[str]

    @property
    def attribute(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def pair(self) -> tuple[str, str]:
        """The first value that differs, of the baseline and now."""
        count = max(len(self.old), len(self.new))
        sides = [side * count if len(side) == 1 else side for side in (self.old, self.new)]
        return next(
            (pair for pair in zip(*sides, strict=False) if pair[0] != pair[1]),
            (", ".join(self.old), ", ".join(self.new)),
        )


@dataclass(frozen=True)
class PartDifferences:
    """What differs between a model and the one that a baseline recorded."""

    tensors: tuple[ChangedTensor, ...]
    settings: tuple[ChangedSetting, ...]

    @property
    def weights(self) -> list[ChangedTensor]:
        """The weights that differ."""
        return [tensor for tensor in self.tensors if tensor.is_weight]


def part_differences(stack: DecoderStack, expected: ModelParts) -> PartDifferences:
    """Return the parts of a model that differ from those that its baseline recorded.

    Args:
        stack: The model.
        expected: The parts in the baseline's record.
    """
    found = parts_of(stack)
    tensors = []
    for name in dict.fromkeys([*expected.tensors, *found.tensors]):
        old, new = expected.tensors.get(name), found.tensors.get(name)
        if not _same(old, new):
            tensors.append(ChangedTensor(name, *layer_and_kind(stack, name), old, new))
    settings = [
        ChangedSetting(name, expected.settings[name], values)
        for name, values in found.settings.items()
        if name in expected.settings and expected.settings[name] != values
    ]
    return PartDifferences(tuple(tensors), tuple(settings))


def _same(old: TensorSummary | None, new: TensorSummary | None) -> bool:
    if old is None or new is None:
        # A buffer that one side does not have is another release's.
        return not (old or new or _NOTHING).digest
    if old.digest or new.digest:
        return old.digest == new.digest
    return abs(old.rms - new.rms) <= _SAME_BUFFER * max(old.rms, new.rms)


_NOTHING = TensorSummary(digest="", rms=0.0, format="float32")


def in_words(weights: Sequence[ChangedTensor], num_layers: int) -> str:
    """Return which weights differ: their kinds and layers.

    Args:
        weights: Those that differ.
        num_layers: The number of decoder layers.
    """
    layers = sorted({weight.layer for weight in weights if weight.layer is not None})
    texts = []
    if layers:
        kinds = _listed([w.kind for w in weights if w.layer is not None])
        texts.append(f"{kinds} in {_layers_in_words(layers, num_layers)}")
    outside = [weight.kind for weight in weights if weight.layer is None]
    if outside:
        texts.append(_listed(outside))
    return " and ".join(texts)


def differences_in_words(stack: DecoderStack, expected: ModelParts | None) -> list[str]:
    """Return which weights and settings differ from a baseline's, one sentence each.

    Args:
        stack: The model.
        expected: The parts in the baseline's record; None if it has none.
    """
    if expected is None:
        return []
    found = part_differences(stack, expected)
    texts = []
    if found.weights:
        texts.append(
            f"the weights of {in_words(found.weights, stack.num_layers)} differ from the "
            "baseline's, no others do"
        )
    return texts + settings_in_words(found)


def settings_in_words(differences: PartDifferences | None) -> list[str]:
    """Return the first settings that differ, one sentence each."""
    return [
        f"the setting {setting.name} is {setting.pair[1]}, the baseline's was {setting.pair[0]}"
        for setting in ([] if differences is None else differences.settings[:MOST_SETTINGS])
    ]


def _listed(names: Sequence[str]) -> str:
    distinct = [name.removesuffix(".weight") for name in dict.fromkeys(names)]
    if len(distinct) > 4:
        return f"{len(distinct)} modules"
    return ", ".join(distinct)


def _layers_in_words(layers: Sequence[int], num_layers: int) -> str:
    if len(layers) == num_layers:
        return "every layer"
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) > 4:
        return f"{len(layers)} layers from layer {layers[0]} on"
    return f"layers {', '.join(map(str, layers))}"

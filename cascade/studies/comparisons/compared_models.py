"""The models to compare: which ones, the text that they read, and their measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cascade.core.errors import UsageError
from cascade.core.schema import from_plain, known, to_plain
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.models.architecture import check_config
from cascade.models.identity import tokenizer_hash
from cascade.models.stack import DecoderStack
from cascade.models.weights import resolve
from cascade.saturation.profile import SaturationProfile, analyze
from cascade.saturation.records import ProfileRecord
from cascade.studies.comparisons.altered_models import Alteration
from cascade.studies.comparisons.configurations import (
    Configuration,
    Sizes,
    lacks_weights,
    read_configuration,
    sizes_of,
)

#: More curves than this cannot be told apart in one picture.
MOST_MODELS = 12


@dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
        source: Whatever `cascade.load` takes.
        alteration: How its weights are altered after loading.
        measured: Whether it is measured, or described by its configuration alone.
    """

    source: str
    alteration: Alteration | None = None
    measured: bool = True

    def check(self) -> None:
        """Refuse a model that could not be compared, before any model is measured.

        Raises:
            CascadeError: As for `cascade.load`.
        """
        where = str(resolve(self.source).folder) if self.measured else self.source
        check_config(read_configuration(where).config)


def candidates(
    models: Sequence[str],
    *,
    copies: Sequence[Alteration] = (),
    unmeasured: Sequence[str] = (),
    config_only: bool = False,
) -> list[Candidate]:
    """Return the models to compare: the given ones, copies of the first, unmeasured models.

    A folder that holds a configuration and no weights is described by it.

    Args:
        models: Whatever `cascade.load` takes.
        copies: How to alter copies of the first model.
        unmeasured: Models that are described by their configuration alone.
        config_only: Measure none.

    Raises:
        UsageError: Fewer than two models, or too many; or copies of a model that is not measured.
    """
    found = [
        Candidate(source, measured=not (config_only or lacks_weights(source))) for source in models
    ]
    if copies and not (found and found[0].measured):
        raise UsageError(
            "--copy alters the weights of the first model, which is not measured; leave it out"
        )
    found[1:1] = [replace(found[0], alteration=how) for how in copies]
    found += [Candidate(source, measured=False) for source in unmeasured]
    if len(found) < 2:
        raise UsageError(
            f"expected at least two models, got {len(found)}; name another one, or add a copy of "
            "the first with --copy int8"
        )
    if len(found) > MOST_MODELS:
        raise UsageError(f"expected at most {MOST_MODELS} models, got {len(found)}")
    return found


class SameText:
    """Reads the same records of a corpus with each model's own tokenizer.

    The first model's tokens decide where the text ends. Another tokenizer, which makes more or
    fewer tokens of it, reads the same records to their end. One long document is read up to the
    same number of tokens instead.

    Args:
        source: As for `cascade.load_blocks`.
        max_tokens: Of the first model.
        options: Other options of `cascade.load_blocks`.
    """

    def __init__(self, source: str, *, max_tokens: int | None = None, **options: Any) -> None:
        self._source = source
        self._options = options
        self._max_tokens = max_tokens
        self._first: tuple[str | None, TokenBlocks] | None = None

    def blocks(self, stack: DecoderStack) -> TokenBlocks:
        """Return the text as tokens of a model.

        Raises:
            CorpusError: As for `cascade.load_blocks`.
        """
        first_hash, first = self._first or (None, None)
        own = None if stack.tokenizer is None else tokenizer_hash(stack.tokenizer)
        if first is not None and own == first_hash:
            return first
        options: dict[str, Any] = self._options | {"max_tokens": self._max_tokens}
        if first is not None and first.records > 1:
            options |= {"max_tokens": None, "num_samples": first.records}
        blocks = load_blocks(self._source, stack.tokenizer, **options)
        if self._first is None:
            self._first = (own, blocks)
        return blocks


@dataclass(frozen=True)
class MeasuredModel:
    """A model's profile, and what its configuration says.

    Attributes:
        profile: Over the corpus that all models are compared on.
        sizes: Of the model.
    """

    profile: SaturationProfile
    sizes: Sizes

    @cached_property
    def record(self) -> ProfileRecord:
        """The profile's record."""
        return from_plain(to_plain(self.profile.record()), ProfileRecord)

    @property
    def name(self) -> str:
        """The model's name."""
        return known(self.record.provenance.model.name) or "model"


@dataclass(frozen=True)
class UnmeasuredModel:
    """A model of which only the configuration is known.

    Attributes:
        configuration: Its configuration.
        sizes: What follows of it.
    """

    configuration: Configuration
    sizes: Sizes

    @property
    def name(self) -> str:
        """The model's name."""
        return self.configuration.name


def measure_model(
    stack: DecoderStack,
    blocks: TokenBlocks,
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> MeasuredModel:
    """Measure one of the models to compare; the model itself is not kept.

    Args:
        stack: The model.
        blocks: The corpus, read with the model's own tokenizer.
        batch_size: Sequences per forward pass.
        progress: Called with the number of tokens done since the last call.

    Raises:
        CorpusError: Sequences beyond the model's positions, or tokens beyond its vocabulary.
        ModelError: A layer's output is NaN (names the layer).
    """
    sizes = sizes_of(stack.model.config, int(blocks.ids.shape[1]))
    profile = analyze(stack, blocks, batch_size=batch_size, progress=progress)
    return MeasuredModel(profile, sizes)


def describe_model(source: str, seq_len: int) -> UnmeasuredModel:
    """Describe a model by its configuration.

    Args:
        source: Whatever `cascade.load` takes; a folder needs no more than its config.json.
        seq_len: Tokens per sequence that operations are counted for.

    Raises:
        ModelError: There is no configuration, or it cannot be read.
        UnsupportedModelError: It describes no model that could be measured.
    """
    configuration = read_configuration(source)
    return UnmeasuredModel(configuration, sizes_of(configuration.config, seq_len))

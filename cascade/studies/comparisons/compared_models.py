"""The models of a comparison, the text that they read, and their measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cascade.core.errors import UsageError
from cascade.core.schema import from_plain, known, to_plain
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.models.architecture import check_config
from cascade.models.checkpoints.weights import resolve
from cascade.models.identity import tokenizer_hash
from cascade.models.stack import DecoderStack
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

#: Maximum number of models: more curves cannot be distinguished in one figure.
MOST_MODELS = 12


@dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
        source: Source of the model, as for `cascade.load`.
        alteration: Alteration of the weights after loading.
        measured: Whether to measure the model. Otherwise, only its configuration is read.
    """

    source: str
    alteration: Alteration | None = None
    measured: bool = True

    def check(self) -> None:
        """Check that the model can be compared, before any model is measured.

        Raises:
            CascadeError: See `cascade.load`.
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
    """Return the models to compare: the given ones, copies of the first, and unmeasured models.

    A folder that holds a configuration but no weights becomes an unmeasured model.

    Args:
        models: Sources of models, as for `cascade.load`.
        copies: Alterations, each for one copy of the first model.
        unmeasured: Sources of models of which only the configuration is read.
        config_only: Measure no model.

    Raises:
        UsageError: There are fewer than two models or too many, or copies are requested of a model
            that is not measured.
    """
    found = [
        Candidate(source, measured=not (config_only or lacks_weights(source))) for source in models
    ]
    if copies and not (found and found[0].measured):
        raise UsageError(
            "--copy alters the weights of the first model, which is not measured; leave out --copy"
        )
    found[1:1] = [replace(found[0], alteration=how) for how in copies]
    found += [Candidate(source, measured=False) for source in unmeasured]
    if len(found) < 2:
        raise UsageError(
            f"expected at least two models, got {len(found)}; name another one, or add a copy of "
            "the first with --copy int8"
        )
    if len(found) > MOST_MODELS:
        raise UsageError(
            f"expected at most {MOST_MODELS} models, got {len(found)}; compare the others in "
            "another run"
        )
    return found


class SameText:
    """Read the same records of a corpus with each model's tokenizer.

    The token limit applies to the first model. Another tokenizer produces more or fewer tokens and
    reads the same records completely. If the corpus is one long document, every model reads the
    same number of tokens instead.

    Args:
        source: Corpus, as for `cascade.load_blocks`.
        max_tokens: Maximum number of tokens of the first model.
        options: Other options of `cascade.load_blocks`.
    """

    def __init__(self, source: str, *, max_tokens: int | None = None, **options: Any) -> None:
        self._source = source
        self._options = options
        self._max_tokens = max_tokens
        self._first: tuple[str | None, TokenBlocks] | None = None

    def blocks(self, stack: DecoderStack) -> TokenBlocks:
        """Return the text, tokenized for a model.

        Raises:
            CorpusError: See `cascade.load_blocks`.
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
    """A measured model: its profile and its sizes.

    Attributes:
        profile: Profile over the corpus of the comparison.
        sizes: Sizes of the model.
    """

    profile: SaturationProfile
    sizes: Sizes

    @cached_property
    def record(self) -> ProfileRecord:
        """The record of the profile."""
        return from_plain(to_plain(self.profile.record()), ProfileRecord)

    @property
    def name(self) -> str:
        """Name of the model."""
        return known(self.record.provenance.model.name) or "model"


@dataclass(frozen=True)
class UnmeasuredModel:
    """A model of which only the configuration is known.

    Attributes:
        configuration: Configuration of the model.
        sizes: Sizes computed from the configuration.
    """

    configuration: Configuration
    sizes: Sizes

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.configuration.name


def measure_model(
    stack: DecoderStack,
    blocks: TokenBlocks,
    *,
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> MeasuredModel:
    """Measure a model for a comparison. The result holds no reference to the model.

    Args:
        stack: The model.
        blocks: Corpus, read with the model's tokenizer.
        batch_size: Sequences per forward pass.
        progress: Called with the number of tokens processed since the last call.

    Raises:
        CorpusError: A sequence exceeds the model's positions, or a token its vocabulary.
        ModelError: A layer's output is NaN. The message names the layer.

    Example:
        >>> from cascade import load, load_blocks, measure_model
        >>> stack = load("smollm2-135m")
        >>> text = load_blocks("embedded", stack.tokenizer, max_tokens=256)
        >>> measured = measure_model(stack, text)
        >>> measured.name, measured.sizes.num_layers
        ('smollm2-135m-instruct-q4_1', 30)
    """
    sizes = sizes_of(stack.model.config, int(blocks.ids.shape[1]))
    profile = analyze(stack, blocks, batch_size=batch_size, progress=progress)
    return MeasuredModel(profile, sizes)


def describe_model(source: str, seq_len: int) -> UnmeasuredModel:
    """Describe a model by its configuration, without its weights.

    Args:
        source: Source of the model, as for `cascade.load`. A folder needs only its config.json.
        seq_len: Tokens per sequence for counting operations.

    Raises:
        ModelError: The configuration is missing or cannot be read.
        UnsupportedModelError: The configuration describes a model that cannot be measured.
    """
    configuration = read_configuration(source)
    return UnmeasuredModel(configuration, sizes_of(configuration.config, seq_len))

"""A profile and evaluations that are measured on first use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pytest

from cascade.core.defaults import EVALUATED_TOKENS, GATED_TOKENS, SEQ_LEN
from cascade.core.errors import CascadeError, RecordError
from cascade.core.printable import printable
from cascade.core.schema import known
from cascade.evaluation.records import EvaluationRecord
from cascade.plugin.settings import Settings

if TYPE_CHECKING:
    from cascade.core.arrays import Array
    from cascade.core.provenance import CorpusProvenance, Provenance
    from cascade.corpora.blocks import TokenBlocks
    from cascade.evaluation.lossless.records import LosslessFigures
    from cascade.exits.fitted_heads import FittedHeads
    from cascade.gate.baselines import StoredProfile
    from cascade.gate.quick_gate import Gate
    from cascade.gate.records import BudgetGroup, BudgetsRecord, Overrun
    from cascade.models.stack import DecoderStack
    from cascade.saturation.profile import SaturationProfile
    from cascade.saturation.records import NoiseFloor, ProfileRecord
    from cascade.stats.sequence_rows import Rows
    from cascade.stats.similarity_statistics import SimilarityStatistics


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Fail a test with one line and no traceback on an error that the user can correct."""
    try:
        yield
    except CascadeError as error:
        line = " ".join(str(error).splitlines())
        # As `pytest.fail` does, but without the original error.
        raise pytest.fail.Exception(printable(line, keep="\n"), pytrace=False) from None


@dataclass(frozen=True)
class ModelUnderTest:
    """The model of the fixture `cascade_model`, loaded on first use.

    Attributes:
        load: Returns the model; repeated calls return the same one.
        source: The source that `load` reads; None if the project overrides the fixture.
    """

    load: Callable[[], DecoderStack]
    source: str | None

    @property
    def stack(self) -> DecoderStack:
        """The loaded model."""
        return self.load()

    @property
    def name(self) -> str | None:
        """The name that baselines know the model by."""
        from cascade.models.checkpoints.weights import is_missing_path, model_name

        if self.source is not None and not is_missing_path(self.source):
            return model_name(self.source)
        return known(self.stack.provenance.name)


def missing_line(path: Path, settings: Settings, layer: int | str = "LAYER") -> str:
    """Return an error line for a missing baseline, with the commands that create it."""
    create = create_command(path, settings, layer)
    return f"no baseline {settings.name_of(path)}; create it with {create}"


def create_command(path: Path, settings: Settings, layer: int | str = "LAYER") -> str:
    """Return the command lines that create a baseline, joined by `and`."""
    if path.name.endswith(".budgets.json"):
        point = f"{settings.exit_layer or layer}:cosine:THRESHOLD"
        made = settings.command("evaluate", "--only-points", "--point", point, "--output", "RUN")
    else:
        made = settings.command("analyze", "--output", "RUN")
    return f"`{made}` and `{settings.accept_command()}`"


# --- Profiles --------------------------------------------------------------------------------


class _Reading:
    """The stored baseline, its corpus, and the gates that compared with it."""

    def __init__(self, model: ModelUnderTest, settings: Settings, command: str) -> None:
        self.model = model
        self.settings = settings
        self.command = command
        self._gates: dict[tuple[int, bool], Gate] = {}
        self._blocks: dict[bool, TokenBlocks] = {}

    @cached_property
    def path(self) -> Path:
        """The path of the baseline."""
        from cascade.corpora.blocks import corpus_name

        corpus = corpus_name(self.settings.corpus, split=self.settings.split)
        return self.settings.find_baseline(
            "saturation", model=self.model.name, corpus=corpus, source=self.model.source
        )

    @cached_property
    def baseline(self) -> StoredProfile:
        """The stored profile."""
        from cascade.gate.baselines import read_profile

        return read_profile(self.path)

    def blocks(self, *, full: bool) -> TokenBlocks:
        """Return the part of the corpus that the baseline was measured on.

        Args:
            full: Read all of a large corpus, not only its beginning.
        """
        from cascade.gate.baseline_corpus import baseline_blocks

        full = full or self._about.tokens <= GATED_TOKENS
        if full not in self._blocks:
            given, tokenizer = self.settings.given_corpus(), self.model.stack.tokenizer
            self._blocks[full] = baseline_blocks(self._about, tokenizer, given, quick=not full)
        return self._blocks[full]

    @property
    def _about(self) -> CorpusProvenance:
        return self.baseline.record().provenance.corpus

    def gate(self, *, tokens: int, full: bool) -> Gate:
        """Compare the model with the baseline; repeated calls return the same gate."""
        from cascade.gate.quick_gate import run_gate

        key = (0 if full else tokens, full)
        if key not in self._gates:
            baseline = self.baseline  # before the model is loaded, which takes longer
            self._gates[key] = run_gate(
                self.model.stack,
                self.blocks(full=full),
                baseline,
                tokens=tokens,
                full=full,
                decoding=not self.settings.prefill_only,
                long_context=not self.settings.no_long_context,
                conflicts=tuple(self.settings.given_corpus().conflicts(self._about)),
                command=self.command,
            )
        return self._gates[key]

    @cached_property
    def profile(self) -> SaturationProfile:
        """The model's profile of the baseline's sequences."""
        from cascade.core.run_folder import is_stored
        from cascade.gate.quick_gate import quick_blocks
        from cascade.saturation.profile import analyze

        with one_line():
            if not is_stored(self.path):
                raise RecordError(missing_line(self.path, self.settings))
            settings = self.settings
            blocks = self.blocks(full=settings.full)
            # Reuse the gate's measurement if it neither stopped early nor was not comparable.
            done = self.gate(tokens=settings.tokens, full=settings.full).profile
            if not settings.full:
                few = quick_blocks(blocks, self.baseline, settings.tokens)
                blocks = few if len(few.ids) else blocks
            if done is not None and len(done.sequence_fingerprints) == len(blocks.ids):
                return done
            edges = self.baseline.arrays()["edges"]
            # The edges fit only a model of the same depth.
            same = len(edges) == len(self.model.stack.layer_labels)
            return analyze(
                self.model.stack, blocks, edges=edges if same else None, command=self.command
            )


class MeasuredProfile:
    """The model's profile of its baseline's sequences, measured on first use.

    It can be used like a `SaturationProfile`. `saturation_baseline.check` measures only as many
    tokens as it needs. By default the profile covers the sequences of the quick gate's budget, and
    with `--cascade-full` all sequences.

    Args:
        model: The model.
        settings: The settings of the session.
        command: The user's command line, for the provenance.
    """

    def __init__(self, model: ModelUnderTest, settings: Settings, command: str) -> None:
        self.model = model
        self.settings = settings
        self.command = command
        self._reading = _Reading(model, settings, command)

    @property
    def path(self) -> Path:
        """Where its baseline is stored."""
        return self._reading.path

    def gate(self, *, tokens: int, full: bool) -> Gate:
        """Compare the model with the baseline; repeated calls return the same gate.

        Args:
            tokens: The budget of the quick gate.
            full: Measure the whole corpus.

        Raises:
            CascadeError: The baseline or the corpus cannot be read, or a state is not finite.
        """
        return self._reading.gate(tokens=tokens, full=full)

    def whole(self, before: StoredProfile | None) -> SaturationProfile:
        """Measure the whole corpus, for a new baseline.

        Args:
            before: The previous baseline, if any.

        Raises:
            CascadeError: The corpus cannot be read, or a state is not finite.
        """
        from cascade.corpora.blocks import load_blocks
        from cascade.corpora.reading import CorpusReading
        from cascade.gate.remeasuring import measure_whole

        given = replace(self.settings.given_corpus(), num_samples=self.settings.num_samples)
        long = None if before is None else known(before.record().long_context)
        if before is None:
            reading = given.over(CorpusReading())
        else:
            reading = given.over(CorpusReading.again(before.record().provenance.corpus))
        stack = self.model.stack
        blocks = load_blocks(self.settings.corpus, stack.tokenizer, **reading.options())
        # As long as before; else by default, unless they are not checked anyway.
        length = 0 if self.settings.no_long_context else None
        if long is not None and long.sequences:
            length = long.length
        return measure_whole(stack, blocks, long_context=length, command=self.command)

    def forget(self) -> None:
        """Discard all results, because the baseline has changed."""
        self._reading = _Reading(self.model, self.settings, self.command)

    # The interface of `SaturationProfile`.

    @property
    def statistics(self) -> SimilarityStatistics:
        """One row per layer label."""
        return self._reading.profile.statistics

    @property
    def sequence_fingerprints(self) -> Array:
        """`[S]` fingerprints of the measured sequences."""
        return self._reading.profile.sequence_fingerprints

    @property
    def provenance(self) -> Provenance:
        """Model, corpus, machine, versions and command."""
        return self._reading.profile.provenance

    @property
    def noise(self) -> NoiseFloor | None:
        """How far rounding alone moves a sequence; None if not measured."""
        return self._reading.profile.noise

    def record(self) -> ProfileRecord:
        """Return the record: provenance and tables."""
        return self._reading.profile.record()

    def arrays(self) -> dict[str, Array]:
        """Return the state of the statistics of all tokens."""
        return self._reading.profile.arrays()

    @property
    def rows(self) -> Rows:
        """One row per sequence and layer."""
        return self._reading.profile.rows


# --- Evaluations -----------------------------------------------------------------------------


class MeasuredEvaluations(Sequence[EvaluationRecord]):
    """Evaluations of the stored operating points, one per group of budgets, measured on first use.

    Args:
        model: The model.
        settings: The settings of the session.
    """

    def __init__(self, model: ModelUnderTest, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self._budgets: BudgetsRecord | None = None
        self._done: dict[int, EvaluationRecord] = {}
        self._lossless: LosslessFigures | None = None

    @cached_property
    def path(self) -> Path:
        """The path of the budgets."""
        from cascade.corpora.blocks import corpus_name

        corpus = f"{corpus_name(self.settings.corpus, split=self.split)}-confirm"
        return self.settings.find_baseline(
            "budgets", model=self.model.name, corpus=corpus, source=self.model.source
        )

    @property
    def split(self) -> str | None:
        """The split; for the embedded corpus, the held-out split that no heads were fitted on."""
        return self.settings.split or ("held-out" if self.settings.corpus == "embedded" else None)

    @property
    def budgets(self) -> BudgetsRecord:
        """The stored budgets."""
        from cascade.gate.budgets import read_budgets

        if self._budgets is None:
            self._budgets = read_budgets(self.path)
        return self._budgets

    @property
    def groups(self) -> list[BudgetGroup]:
        """The stored groups of operating points."""
        return self.budgets.groups

    def __len__(self) -> int:
        with one_line():
            return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> EvaluationRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[EvaluationRecord]: ...
    def __getitem__(self, index: Any) -> Any:
        """Return the evaluation of one group, or of several."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        with one_line():
            return self.of(range(len(self.groups))[index])

    def of(self, number: int) -> EvaluationRecord:
        """Evaluate one group's operating points; repeated calls return the same evaluation.

        Raises:
            CascadeError: The corpus or the heads cannot be read.
        """
        from cascade.gate.remeasuring import rerun

        if number not in self._done:
            group = self.groups[number]
            blocks, heads = self._blocks(group), self._heads(group)
            self._done[number] = rerun(self.model.stack, group, blocks, heads=heads)
        return self._done[number]

    def lossless(self) -> LosslessFigures | None:
        """Decode the prompts of the budget of lossless decoding; None if none is stored.

        Repeated calls return the same figures.

        Raises:
            CascadeError: The corpus cannot be read, or has changed.
        """
        from cascade.gate.lossless_budgets import decode_again

        budget = known(self.budgets.lossless)
        if self._lossless is None and budget is not None and self.groups:
            blocks = self._blocks(self.groups[0])  # all groups have the same corpus
            self._lossless = decode_again(self.model.stack, budget, blocks)
        return self._lossless

    def generating_differs(self, number: int, group: BudgetGroup) -> list[Overrun]:
        """Return the operating points of one group at which generating differs from scoring.

        Nothing is checked if the session checks no decoding.

        Args:
            number: The number of the stored group.
            group: The same group, with the points to check.

        Raises:
            CascadeError: The corpus or the heads cannot be read.
        """
        from cascade.gate.remeasuring import generating_differs

        if self.settings.prefill_only:
            return []
        stored = self.groups[number]
        blocks, heads = self._blocks(stored), self._heads(stored)
        return generating_differs(self.model.stack, group, blocks, heads=heads)

    def _heads(self, group: BudgetGroup) -> FittedHeads | None:
        """Return the heads of a group of budgets."""
        from cascade.gate.remeasuring import find_heads

        fingerprint = group.provenance.heads_fingerprint
        return find_heads(self.path.parent, fingerprint, self.model.stack)

    def _blocks(self, group: BudgetGroup) -> TokenBlocks:
        """Return the corpus of a group of budgets."""
        from cascade.gate.remeasuring import group_blocks

        # Budgets keep their own length of sequences, whatever that of profiles is.
        given = replace(self.settings.given_corpus(), seq_len=None)
        if known(group.provenance.corpus.split) is None:
            given = replace(given, split=self.split)
        return group_blocks(self.model.stack, group, given)

    def first(self) -> EvaluationRecord:
        """Evaluate the default operating points (see `first_points`), if no budgets are stored.

        As `cascade evaluate` does, this also measures lossless decoding.

        Raises:
            CascadeError: The corpus cannot be read, or the model has no such layer.
        """
        from cascade.corpora.blocks import load_blocks
        from cascade.corpora.reading import CorpusReading
        from cascade.evaluation.exit_evaluation import split
        from cascade.evaluation.lossless.comparison import compare_with_lossless
        from cascade.gate.remeasuring import PointsConfig, evaluate_points, first_points

        stack = self.model.stack
        seq_len = self.settings.seq_len or SEQ_LEN
        reading = CorpusReading(num_samples=None, max_tokens=max(EVALUATED_TOKENS, seq_len))
        given = replace(self.settings.given_corpus(), split=self.split)
        blocks = load_blocks(self.settings.corpus, stack.tokenizer, **given.over(reading).options())
        points = first_points(stack, blocks, self.settings.exit_layer)
        named = [f"{point.layer}:{point.rule}:{point.threshold:g}" for point in points]
        options = ["--only-points", *(word for text in named for word in ("--point", text))]
        config = PointsConfig(command=self.settings.command("evaluate", *options))
        record = evaluate_points(stack, points, blocks, config=config)
        return compare_with_lossless(record, stack, split(blocks)[1])

    def forget(self) -> None:
        """Discard all results, because the budgets have changed."""
        self._done.clear()
        self._budgets = self._lossless = None

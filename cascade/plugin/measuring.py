"""A profile and evaluations that are measured when something is asked of them, no sooner."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cascade.core.errors import CascadeError, RecordError
from cascade.plugin.settings import Settings, shown

if TYPE_CHECKING:
    from cascade.core.provenance import Provenance
    from cascade.corpora.blocks import TokenBlocks
    from cascade.gate.baselines import StoredProfile
    from cascade.gate.quick_gate import Gate
    from cascade.models.stack import DecoderStack
    from cascade.saturation.profile import SaturationProfile
    from cascade.saturation.records import NoiseFloor, ProfileRecord
    from cascade.stats.similarity_statistics import SimilarityStatistics

Record = dict[str, Any]

#: What a new baseline is made of where nobody says: as `cascade analyze` and `evaluate`.
_EVALUATED_TOKENS = 8192
_SEQ_LEN = 128
_NUM_SAMPLES = 500


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Let a test fail with the line of what a user can put right, without a traceback."""
    try:
        yield
    except CascadeError as error:
        line = " ".join(str(error).splitlines())
        # As `pytest.fail` does, but without the error that it was made of.
        raise pytest.fail.Exception(line, pytrace=False) from None


def missing_line(path: Path, settings: Settings, layer: int | str = "LAYER") -> str:
    """Say that a baseline is not there, and which commands make it."""
    return f"no baseline {shown(path)}; make one with {make_command(path, settings, layer)}"


def make_command(path: Path, settings: Settings, layer: int | str = "LAYER") -> str:
    """Return the command lines that make a baseline, in words."""
    if path.name.endswith(".budgets.json"):
        point = f"{settings.exit_layer or layer}:cosine:THRESHOLD"
        made = settings.command("evaluate", "--only-points", "--point", point, "--output", "RUN")
    else:
        made = settings.command("analyze", "--output", "RUN")
    return f"`{made}` and `{settings.accept_command()}`"


@dataclass
class MeasuredProfile:
    """The model's profile of its baseline's sequences, measured when something is asked of it.

    It can be used as a `SaturationProfile`; `saturation_baseline.check` takes it without measuring
    more than decides. By default it holds as many sequences as the quick gate takes at most, with
    `--cascade-full` all of them.

    Attributes:
        stack: The model.
        settings: Of the session.
        said: What the user ran, for the provenance.
    """

    stack: DecoderStack
    settings: Settings
    said: str

    def __post_init__(self) -> None:
        self._gates: dict[tuple[int, bool], Gate] = {}

    @cached_property
    def path(self) -> Path:
        """Where its baseline is stored."""
        from cascade.corpora.blocks import corpus_name
        from cascade.gate.baselines import baseline_paths

        corpus = corpus_name(self.settings.corpus, split=self.settings.split)
        names = {"model": {"name": self.stack.provenance.get("name")}, "corpus": {"name": corpus}}
        about = {"kind": "saturation", "provenance": names}
        return baseline_paths(self.settings.baselines, about)[0]

    @cached_property
    def baseline(self) -> StoredProfile:
        """The stored profile."""
        from cascade.gate.baselines import read_profile

        return read_profile(self.path)

    @cached_property
    def blocks(self) -> TokenBlocks:
        """The baseline's corpus, as much of it as the baseline saw."""
        about = self.baseline.record()["provenance"]["corpus"]
        return self._read(about["seq_len"], about["records"], about["tokens"])

    def _read(self, seq_len: int, records: int | None, tokens: int | None) -> TokenBlocks:
        from cascade.corpora.blocks import load_blocks

        settings = self.settings
        seq_len = settings.seq_len or seq_len
        return load_blocks(
            settings.corpus,
            self.stack.tokenizer,
            seq_len=seq_len,
            num_samples=records,
            max_tokens=None if tokens is None else max(tokens, seq_len),
            split=settings.split,
            text_column=settings.text_column,
        )

    def gate(self, *, tokens: int, full: bool) -> Gate:
        """Hold the model to the baseline; asked again, it says the same without measuring.

        Args:
            tokens: The budget of the quick gate.
            full: Measure the whole corpus.

        Raises:
            CascadeError: The baseline or the corpus cannot be read, or a state is not finite.
        """
        from cascade.gate.quick_gate import run_gate

        key = (0 if full else tokens, full)
        if key not in self._gates:
            self._gates[key] = run_gate(
                self.stack,
                self.blocks,
                self.baseline,
                tokens=tokens,
                full=full,
                command=self.said,
            )
        return self._gates[key]

    def whole(self, before: StoredProfile | None) -> SaturationProfile:
        """Measure the whole corpus, as a baseline is made.

        Args:
            before: The baseline that it may replace.

        Raises:
            CascadeError: The corpus cannot be read, or a state is not finite.
        """
        from cascade.gate.renewal import measure_whole

        about = {} if before is None else before.record()["provenance"]["corpus"]
        records = self.settings.num_samples
        if records is None:
            records = max(_NUM_SAMPLES, about.get("records", 0))
        blocks = self._read(about.get("seq_len", _SEQ_LEN), records or None, None)
        return measure_whole(self.stack, blocks, command=self.said)

    def forget(self) -> None:
        """Read and measure anew when asked again: the baseline is another one now."""
        self._gates.clear()
        for name in ("baseline", "blocks", "_profile"):
            self.__dict__.pop(name, None)

    # As a SaturationProfile.

    @cached_property
    def _profile(self) -> SaturationProfile:
        from cascade.gate.quick_gate import quick_blocks
        from cascade.saturation.profile import analyze

        with one_line():
            if not self.path.exists():
                raise RecordError(missing_line(self.path, self.settings))
            blocks, settings = self.blocks, self.settings
            # The gate's own measurement, where it neither stopped early nor refused to compare.
            done = self.gate(tokens=settings.tokens, full=settings.full).profile
            if not settings.full:
                few = quick_blocks(blocks, self.baseline, settings.tokens)
                blocks = few if len(few.ids) else blocks
            if done is not None and len(done.sequence_fingerprints) == len(blocks.ids):
                return done
            edges = self.baseline.arrays()["edges"]
            # Those of a model of another depth are nothing to count against.
            same = len(edges) == len(self.stack.layer_labels)
            return analyze(self.stack, blocks, edges=edges if same else None, command=self.said)

    @property
    def statistics(self) -> SimilarityStatistics:
        """One row per layer label."""
        return self._profile.statistics

    @property
    def sequence_fingerprints(self) -> Any:
        """`[S]`, which sequences were seen."""
        return self._profile.sequence_fingerprints

    @property
    def provenance(self) -> Provenance:
        """Model, corpus, machine, versions and command."""
        return self._profile.provenance

    @property
    def noise(self) -> NoiseFloor | None:
        """How far arithmetic alone moves a sequence, where measured."""
        return self._profile.noise

    def record(self) -> ProfileRecord:
        """Return the record: provenance and tables."""
        return self._profile.record()

    def arrays(self) -> dict[str, Any]:
        """Return the statistics' whole state."""
        return self._profile.arrays()


class MeasuredEvaluations(Sequence[Record]):
    """Evaluations of the stored points, one per group of budgets, measured when asked for.

    Args:
        stack: The model.
        settings: Of the session.
    """

    def __init__(self, stack: DecoderStack, settings: Settings) -> None:
        self.stack = stack
        self.settings = settings
        self._done: dict[int, Record] = {}

    @cached_property
    def path(self) -> Path:
        """Where the budgets are stored."""
        from cascade.corpora.blocks import corpus_name
        from cascade.gate.baselines import baseline_paths

        corpus = f"{corpus_name(self.settings.corpus, split=self.split)}-confirm"
        names = {"model": {"name": self.stack.provenance.get("name")}, "corpus": {"name": corpus}}
        about = {"kind": "budgets", "provenance": names}
        return baseline_paths(self.settings.baselines, about)[0]

    @property
    def split(self) -> str | None:
        """The split: of the embedded corpus the one that no heads were fitted on."""
        return self.settings.split or ("held-out" if self.settings.corpus == "embedded" else None)

    @cached_property
    def groups(self) -> list[Record]:
        """The stored groups of points."""
        from cascade.gate.remeasuring import read_groups

        return read_groups(self.path)

    def __len__(self) -> int:
        with one_line():
            return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        """Return the evaluation of one group, or of several."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        with one_line():
            return self.of(range(len(self.groups))[index])

    def of(self, number: int) -> Record:
        """Evaluate one group's points; asked again, return what was measured.

        Raises:
            CascadeError: The corpus or the heads cannot be read.
        """
        from cascade.gate.remeasuring import find_heads, group_blocks, rerun

        if number not in self._done:
            group = self.groups[number]
            heads = find_heads(
                self.path.parent, group["provenance"].get("heads_fingerprint"), self.stack
            )
            blocks = group_blocks(
                self.stack,
                group,
                self.settings.corpus,
                part=self.split,
                text_column=self.settings.text_column,
            )
            self._done[number] = rerun(self.stack, group, blocks, heads=heads)
        return self._done[number]

    def first(self) -> Record:
        """Evaluate points to budget where none are stored: the study's way, at one exit layer.

        Raises:
            CascadeError: The corpus cannot be read, or the model has no such layer.
        """
        from cascade.corpora.blocks import load_blocks
        from cascade.gate.remeasuring import evaluate_points, first_points

        blocks = load_blocks(
            self.settings.corpus,
            self.stack.tokenizer,
            seq_len=self.settings.seq_len or _SEQ_LEN,
            num_samples=None,
            max_tokens=_EVALUATED_TOKENS,
            split=self.split,
            text_column=self.settings.text_column,
        )
        points = first_points(self.stack, blocks, self.settings.exit_layer)
        given = [f"{point.layer}:{point.rule}:{point.threshold:g}" for point in points]
        options = ["--only-points", *(part for text in given for part in ("--point", text))]
        command = self.settings.command("evaluate", *options)
        return evaluate_points(self.stack, points, blocks, command=command)

    def forget(self) -> None:
        """Read and measure anew when asked again: the budgets are others now."""
        self._done.clear()
        self.__dict__.pop("groups", None)

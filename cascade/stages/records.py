"""Records of stages: training provenance, saved cascades and evaluations of cascades."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

from msgspec import field

from cascade.core.display import Displayed, origin_of
from cascade.core.formatting import ratio_words
from cascade.core.provenance import CorpusProvenance, MachineProvenance, Provenance, Split
from cascade.core.schema import (
    UNSET,
    Count,
    FileName,
    Finite,
    Index,
    Interval,
    Part,
    Share,
    StoredRecord,
    Text,
    UnsetType,
    known,
)
from cascade.models.counts import CountsRecord
from cascade.stages.hard_tokens.records import SplitCounts
from cascade.stages.training_config import Start, TrainingConfig
from cascade.stats.perplexity import as_ratio, perplexity

# --- How a stage was trained -----------------------------------------------------------------


class StageBase(Part, frozen=True, kw_only=True):
    """The base model that a stage was trained for. Unknown values are null or absent."""

    name: str | UnsetType | None = UNSET
    weights_hash: str | UnsetType | None = UNSET
    tokenizer_hash: str | UnsetType | None = UNSET
    vocab_size: Count | UnsetType | None = UNSET


class StageTokens(Part, frozen=True, kw_only=True):
    """The hard tokens that a stage was trained on.

    Attributes:
        layer: Exit layer whose similarity decides which tokens are hard.
        threshold: A token with a similarity below this value is hard.
        splits: Sequence and token counts of each split.
        corpora: Text of each split.
    """

    layer: Count
    threshold: Finite
    splits: dict[Split, SplitCounts] = field(name="parts")
    corpora: dict[Split, CorpusProvenance]


class HeldOutEvaluation(Part, frozen=True, kw_only=True):
    """One evaluation on the held-out split during training.

    Each figure is the perplexity of the cascade divided by the perplexity without the stage, over
    the tokens of one scope. A scope without tokens is absent. A ratio beyond e^700, which no number
    holds, is null.

    Attributes:
        step: Number of training steps before this evaluation.
        nats: The logarithms of the figures by scope: differences of losses in nats per token.
            Absent in records of earlier releases.
        all: Ratio over all tokens.
        hard: Ratio over tokens that enter the stage.
        response: Ratio over response text.
        hard_response: Ratio over response text that enters the stage.
    """

    step: Index
    all: Finite | None
    hard: Finite | UnsetType | None = UNSET
    response: Finite | UnsetType | None = UNSET
    hard_response: Finite | UnsetType | None = UNSET
    nats: dict[str, Finite] | UnsetType = UNSET

    @classmethod
    def of(cls, step: int, nats: Mapping[str, float]) -> HeldOutEvaluation:
        """Return the evaluation with these differences of losses by scope, in nats per token."""
        ratios = {scope: perplexity(difference) for scope, difference in nats.items()}
        return cls(step=step, nats=dict(nats), **ratios)

    @property
    def ratios(self) -> dict[str, float | None]:
        """The figures by scope, without absent ones."""
        figures = {
            "all": self.all,
            "hard": self.hard,
            "response": self.response,
            "hard_response": self.hard_response,
        }
        return {scope: ratio for scope, ratio in figures.items() if ratio is not UNSET}

    @property
    def worst(self) -> float:
        """The figure that selects a stage: the larger ratio of all text and response text.

        It is 0 or infinite where no number holds it.
        """
        nats = known(self.nats) or {}
        return max(
            as_ratio(nats.get(scope, math.inf)) if ratio is None else ratio
            for scope, ratio in self.ratios.items()
            if scope in ("all", "response")
        )

    def words(self, scope: str) -> str:
        """Return a figure with four digits, or its difference in nats per token."""
        return ratio_words(self.ratios[scope], (known(self.nats) or {}).get(scope), 4)


class StageProvenance(Part, frozen=True, kw_only=True):
    """How a stage was trained, as far as known. All fields are absent for an untrained stage."""

    base: StageBase | UnsetType = UNSET
    tokens: StageTokens | UnsetType = UNSET
    config: TrainingConfig | UnsetType = field(default=UNSET, name="recipe")
    steps: Index | UnsetType = UNSET
    chosen_step: Index | UnsetType = UNSET
    perplexities_without: dict[str, Finite | None] | UnsetType = UNSET
    nats_without: dict[str, Finite] | UnsetType = UNSET
    evaluations: list[HeldOutEvaluation] | UnsetType = field(default=UNSET, name="looks")
    machine: MachineProvenance | UnsetType = UNSET


class TrainingProvenance(StageProvenance, frozen=True, kw_only=True):
    """How `train_stage` trained a stage.

    Attributes:
        base: Base model.
        tokens: Hard tokens that the stage was trained on.
        config: Training options.
        steps: Number of training steps.
        chosen_step: Step whose weights the stage has.
        perplexities_without: Held-out perplexity without the stage, by scope; null above e^700.
        nats_without: The losses in nats per token; absent in records of earlier releases.
        evaluations: All evaluations on the held-out split, including the one before the first step.
        machine: Machine that trained the stage.
    """

    base: StageBase
    tokens: StageTokens
    config: TrainingConfig = field(name="recipe")
    steps: Index
    chosen_step: Index
    perplexities_without: dict[str, Finite | None]
    nats_without: dict[str, Finite] | UnsetType = UNSET
    evaluations: list[HeldOutEvaluation] = field(name="looks")
    machine: MachineProvenance


# --- A saved cascade -------------------------------------------------------------------------


class CascadeBase(Part, frozen=True, kw_only=True):
    """The base model of a cascade."""

    source: Text | None = None
    name: str | None = None
    revision: str | None = None
    family: str | None = None
    weights_hash: Text
    tokenizer_hash: Text | None = None
    num_layers: Count
    hidden_size: Count
    vocab_size: Count


class EntryRecord(Part, frozen=True, kw_only=True):
    """The entry of a stage: the exit that easy tokens take below it.

    Attributes:
        layer: Exit layer of the model below the stage.
        rule: Name of the exit rule.
        threshold: Tokens with a confidence at or above this value exit. Infinities are strings in
            JSON.
        heads: File of fitted heads, if easy tokens exit through one.
        heads_sha256: Hash of that file; absent in cascades of earlier releases.
    """

    layer: Count
    rule: Text
    threshold: Finite | Literal["inf", "-inf"]
    heads: FileName | None = None
    heads_sha256: Text | UnsetType = UNSET


class StageRecord(Part, frozen=True, kw_only=True):
    """One stage of a cascade.

    Attributes:
        file: File of the stage's weights.
        num_layers: Number of layers.
        start: Initial weights of the layers: "copies" or "fresh".
        own_head: Whether the stage has a separate LM head.
        entry: Selects the tokens that enter the stage.
        provenance: How the stage was trained.
        sha256: Hash of the file; absent if the cascade was not saved.
    """

    file: FileName
    num_layers: Count
    start: Start
    own_head: bool
    entry: EntryRecord
    provenance: StageProvenance | None = None
    sha256: Text | UnsetType = UNSET


class CascadeProvenance(Part, frozen=True, kw_only=True):
    """The origin of a cascade."""

    command: str | UnsetType | None = UNSET


class CascadeRecord(StoredRecord, frozen=True, kw_only=True):
    """A cascade: the name and hash of its base, and its stages.

    Attributes:
        base: Base model.
        propagation: How a stage gets keys and values of easy tokens.
        stages: Stages, in order.
        provenance: Origin of the cascade.
    """

    KIND: ClassVar[str] = "cascade"
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "train --output"

    kind: Literal["cascade"] = "cascade"
    schema: int = SCHEMA
    base: CascadeBase
    propagation: Literal["frozen", "exact"]
    stages: list[StageRecord]
    provenance: CascadeProvenance | None = None


# --- An evaluation of a cascade --------------------------------------------------------------

#: The side of a comparison with the lower perplexity, at 95 % confidence.
Winner = Literal["cascade", "control", "neither"]


class ScopeFigures(Part, frozen=True, kw_only=True):
    """The figures of one variant over the tokens of one scope.

    Attributes:
        tokens: Number of predicted tokens.
        perplexity: Perplexity of the variant; null above e^700, which no number holds.
        accuracy: Share of tokens that the variant predicts correctly.
        ratio: Perplexity divided by that of the base; null beyond e^700.
        ratio_interval: 95 % interval of the ratio over resampled sequences; null if an end is
            beyond e^700.
        nats_per_token: Mean loss. Like the next two, absent in records of earlier releases.
        nats_difference: Mean loss minus that of the base, the logarithm of the ratio.
        nats_interval: Its 95 % interval.
    """

    tokens: Count
    perplexity: Finite | None
    accuracy: Share
    ratio: Finite | None
    ratio_interval: Interval | None
    nats_per_token: Finite | UnsetType = UNSET
    nats_difference: Finite | UnsetType = UNSET
    nats_interval: Interval | UnsetType = UNSET


class ExitShare(Part, frozen=True, kw_only=True):
    """The share of tokens that exit at a layer."""

    layer: Count
    share: Share


class StageWork(Part, frozen=True, kw_only=True):
    """The rows that a stage computed, summed over its layers.

    Attributes:
        layer_rows: Token rows that passed through a layer.
        key_value_rows: Token rows for which only keys and values were computed.
    """

    layer_rows: Index
    key_value_rows: Index


class VariantFigures(Part, frozen=True, kw_only=True):
    """One variant: the base, the cascade up to a stage, or a control.

    Attributes:
        name: For example "base", "stage 1", "cascade" or "trained on all".
        stages: Number of stages.
        trained_on: Tokens that the last stage was trained on; null for the base.
        entered_by: Tokens that enter the last stage; null for the base.
        scopes: Figures by scope. A scope without tokens is absent.
        exits: Share of tokens that exit at each layer.
        layers_per_token: Mean number of layers computed per token.
        operations_ratio: Floating-point operations divided by those of the base.
        stage_rows: Rows that each stage computed.
        counts: Counts of all computed rows.
    """

    name: str
    stages: Index
    trained_on: str | None
    entered_by: str | None
    scopes: dict[str, ScopeFigures]
    exits: list[ExitShare]
    layers_per_token: Finite
    operations_ratio: Finite
    stage_rows: list[StageWork]
    counts: CountsRecord


class PairedRatio(Part, frozen=True, kw_only=True):
    """The cascade's perplexity divided by a control's, with its 95 % interval.

    Attributes:
        ratio: The ratio; null beyond e^700, which no number holds.
        interval: Its 95 % interval; null if an end is beyond e^700.
        nats_difference: The logarithm of the ratio, in nats per token. Like the next one, absent in
            records of earlier releases.
        nats_interval: Its 95 % interval.
        wins: The side with the lower perplexity.
    """

    ratio: Finite | None
    interval: Interval | None
    nats_difference: Finite | UnsetType = UNSET
    nats_interval: Interval | UnsetType = UNSET
    wins: Winner


class ControlComparison(Part, frozen=True, kw_only=True):
    """A comparison of the cascade with one control.

    Attributes:
        control: Name of the control.
        trained_on: Tokens that the control's last stage was trained on.
        entered_by: Tokens that enter the control's last stage.
        all: Ratio over all tokens.
        response: Ratio over response text; absent if the text has none.
    """

    control: str
    trained_on: str | None
    entered_by: str | None
    all: PairedRatio | UnsetType = UNSET
    response: PairedRatio | UnsetType = UNSET


class CascadeVerdict(Part, frozen=True, kw_only=True):
    """The verdict on a cascade.

    Attributes:
        stage: A sentence on whether the stages help.
        helps: Whether the stages help, at 95 % confidence.
        routing: A sentence that compares routing hard tokens with routing random tokens; null
            without that control.
        training: A sentence that compares training on hard tokens only with training on all
            tokens; null without that control.
        earns_its_keep: Whether routing by hardness is better than random routing, at 95 %
            confidence; null without that control.
    """

    stage: str
    helps: bool
    routing: str | None
    training: str | None
    earns_its_keep: bool | None


class CascadeEvaluationRecord(Displayed, StoredRecord, frozen=True, kw_only=True):
    """A cascade measured on text, stage by stage, and compared with its controls.

    Attributes:
        provenance: Base model, text, machine, versions and command.
        cascade: The cascade.
        rows: Figures of every variant, the base first.
        comparisons: Comparisons of the cascade with each control.
        verdict: Whether the stages help and routing by hardness pays off.
    """

    KIND: ClassVar[str] = "cascade-evaluation"
    SCHEMA: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "evaluate --cascade"

    schema: int = SCHEMA
    kind: Literal["cascade-evaluation"] = "cascade-evaluation"
    provenance: Provenance
    cascade: CascadeRecord
    rows: list[VariantFigures]
    comparisons: list[ControlComparison]
    verdict: CascadeVerdict

    def _in_one_line(self) -> str:
        variants = f"{len(self.rows)} variants"
        return f"{origin_of(self.provenance)}, {variants}; {self.verdict.stage}"

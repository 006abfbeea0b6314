"""The records of stages: how one was trained, a saved cascade, and what a cascade is worth."""

from __future__ import annotations

from typing import ClassVar, Literal

from cascade.core.display import Displayed, origin_of
from cascade.core.provenance import CorpusProvenance, MachineProvenance, Provenance
from cascade.core.schema import (
    UNSET,
    Count,
    Finite,
    Index,
    Interval,
    Part,
    Share,
    StoredRecord,
    Text,
    UnsetType,
)
from cascade.models.counts import CountsRecord
from cascade.stages.hard_tokens.records import Split, SplitCounts
from cascade.stages.training_config import Start, TrainingConfig

# --- How a stage was trained -----------------------------------------------------------------


class StageBase(Part, frozen=True, kw_only=True):
    """The base model that a stage was trained for; a value that is not known is null or absent."""

    name: str | UnsetType | None = UNSET
    weights_hash: str | UnsetType | None = UNSET
    tokenizer_hash: str | UnsetType | None = UNSET
    vocab_size: Count | UnsetType | None = UNSET


class StageTokens(Part, frozen=True, kw_only=True):
    """The hard tokens that a stage was trained on.

    Attributes:
        layer: The exit layer whose similarity decides.
        threshold: A token whose similarity is below it is hard.
        parts: What each split holds.
        corpora: The text of each split.
    """

    layer: Count
    threshold: Finite
    parts: dict[Split, SplitCounts]
    corpora: dict[Split, CorpusProvenance]


class HeldOutEvaluation(Part, frozen=True, kw_only=True):
    """One evaluation on the held-out split during training.

    Each figure is the cascade's perplexity relative to that without the stage, over the tokens of
    one scope; a scope without tokens is absent.

    Attributes:
        step: After so many steps; 0 before the first.
        all: Over all tokens.
        hard: Over tokens that enter the stage.
        response: Over response text.
        hard_response: Over response text that enters the stage.
    """

    step: Index
    all: Finite
    hard: Finite | UnsetType = UNSET
    response: Finite | UnsetType = UNSET
    hard_response: Finite | UnsetType = UNSET

    @property
    def ratios(self) -> dict[str, float]:
        """The figures by scope, absent ones left out."""
        figures = {
            "all": self.all,
            "hard": self.hard,
            "response": self.response,
            "hard_response": self.hard_response,
        }
        return {scope: ratio for scope, ratio in figures.items() if ratio is not UNSET}

    @property
    def worst(self) -> float:
        """The figure that stages are chosen by: the larger of all text's and response text's."""
        return max(self.all, 0.0 if self.response is UNSET else self.response)


class StageProvenance(Part, frozen=True, kw_only=True):
    """How a stage was trained, as far as it is known; nothing of a stage that was not trained."""

    base: StageBase | UnsetType = UNSET
    tokens: StageTokens | UnsetType = UNSET
    recipe: TrainingConfig | UnsetType = UNSET
    steps: Index | UnsetType = UNSET
    chosen_step: Index | UnsetType = UNSET
    perplexities_without: dict[str, float] | UnsetType = UNSET
    looks: list[HeldOutEvaluation] | UnsetType = UNSET
    machine: MachineProvenance | UnsetType = UNSET


class TrainingProvenance(StageProvenance, frozen=True, kw_only=True):
    """How `train_stage` trained a stage.

    Attributes:
        base: The base model.
        tokens: The hard tokens.
        recipe: The options of training.
        steps: Steps made.
        chosen_step: The step whose weights the stage has.
        perplexities_without: Held-out perplexity without the stage, by scope.
        looks: Every evaluation on the held-out split, that before the first step included.
        machine: Where it was trained.
    """

    base: StageBase
    tokens: StageTokens
    recipe: TrainingConfig
    steps: Index
    chosen_step: Index
    perplexities_without: dict[str, float]
    looks: list[HeldOutEvaluation]
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
    """Which tokens enter a stage.

    Attributes:
        layer: The exit layer, of the model below the stage.
        rule: The exit rule.
        threshold: Tokens with a confidence at or above it exit; infinities are text in JSON.
        heads: The file of fitted heads, if easy tokens exit through one.
    """

    layer: Count
    rule: Text
    threshold: Finite | Literal["inf", "-inf"]
    heads: Text | None = None


class StageRecord(Part, frozen=True, kw_only=True):
    """One stage of a cascade.

    Attributes:
        file: Its weights.
        num_layers: Its layers.
        start: What they started from.
        own_head: Whether it has an LM head of its own.
        entry: Which tokens enter it.
        provenance: How it was trained.
        sha256: The hash of the file; absent where the cascade was not saved.
    """

    file: Text
    num_layers: Count
    start: Start
    own_head: bool
    entry: EntryRecord
    provenance: StageProvenance | None = None
    sha256: Text | UnsetType = UNSET


class CascadeProvenance(Part, frozen=True, kw_only=True):
    """Where a cascade comes from."""

    command: str | UnsetType | None = UNSET


class CascadeRecord(StoredRecord, frozen=True, kw_only=True):
    """A cascade: its base by name and hash, and its stages.

    Attributes:
        base: The base model.
        propagation: What a stage sees of easy tokens.
        stages: The stages, in order.
        provenance: Where it comes from.
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


# --- What a cascade is worth -----------------------------------------------------------------

#: Which side of a comparison has the lower perplexity, with 95 % confidence.
Winner = Literal["cascade", "control", "neither"]


class ScopeFigures(Part, frozen=True, kw_only=True):
    """The figures of one variant over the tokens of one scope.

    Attributes:
        tokens: Tokens that are predicted.
        perplexity: Of the variant.
        accuracy: The share of tokens that it predicts.
        ratio: Its perplexity relative to the base's.
        ratio_interval: The ratio's 95 % interval over resampled sequences.
    """

    tokens: Count
    perplexity: Finite
    accuracy: Share
    ratio: Finite
    ratio_interval: Interval


class ExitShare(Part, frozen=True, kw_only=True):
    """The share of tokens that exit at a layer."""

    layer: Count
    share: Share


class StageWork(Part, frozen=True, kw_only=True):
    """What a stage computed, summed over its layers.

    Attributes:
        layer_rows: Token rows that went through a layer.
        key_value_rows: Token rows of which only keys and values were computed.
    """

    layer_rows: Index
    key_value_rows: Index


class VariantFigures(Part, frozen=True, kw_only=True):
    """One variant: the base, the cascade up to a stage, or a control.

    Attributes:
        name: For example "base", "stage 1", "cascade" or "trained on all".
        stages: Its stages.
        trained_on: The tokens that its last stage was trained on; null for the base.
        entered_by: The tokens that enter its last stage; null for the base.
        scopes: Its figures by scope; a scope without tokens is absent.
        exits: The share of tokens that exit at each layer.
        layers_per_token: Layers computed per token, on average.
        operations_ratio: Floating-point operations relative to the base's.
        stage_rows: What each stage computed.
        counts: Everything that was computed.
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
    """The cascade's perplexity relative to a control's, with its 95 % interval."""

    ratio: Finite
    interval: Interval
    wins: Winner


class ControlComparison(Part, frozen=True, kw_only=True):
    """The cascade against one control; response text is absent where the text has none.

    Attributes:
        control: The control's name.
        trained_on: The tokens that its last stage was trained on.
        entered_by: The tokens that enter its last stage.
        all: Over all tokens.
        response: Over response text.
    """

    control: str
    trained_on: str | None
    entered_by: str | None
    all: PairedRatio | UnsetType = UNSET
    response: PairedRatio | UnsetType = UNSET


class CascadeVerdict(Part, frozen=True, kw_only=True):
    """What a cascade is worth, in words.

    Attributes:
        stage: Whether the stages help.
        helps: Whether they do with 95 % confidence.
        routing: Whether hard tokens are better than random ones; null without that control.
        training: Whether training on hard tokens alone is better than on all; null likewise.
        earns_its_keep: Whether routing by hardness wins; null without that control.
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
        rows: Every variant, the base first.
        comparisons: The cascade against each control.
        verdict: What it is worth.
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

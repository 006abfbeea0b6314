"""Records of drafters: where the texts are from, how they were trained, what is accepted."""

from __future__ import annotations

from typing import ClassVar, Literal

from cascade.core.provenance import MachineProvenance, ModelProvenance
from cascade.core.schema import Count, FileName, Index, Part, Positive, Share, StoredRecord
from cascade.drafters.config import DrafterConfig, Precision

#: Ways to draft: not at all; by lookup in the text and runner-ups; with the drafter's table in
#: addition; and with table and network.
Method = Literal["none", "lookup", "table", "table and network"]
METHODS: tuple[Method, ...] = ("none", "lookup", "table", "table and network")

#: Bins of a calibration, of equal width in 0..1.
BINS = 16


class PromptCorpus(Part, frozen=True, kw_only=True):
    """A corpus that prompts were taken from.

    Attributes:
        source: The corpus, as the user named it.
        text_column: The column that was read, if one was named.
        split: The split that was read, if one was named.
        config: The configuration that was read, if one was named.
        records: Records that were read.
        train: Prompts of the training split.
        held_out: Prompts of the held-out split.
        too_long: Prompts that were left out because they have too many tokens.
        fingerprint: SHA-256 over the prompts of both splits.
    """

    source: str
    text_column: str | None = None
    split: str | None = None
    config: str | None = None
    records: Index
    train: Index
    held_out: Index
    too_long: Index
    fingerprint: str


class TextsRequest(Part, frozen=True, kw_only=True):
    """Everything that determines the generated texts, except the code and how many there are.

    Attributes:
        model: The model that generates.
        corpora: The corpora of the prompts.
        feature_layers: The layers whose inputs are stored, 1..N.
        max_new_tokens: As in `DrafterConfig`, like the fields below.
    """

    model: ModelProvenance
    corpora: list[PromptCorpus]
    feature_layers: list[Count]
    max_new_tokens: Count
    longest_prompt: Count
    temperature: Positive
    own_instructions: Share
    batch_size: Count
    held_out_texts: Count
    seed: Index


class TextCounts(Part, frozen=True, kw_only=True):
    """How much text was generated.

    Attributes:
        texts: Number of texts.
        tokens: Generated tokens, without prompts.
        greedy: Share of texts that took the most likely token each time.
    """

    texts: Count
    tokens: Count
    greedy: Share


class DraftEvaluation(Part, frozen=True, kw_only=True):
    """Acceptance of chains of drafts on held-out texts.

    Attributes:
        step: Training steps before it.
        accepted: Share of drafts that the model accepts at each position of a chain, where all
            drafts before it were accepted.
        tokens_per_pass: Tokens per pass of the model, if the drafter alone drafts.
    """

    step: Index
    accepted: list[Share]
    tokens_per_pass: Positive


class MethodFigures(Part, frozen=True, kw_only=True):
    """What a way to draft gives on held-out prompts, decoded on the machine of the training.

    Attributes:
        method: The way to draft.
        tokens_per_pass: Tokens per pass of the model.
        milliseconds: Median milliseconds per new token, prompt included.
        speed: Median speed over the prompts, as a multiple of the speed without drafts.
    """

    method: Method
    tokens_per_pass: Positive
    milliseconds: Positive
    speed: Positive


class DrafterProvenance(Part, frozen=True, kw_only=True):
    """Where a drafter comes from.

    Attributes:
        model: The model that the drafter belongs to.
        corpora: The corpora of the prompts.
        machine: The machine that it was trained on.
        versions: Library versions.
        command: The command that the user ran; None from Python.
    """

    model: ModelProvenance
    corpora: list[PromptCorpus]
    machine: MachineProvenance
    versions: dict[str, str]
    command: str | None = None


class DrafterRecord(StoredRecord, frozen=True, kw_only=True):
    """The record of a drafter, next to its weights.

    Attributes:
        provenance: Where the drafter comes from.
        config: Options of the training.
        precision: How products were computed in training.
        feature_layers: The layers whose inputs the drafter reads, 1..N. It is a copy of the last.
        vocabulary: Number of tokens that it can propose, besides those of the prompt.
        ends: Tokens that end a text, all of them among these.
        texts: How much text it was trained on.
        held_out: How much held-out text the figures are from.
        coverage: Share of held-out tokens that are among the vocabulary.
        evaluations: Evaluations during training, on half of the held-out texts.
        chosen_step: The step whose weights were kept.
        accepted: Acceptance by position on the other half, as in `DraftEvaluation`.
        contexts: Contexts of the table of n-grams.
        calibration: Share of accepted drafts by the drafter's own probability in bins of equal
            width, at each position of a chain; it never decreases with the probability. From all
            held-out texts.
        methods: Ways to draft, compared on prompts of the other half.
        use: The fastest way.
        file: File of the weights, in the same folder.
        sha256: SHA-256 of that file.
    """

    KIND: ClassVar[str] = "drafter"
    COMMAND: ClassVar[str] = "train-drafter"

    schema: int = 1
    kind: Literal["drafter"] = "drafter"
    provenance: DrafterProvenance
    config: DrafterConfig
    precision: Precision
    feature_layers: list[Count]
    vocabulary: Count
    ends: list[Index]
    texts: TextCounts
    held_out: TextCounts
    coverage: Share
    evaluations: list[DraftEvaluation]
    chosen_step: Index
    accepted: list[Share]
    contexts: Index
    calibration: list[list[Share]]
    methods: list[MethodFigures]
    use: Method
    file: FileName
    sha256: str

    def inconsistency(self) -> str | None:
        """Describe the first entry that contradicts another one; None if none does."""
        layers = self.feature_layers
        if not layers or layers != sorted(set(layers)):
            return f"expected feature_layers in ascending order, got {layers}"
        if self.chosen_step not in {each.step for each in self.evaluations}:
            return f"expected an evaluation of chosen_step {self.chosen_step}, got none"
        if not self.calibration or any(len(bins) != BINS for bins in self.calibration):
            return f"expected {BINS} bins in each calibration, got another number"
        if self.use not in {each.method for each in self.methods}:
            return f"expected the figures of {self.use} in methods, got none"
        return None

    def chosen(self) -> DraftEvaluation:
        """Return the evaluation whose weights were kept."""
        return next(each for each in self.evaluations if each.step == self.chosen_step)

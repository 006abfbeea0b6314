"""Cascades: a base model and the stages that compute its hard tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.core.errors import ModelError, UsageError
from cascade.core.files import AnyPath
from cascade.core.provenance import CorpusProvenance
from cascade.core.schema import UNSET, known
from cascade.corpora.bos import check_same_bos
from cascade.decoding.early_exit import EarlyExit, Propagation, Score
from cascade.decoding.exit_support import check_exits
from cascade.decoding.forward import Exit, ForwardPass
from cascade.decoding.growing_text import Generation
from cascade.decoding.inputs import make_chunk
from cascade.models.flops import Counts
from cascade.models.loading import load
from cascade.models.stack import DecoderStack
from cascade.stages.entries import Entry
from cascade.stages.records import (
    CascadeBase,
    CascadeProvenance,
    CascadeRecord,
    StageBase,
    StageRecord,
    StageWork,
)
from cascade.stages.saved_cascades import (
    local_folder,
    read_cascade_record,
    read_entry_heads,
    read_stage,
    upload,
    write_cascade,
)
from cascade.stages.stage import Stage, check_fits, extended


class Cascade:
    """A base model and stages. Each stage computes only the tokens that are hard below it.

    The tokens in a stage attend to earlier hard tokens and to the exit states of earlier easy
    tokens, each at its own position. A cascade is an `EarlyExit` of the base with the layers of all
    stages appended, so the same laws hold. With all thresholds at -inf, the cascade is exactly the
    base. With +inf, it is the base with all layers appended. Generating equals scoring.

    Args:
        base: Base model. Its weights are not changed.
        propagation: How a stage gets keys and values of easy tokens: "frozen" (from their exit
            states) or "exact" (computed when a hard token needs them).
        provenance: Origin of the cascade.

    Raises:
        UsageError: The propagation is neither "frozen" nor "exact".

    Example:
        >>> from cascade import Cascade, Entry, load
        >>> from cascade.stages.stage import new_stage
        >>> base = load("smollm2-135m")
        >>> cascade = Cascade(base)
        >>> cascade.add_stage(new_stage(base, num_layers=1), Entry(layer=29, threshold=0.95))
        >>> cascade.stack.num_layers
        31
    """

    def __init__(
        self,
        base: DecoderStack,
        *,
        propagation: Propagation = "frozen",
        provenance: CascadeProvenance | None = None,
    ) -> None:
        if propagation not in ("frozen", "exact"):
            raise UsageError(
                f'expected a propagation of a cascade among frozen, exact, got "{propagation}"; '
                "ridge maps predict a model's own layers, not those of a stage"
            )
        check_exits(base, exact=propagation == "exact")
        self.base = base
        self.propagation: Propagation = propagation
        self.provenance = provenance or CascadeProvenance()
        self.stages: list[Stage] = []
        self.stage_entries: list[Entry] = []
        self._stacks = [base]
        self._exits: list[Exit] = []
        self._early_exits: dict[int, EarlyExit] = {}

    def add_stage(self, stage: Stage, entry: Entry) -> None:
        """Append a stage for tokens that are hard in all stages below it.

        Args:
            stage: The stage. Its weights are moved to the base's dtype and device.
            entry: Selects the tokens that enter the stage.

        Raises:
            ModelError: The stage was made for another width, vocabulary, tokenizer or base.
            UsageError: The entry is invalid, or not above the previous entry.
        """
        top = self.stack
        check_fits(top, stage)
        self._check_origin(stage)
        easy_exit = entry.exit_of(top)
        if self._exits and easy_exit.layer <= self._exits[-1].layer:
            raise UsageError(
                f"expected the stage's entry above layer {self._exits[-1].layer}, the previous "
                f"stage's entry, got layer {easy_exit.layer}; choose a higher entry layer"
            )
        for module in (stage.layers, *([] if stage.head is None else [stage.head])):
            module.to(device=top.device, dtype=top.dtype)
        self._stacks.append(extended(top, stage))
        self._exits.append(easy_exit)
        self.stages.append(stage)
        self.stage_entries.append(entry)

    def with_stage(
        self, stage: Stage, entry: Entry, *, provenance: CascadeProvenance | None = None
    ) -> Cascade:
        """Return a new cascade with one more stage. This cascade is not changed.

        Args:
            stage: The stage. Its weights are moved to the base's dtype and device.
            entry: Selects the tokens that enter the stage.
            provenance: Origin of the new cascade.

        Raises:
            ModelError: The stage was made for another width, vocabulary, tokenizer or base.
            UsageError: The entry is invalid, or not above the previous entry.
        """
        longer = Cascade(self.base, propagation=self.propagation, provenance=provenance)
        for own, before in zip(self.stages, self.stage_entries, strict=True):
            longer.add_stage(own, before)
        longer.add_stage(stage, entry)
        return longer

    def with_entries_of(self, other: Cascade) -> Cascade:
        """Return a cascade with these stages and the entries of another cascade.

        Args:
            other: Cascade with the same base and the same number of stages.

        Raises:
            UsageError: The number of stages differs.
        """
        if len(other.stage_entries) != len(self.stages):
            raise UsageError(
                f"expected a cascade with {len(self.stages)} stages, got "
                f"{len(other.stage_entries)}; train both cascades with the same number of stages"
            )
        same = Cascade(self.base, propagation=self.propagation)
        for stage, entry in zip(self.stages, other.stage_entries, strict=True):
            same.add_stage(stage, entry)
        return same

    def _check_origin(self, stage: Stage) -> None:
        names = {
            "tokenizer_hash": "tokenizer",
            "vocab_size": "vocabulary",
            "weights_hash": "base model",
        }
        if stage.provenance.base is UNSET:
            return
        difference = self._difference(stage.provenance.base, names)
        if difference is not None:
            raise ModelError(
                f"the stage was trained for another {names[difference.name]} "
                f"(expected {difference.expected}, got {difference.found}); train a stage for this "
                "model"
            )

    def _difference(
        self, made_for: StageBase | CascadeBase, names: Iterable[str]
    ) -> _Difference | None:
        """Return the first known difference between this base and a recorded one."""
        own = self._base_record()
        for name in names:
            expected, found = getattr(made_for, name), getattr(own, name)
            if expected is not UNSET and None not in (expected, found) and expected != found:
                return _Difference(name, expected, found)
        return None

    def _base_record(self) -> CascadeBase:
        model = self.base.provenance
        return CascadeBase(
            source=known(model.source),
            name=known(model.name),
            revision=known(model.revision),
            family=known(model.family),
            weights_hash=self.base.weights_hash(),
            tokenizer_hash=known(model.tokenizer_hash),
            num_layers=self.base.num_layers,
            hidden_size=self.base.hidden_size,
            vocab_size=self.base.vocab_size,
        )

    @property
    def stack(self) -> DecoderStack:
        """The base with the layers of all stages appended, as a decoder stack."""
        return self._stacks[-1]

    def stack_below(self, stages: int) -> DecoderStack:
        """Return the base with the layers of its first `stages` stages (0: the base alone)."""
        return self._stacks[stages]

    @property
    def deciding_layer(self) -> int:
        """Default entry layer of the next stage.

        The last layer of the last stage. Without stages, the second to last layer of the base.
        """
        last = self.stack.num_layers
        return last if self.stages else max(1, last - 1)

    def routed(self) -> DecoderStack:
        """Return a stack whose `visit` lets tokens exit as they do in the cascade.

        After a token has exited, every later entry of its hidden history is its exit state. The
        hard tokens of the next stage are collected from this stack.
        """
        return RoutedStack(self.early_exit())

    def early_exit(self, stages: int | None = None) -> EarlyExit:
        """Return the `EarlyExit` that runs the cascade.

        Args:
            stages: Number of stages to use; 0 for the base alone (default: all).

        Raises:
            UsageError: The cascade has fewer stages.
        """
        count = len(self.stages) if stages is None else stages
        if not 0 <= count <= len(self.stages):
            raise UsageError(
                f"expected 0 to {len(self.stages)} stages, got {count}; the cascade has "
                f"{len(self.stages)}"
            )
        if count not in self._early_exits:
            self._early_exits[count] = EarlyExit(
                self._stacks[count], exits=self._exits[:count], propagation=self.propagation
            )
        return self._early_exits[count]

    def score(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        stages: int | None = None,
        keep_logits: bool = False,
    ) -> Score:
        """Score given tokens with the cascade; see `EarlyExit.score`.

        Args:
            input_ids: Token ids, `[B, T]`.
            attention_mask: 1 for tokens, 0 for padding, `[B, T]`.
            stages: Number of stages to use (default: all).
            keep_logits: Return all logits.
        """
        return self.early_exit(stages).score(input_ids, attention_mask, keep_logits=keep_logits)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        stages: int | None = None,
        **kwargs: Any,
    ) -> Tensor | Generation:
        """Generate text with the cascade; see `EarlyExit.generate`.

        Args:
            input_ids: Token ids, `[B, T]`, padded on the left.
            attention_mask: 1 for tokens, 0 for padding, `[B, T]`.
            stages: Number of stages to use (default: all).
            kwargs: Options of `EarlyExit.generate`.
        """
        return self.early_exit(stages).generate(input_ids, attention_mask, **kwargs)

    def exit_shares(self, score: Score) -> list[float]:
        """Return the share of tokens that exit below each stage and after the last one.

        Args:
            score: Score of the whole cascade.
        """
        layers = [at.layer for at in self._exits] + [self.stack.num_layers]
        total = score.exit_layers.numel()
        return [float((score.exit_layers == layer).sum()) / total for layer in layers]

    def stage_rows(self, counts: Counts) -> list[StageWork]:
        """Return the rows that each stage computed, summed over its layers.

        Args:
            counts: Counts of a score or a generation of the whole cascade.
        """
        rows = []
        for below, above in zip(self._stacks, self._stacks[1:], strict=False):
            layers = slice(below.num_layers, above.num_layers)
            rows.append(
                StageWork(
                    layer_rows=sum(counts.layer_rows[layers]),
                    key_value_rows=sum(counts.key_value_rows[layers]),
                )
            )
        return rows

    # --- Saving and loading ------------------------------------------------------------------

    def check_bos(self, bos: object) -> None:
        """Check that a text begins with BOS if the text that the stages were trained on did.

        Args:
            bos: The `bos` of the text (see `TokenBlocks`).

        Raises:
            CorpusError: One text begins with BOS and the other does not.
        """
        for corpus in self.trained_on():
            check_same_bos(
                corpus.bos, bos, what="a stage was trained on text", again="train it again"
            )

    def trained_on(self) -> list[CorpusProvenance]:
        """Return the texts that the stages were trained on, as far as they are recorded."""
        found = [known(stage.provenance.tokens) for stage in self.stages]
        return [text for tokens in found if tokens for text in tokens.corpora.values()]

    def record(self) -> CascadeRecord:
        """Return the record that `save_pretrained` writes, without file hashes."""
        numbered = enumerate(zip(self.stages, self.stage_entries, strict=True), start=1)
        return CascadeRecord(
            base=self._base_record(),
            propagation="exact" if self.propagation == "exact" else "frozen",
            stages=[
                StageRecord(
                    file=f"stage-{number}.safetensors",
                    num_layers=len(stage.layers),
                    start=stage.start,
                    own_head=stage.head is not None,
                    entry=entry.record(f"heads-{number}.safetensors"),
                    provenance=stage.provenance,
                )
                for number, (stage, entry) in numbered
            ],
            provenance=self.provenance,
        )

    def save_pretrained(self, folder: AnyPath, *, overwrite: bool = False) -> None:
        """Write stages, entries and provenance to a folder. The base is named, not copied.

        Either all files are written or none.

        Args:
            folder: Output folder. It is created if missing.
            overwrite: Replace an existing cascade.

        Raises:
            OutputError: The folder already holds a cascade, or it cannot be written.
        """
        heads = [entry.heads for entry in self.stage_entries]
        write_cascade(Path(folder), self.record(), self.stages, heads, overwrite=overwrite)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **kwargs: Any) -> Any:
        """Upload the cascade to a model repository on the Hugging Face Hub.

        Args:
            repo_id: "ORG/NAME". The repository is created if missing.
            private: Make a newly created repository private.
            kwargs: Passed to `huggingface_hub.HfApi.upload_folder`: revision, commit_message, ...
        """
        return upload(self.save_pretrained, repo_id, private=private, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        source: AnyPath,
        base: DecoderStack | None = None,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> Cascade:
        """Load a cascade that `save_pretrained` wrote.

        Args:
            source: Folder or Hub id.
            base: The base model (default: load the recorded one).
            revision: Hub revision of the cascade.
            dtype: Dtype of a base that is loaded here.
            device: Device of a base that is loaded here.

        Raises:
            RecordError: The cascade is missing, torn, edited or from a newer release.
            UsageError: The record names no base model, and `base` is not given.
            ModelError: `base` is not the model that the cascade was made for.
        """
        folder = local_folder(source, revision)
        record = read_cascade_record(folder)
        if base is None:
            if record.base.source is None:
                raise UsageError(
                    f"expected a base model for {source}, which was made for a model without a "
                    "name; pass it: Cascade.from_pretrained(folder, base)"
                )
            base = load(
                record.base.source, revision=record.base.revision, dtype=dtype, device=device
            )
        cascade = cls(base, propagation=record.propagation, provenance=record.provenance)
        cascade._check_base(record.base)
        for row in record.stages:
            stage = read_stage(folder, row, cascade.stack)
            heads = read_entry_heads(folder, row, cascade.stack)
            entry = Entry(row.entry.layer, float(row.entry.threshold), row.entry.rule, heads)
            cascade.add_stage(stage, entry)
        return cascade

    def _check_base(self, made_for: CascadeBase) -> None:
        names = ("hidden_size", "vocab_size", "num_layers", "tokenizer_hash", "weights_hash")
        difference = self._difference(made_for, names)
        if difference is not None:
            raise ModelError(
                f"the cascade was made for the base {made_for.name or '(unnamed)'}: expected "
                f"{difference.name} {difference.expected}, got {difference.found}; load that base, "
                "or train stages for this model"
            )


@dataclass(frozen=True)
class _Difference:
    """A field of the base's record, with its expected and its actual value."""

    name: str
    expected: object
    found: object


class RoutedStack(DecoderStack):
    """A cascade's stack whose `visit` lets tokens exit as they do in the cascade.

    Args:
        early: The `EarlyExit` that runs the cascade.
    """

    def __init__(self, early: EarlyExit) -> None:
        stack = early.stack
        super().__init__(stack.model, tokenizer=stack.tokenizer, provenance=stack.provenance)
        self.below = stack.below
        self._early = early

    @torch.no_grad()
    def visit(self, input_ids: Tensor, visitor: Callable[[int, Tensor], None]) -> Tensor | None:
        """Pass each entry of the hidden history to `visitor`; see `DecoderStack.visit`."""
        layers, (batch, length) = self._early.layers, input_ids.shape
        chunk = make_chunk(self, input_ids, torch.ones_like(input_ids))
        cache = layers.new_cache(batch, length, keep=False)
        cache.window(0, length)
        one_pass = ForwardPass(layers, self._early.exits, chunk, cache, Counts.of(self.num_layers))
        exits = {at.layer: at for at in one_pass.exits}
        visitor(0, one_pass.hidden)
        no_logits = torch.zeros_like(chunk.valid)
        for layer in range(1, self.num_layers + 1):
            one_pass.run_layers_to(layer)
            visitor(layer, one_pass.hidden)
            if layer in exits:
                one_pass.decide(exits[layer], no_logits, lambda *_: None)
        return None

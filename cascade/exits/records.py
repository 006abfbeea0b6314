"""The record in a file of fitted heads: its metadata and provenance."""

from __future__ import annotations

from typing import ClassVar, Literal

from cascade.core.provenance import CorpusProvenance, MachineProvenance, ModelProvenance
from cascade.core.schema import UNSET, Count, Index, Part, StoredRecord, UnsetType


class Distillation(Part, frozen=True, kw_only=True):
    """How fitted heads were trained further (see `cascade.exits.distillation`).

    Attributes:
        epochs: Passes over the corpus.
        learning_rate: Initial learning rate of Adam.
        seed: Seed of the shuffling of sequences.
        kl_on_sequences_kept_aside: Per exit layer, KL(full || head) in nats on the held-out
            sequences: before the first epoch, then after each epoch.
    """

    epochs: Count
    learning_rate: float
    seed: Index
    kl_on_sequences_kept_aside: dict[str, list[float]]


class HeadsProvenance(Part, frozen=True, kw_only=True):
    """Where fitted heads come from; unknown fields are absent.

    Attributes:
        strengths: Per exit layer, the ridge strength of the head, then of each upper layer's map.
        model: The model that the heads belong to.
        corpus: The corpus that the heads were fitted on.
        tokenizer_hash: SHA-256 of the model's tokenizer.
        machine: The machine on which the heads were fitted.
        versions: Library versions.
        command: The command that fitted the heads.
        distillation: How the heads were trained further; absent for closed-form heads.
    """

    strengths: dict[str, list[float]] | UnsetType = UNSET
    model: ModelProvenance | UnsetType = UNSET
    corpus: CorpusProvenance | UnsetType | None = UNSET
    tokenizer_hash: str | UnsetType | None = UNSET
    machine: MachineProvenance | UnsetType = UNSET
    versions: dict[str, str] | UnsetType = UNSET
    command: str | UnsetType | None = UNSET
    distillation: Distillation | UnsetType = UNSET


class HeadsMetadata(StoredRecord, frozen=True, kw_only=True):
    """The metadata of a safetensors file of fitted heads.

    Attributes:
        width: Outputs of a propagation map per upper layer.
        of_states: Whether the maps predict layer inputs instead of keys and values.
        provenance: The provenance of the heads.
    """

    KIND: ClassVar[str] = "exit-heads"
    COMMAND: ClassVar[str] = "fit-heads"

    schema: int = 1
    kind: Literal["exit-heads"] = "exit-heads"
    width: Count
    of_states: bool
    provenance: HeadsProvenance

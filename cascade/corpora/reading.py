"""How a corpus was read: the options of `load_blocks`, as its provenance records them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from cascade.core.defaults import NUM_SAMPLES, SEQ_LEN
from cascade.core.provenance import CorpusProvenance, Split
from cascade.core.schema import UNSET, known
from cascade.corpora.bos import recorded_choice

#: Options that the provenance of a corpus has under the same name. An absent one has its default.
_RECORDED = ("split", "config", "text_column", "seed")


@dataclass(frozen=True)
class CorpusReading:
    """How a corpus is read: options of `load_blocks`, which describes them.

    Example:
        >>> CorpusReading(seed=3, max_tokens=512).recorded()["seed"]
        3
    """

    seq_len: int = SEQ_LEN
    num_samples: int | None = NUM_SAMPLES
    max_tokens: int | None = None
    split: str | None = None
    config: str | None = None
    text_column: str | None = None
    seed: int | None = None
    record_split: Split | None = None
    bos: str = "auto"

    def options(self) -> dict[str, Any]:
        """Return the options as arguments of `load_blocks`."""
        return asdict(self)

    def recorded(self) -> dict[str, Any]:
        """Return the fields of `CorpusProvenance` that say how the corpus was read."""
        samples = self.num_samples
        found = {name: getattr(self, name) for name in (*_RECORDED, "max_tokens")}
        found["num_samples"] = None if samples == NUM_SAMPLES else samples or 0
        return {name: UNSET if value is None else value for name, value in found.items()}

    @classmethod
    def of(cls, about: CorpusProvenance) -> CorpusReading:
        """Return how to read exactly the sequences that a record was measured on.

        The number of tokens limits them, since a corpus may have grown, and since records of
        earlier releases do not say how many were asked for.

        Args:
            about: The corpus in the provenance of the record.
        """
        return cls(num_samples=None, max_tokens=about.tokens, **_settings(about))

    @classmethod
    def recorded_in(cls, about: CorpusProvenance) -> CorpusReading:
        """Return how a corpus was read, as far as its record says.

        Args:
            about: The corpus in the provenance of the record.
        """
        samples, tokens = known(about.num_samples), known(about.max_tokens)
        samples = NUM_SAMPLES if samples is None else samples
        return cls(num_samples=samples or None, max_tokens=tokens, **_settings(about))

    @classmethod
    def again(cls, about: CorpusProvenance) -> CorpusReading:
        """Return how to read a corpus as for a record, including what was added to it since.

        Args:
            about: The corpus in the provenance of the record.
        """
        found = cls.recorded_in(about)
        if about.num_samples is UNSET:  # the default, or a record of an earlier release
            return replace(found, num_samples=max(NUM_SAMPLES, about.records))
        return found


def _settings(about: CorpusProvenance) -> dict[str, Any]:
    """Return the options that choose the text, other than how much of it."""
    return {
        "seq_len": about.seq_len,
        "record_split": known(about.record_split),
        "bos": recorded_choice(about),
        **{name: known(getattr(about, name)) for name in _RECORDED},
    }

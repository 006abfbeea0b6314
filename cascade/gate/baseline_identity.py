"""Whether a run is the next version of a baseline, or of another model or corpus.

A baseline is replaced by its next version: new weights, revision or tokenizer of the same source,
an edited corpus, another seed or amount. What identifies it is listed in `_IDENTITY`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from cascade.core.names import file_name, same_source
from cascade.core.provenance import Provenance
from cascade.core.schema import known
from cascade.gate.baselines import StoredProfile
from cascade.gate.drift import LEAST_SHARED
from cascade.stats.matching import places_in

#: Fields of the provenance that differ only between different models and texts. A column, split or
#: configuration that a record of an earlier release does not name can be any.
_IDENTITY = (
    ("model", "family"),
    ("model", "num_layers"),
    ("model", "hidden_size"),
    ("model", "quantization"),
    ("model", "dtype"),
    ("corpus", "seq_len"),
)
#: Fields that differ between texts, unless most of the text is the same.
_TEXT = ("config", "split", "record_split", "text_column")


@dataclass(frozen=True)
class IdentityDifference:
    """Why a run is not the next version of a baseline.

    Attributes:
        origin: "model" or "corpus".
        field: The field of its provenance that differs.
        expected: The baseline's value.
        obtained: The value of the run.
    """

    origin: str
    field: str
    expected: object
    obtained: object

    def in_words(self) -> str:
        """Return the difference as one clause of an error."""
        what = self.field.replace("_", " ")
        expected, got = (
            "none" if value is None else value for value in (self.expected, self.obtained)
        )
        return f"another {self.origin} (expected {what} {expected}, got {got})"

    def free_name(self, model: str, corpus: str) -> str:
        """Return a name for the run, as `cascade accept --name` takes it.

        Args:
            model: The name of the model.
            corpus: The name of the corpus.
        """
        added = str(self.obtained or "default")
        if self.field == "source":
            added = PurePath(added).parent.name or "2"
        if self.origin == "model":
            return f"{file_name(f'{model}-{added}')}/{corpus}"
        return f"{model}/{file_name(f'{corpus}-{added}')}"


def identity_difference(run: StoredProfile, baseline: StoredProfile) -> IdentityDifference | None:
    """Return why a run is not the next version of a baseline; None if it is.

    Args:
        run: The new profile.
        baseline: The stored baseline.
    """
    new, old = (side.record().provenance for side in (run, baseline))
    for origin, name in _IDENTITY:
        difference = _differing(new, old, origin, name)
        if difference is not None:
            return difference
    same_weights = known(new.model.weights_hash) == known(old.model.weights_hash)
    if not same_weights and not _same(known(new.model.source), known(old.model.source)):
        return IdentityDifference(
            "model", "source", known(old.model.source), known(new.model.source)
        )
    if _shared(run, baseline) >= LEAST_SHARED:
        return None
    for name in _TEXT:
        difference = _differing(new, old, "corpus", name)
        if difference is not None:
            return difference
    if not _same(new.corpus.source, old.corpus.source):
        return IdentityDifference("corpus", "source", old.corpus.source, new.corpus.source)
    return None


def _differing(
    new: Provenance, old: Provenance, origin: str, name: str
) -> IdentityDifference | None:
    expected, obtained = (known(getattr(getattr(side, origin), name)) for side in (old, new))
    if expected == obtained:
        return None
    return IdentityDifference(origin, name, expected, obtained)


def _same(new: str | None, old: str | None) -> bool:
    # A model in memory may have no source; its name is all that is known.
    return new is None or old is None or same_source(new, old)


def _shared(run: StoredProfile, baseline: StoredProfile) -> float:
    """Return which share of the shorter text is in the other one too."""
    own, theirs = (side.arrays()["sequence_fingerprint"] for side in (run, baseline))
    fewer, more = sorted((own, theirs), key=len)
    return len(places_in(fewer, more)[0]) / len(fewer) if len(fewer) else 0.0

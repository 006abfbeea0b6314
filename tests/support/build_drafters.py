"""Records of drafters, for tests that need one of valid form."""

from __future__ import annotations

from cascade.core.provenance import MachineProvenance, ModelProvenance
from cascade.drafters.config import DrafterConfig
from cascade.drafters.records import (
    BINS,
    METHODS,
    DrafterProvenance,
    DrafterRecord,
    DraftEvaluation,
    MethodFigures,
    PromptCorpus,
    TextCounts,
)


def a_record() -> DrafterRecord:
    """Return the record of a drafter of a tiny model."""
    corpus = PromptCorpus(
        source="embedded", records=500, train=400, held_out=99, too_long=1, fingerprint="sha256:1"
    )
    figures = zip(
        METHODS,
        (1.0, 1.2, 1.5, 1.8),
        (25.0, 22.0, 20.0, 18.0),
        (1.0, 1.13, 1.25, 1.37),
        strict=True,
    )
    return DrafterRecord(
        provenance=DrafterProvenance(
            model=ModelProvenance(family="llama", name="tiny", num_layers=4, hidden_size=32),
            corpora=[corpus],
            machine=MachineProvenance(processor="here", threads=1),
            versions={"python": "3"},
        ),
        config=DrafterConfig(),
        precision="float32",
        feature_layers=[1, 3, 4],
        vocabulary=48,
        ends=[1],
        texts=TextCounts(texts=1500, tokens=200_123, greedy=0.4),
        held_out=TextCounts(texts=64, tokens=8123, greedy=1.0),
        coverage=0.91,
        evaluations=[
            DraftEvaluation(step=0, accepted=[0.1, 0.1, 0.1, 0.1], tokens_per_pass=1.1),
            DraftEvaluation(step=600, accepted=[0.4, 0.35, 0.3, 0.3], tokens_per_pass=1.72),
        ],
        chosen_step=600,
        accepted=[0.41, 0.34, 0.31, 0.3],
        contexts=12_345,
        calibration=[[(at + 0.5) / BINS for at in range(BINS)]] * 4,
        methods=[
            MethodFigures(
                method=method,
                tokens_per_pass=tokens,
                milliseconds=milliseconds,
                speed=speed,
            )
            for method, tokens, milliseconds, speed in figures
        ],
        use="table and network",
        file="drafter.safetensors",
        sha256="sha256:2",
    )

"""The kinds of stored records, reading them, and their JSON Schemas."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from cascade.core.files import AnyPath
from cascade.core.records import read_typed
from cascade.core.schema import StoredRecord

#: The module and class of each kind of record; imported on first use.
KINDS: dict[str, tuple[str, str]] = {
    "saturation": ("saturation.records", "ProfileRecord"),
    "plan": ("shards.records", "PlanRecord"),
    "shard": ("shards.records", "ShardRecord"),
    "exit-heads": ("exits.records", "HeadsMetadata"),
    "calibration": ("evaluation.calibration_record", "CalibrationRecord"),
    "evaluation": ("evaluation.records", "EvaluationRecord"),
    "exit-search": ("evaluation.search.records", "SearchRecord"),
    "generation": ("decoding.transcript", "GenerationRecord"),
    "drafter": ("drafters.records", "DrafterRecord"),
    "kernels": ("decoding.engine.records", "KernelRecord"),
    "passes": ("decoding.engine.records", "PassRecord"),
    "hard-tokens": ("stages.hard_tokens.records", "HardTokensRecord"),
    "cascade": ("stages.records", "CascadeRecord"),
    "cascade-evaluation": ("stages.records", "CascadeEvaluationRecord"),
    "comparison": ("gate.records", "ComparisonRecord"),
    "report": ("gate.records", "SessionRecord"),
    "history": ("gate.history.records", "HistoryRecord"),
    "budgets": ("gate.records", "BudgetsRecord"),
    "noise": ("gate.records", "NoiseRecord"),
    "baselines-copy": ("gate.remote.records", "BaselinesCopyRecord"),
    "explanation": ("studies.explanations.records", "LayerExplanation"),
    "final-norm": ("studies.explanations.records", "FinalNormExplanation"),
    "corpus-comparison": ("studies.comparisons.corpus_records", "CorpusComparison"),
    "model-comparison": ("studies.comparisons.model_records", "ModelComparison"),
    "bench.collect": ("benchmarks.collection", "CollectionBenchmark"),
    "bench.decode": ("benchmarks.decoding", "DecodingBenchmark"),
    "bench.lossless": ("benchmarks.lossless.records", "LosslessBenchmark"),
    "bench.fit": ("benchmarks.head_fitting", "HeadFittingBenchmark"),
    "bench.collect-hard": ("benchmarks.hard_tokens", "HardTokenBenchmark"),
    "bench.merge": ("benchmarks.merging", "MergingBenchmark"),
    "bench.scale": ("benchmarks.scale", "ScaleBenchmark"),
    "bench.gate": ("benchmarks.gate", "GateBenchmark"),
}


def record_type(kind: str) -> type[StoredRecord]:
    """Return the type of a kind of record.

    Raises:
        ValueError: The kind is unknown; the message lists the known ones.
    """
    if kind not in KINDS:
        raise ValueError(f"expected a kind of record among {', '.join(KINDS)}, got {kind!r}")
    module, name = KINDS[kind]
    found: type[StoredRecord] = getattr(import_module(f"cascade.{module}"), name)
    return found


def read_record(path: AnyPath, *, kind: str) -> StoredRecord:
    """Read and check a stored record.

    Args:
        path: The JSON file of the record.
        kind: The kind of record, e.g. "evaluation".

    Raises:
        RecordError: The file is missing, torn, of another kind or of a newer schema.
        ValueError: The kind is unknown.

    Example:
        >>> import cascade
        >>> from cascade.core.records import write_record
        >>> profile = cascade.analyze(cascade.load("smollm2-135m"), ["Some text."] * 9, seq_len=8)
        >>> write_record(Path("profile.json"), profile.record())
        >>> record = read_record("profile.json", kind="saturation")
        >>> record.layers[0].layer, record.provenance.model.num_layers
        ('1', 30)
    """
    return read_typed(Path(path), record_type(kind))


def json_schema(kind: str) -> dict[str, Any]:
    """Return the JSON Schema of a kind of record.

    Raises:
        ValueError: The kind is unknown.
    """
    return msgspec.json.schema(record_type(kind))

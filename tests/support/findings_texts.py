"""The texts in the records of the findings, as the code writes them today."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from cascade.core.schema import StoredRecord
from cascade.evaluation.exit_evaluation import SECONDS
from cascade.evaluation.operating_points import INTERVAL
from cascade.evaluation.search.choice import SearchConfig, choose
from cascade.evaluation.search.records import SearchRecord
from cascade.report.studies.findings import FindingsRecords
from cascade.saturation.layer_roles import RULE, SOURCE
from cascade.saturation.records import LayerRoles
from cascade.studies.comparisons.corpus_records import CorpusComparison
from cascade.studies.comparisons.model_comparison import RULES
from cascade.studies.comparisons.model_records import ModelComparison
from cascade.studies.explanations.records import INTERVAL as EXPLANATION_INTERVAL


def with_todays_texts(records: FindingsRecords) -> dict[str, StoredRecord]:
    """Return each record with its texts derived again, by the name of its file.

    Names of outcomes and verdicts that an earlier release wrote are already today's, because
    reading renames them.

    Args:
        records: The stored records.
    """
    settings = replace(records.explanation.settings, interval=EXPLANATION_INTERVAL)
    norm = replace(records.final_norm.settings, interval=EXPLANATION_INTERVAL)
    return {
        "explanation": replace(records.explanation, settings=settings),
        "final-norm": replace(records.final_norm, settings=norm),
        "corpora": _corpora(records.corpora),
        "models": _models(records.models),
        "exit-search": _search(records.exit_search),
    }


def _search(record: SearchRecord) -> SearchRecord:
    settings = record.settings
    config = SearchConfig(
        agreement=settings.agreement, risk=settings.risk, confidence=settings.confidence
    )
    found = choose(record.points, record.nothing, config, sequences=record.full.sequences)
    return replace(
        record,
        settings=replace(settings, interval=INTERVAL, seconds=SECONDS),
        points=[
            replace(point, outcome=judged.outcome)
            for point, judged in zip(record.points, found.points, strict=True)
        ],
        verdict=found.verdict,
    )


def _corpora(record: CorpusComparison) -> CorpusComparison:
    return replace(record, corpora=[_with_rule(row) for row in record.corpora])


def _models(record: ModelComparison) -> ModelComparison:
    models = [_with_rule(row) if row.measured else row for row in record.models]
    return replace(record, rules=RULES, models=models)


def _with_rule(row: Any) -> Any:
    roles: LayerRoles = row.structure
    return replace(row, structure=replace(roles, rule=RULE, source=SOURCE))

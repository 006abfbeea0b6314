"""CASCADE: measure how a causal language model saturates, let easy tokens exit, gate the drift."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cascade.core.errors import CascadeError as CascadeError
    from cascade.corpora.blocks import TokenBlocks as TokenBlocks
    from cascade.corpora.blocks import load_blocks as load_blocks
    from cascade.decoding.custom_generation import decode as decode
    from cascade.decoding.drafting.proposers import Candidate as Candidate
    from cascade.decoding.drafting.proposers import Proposer as Proposer
    from cascade.decoding.drafting.tables import NgramTable as NgramTable
    from cascade.decoding.early_exit import EarlyExit as EarlyExit
    from cascade.drafters.config import DrafterConfig as DrafterConfig
    from cascade.drafters.export.exporting import export_drafter as export_drafter
    from cascade.drafters.making import train_drafter as train_drafter
    from cascade.drafters.proposer import load_drafter as load_drafter
    from cascade.evaluation.calibration import calibrate as calibrate
    from cascade.evaluation.exit_evaluation import evaluate as evaluate
    from cascade.evaluation.lossless.comparison import (
        compare_with_lossless as compare_with_lossless,
    )
    from cascade.evaluation.search.exit_search import search_exits as search_exits
    from cascade.exits.distillation import distill as distill
    from cascade.exits.fitted_heads import FittedHeads as FittedHeads
    from cascade.exits.fitted_heads import load_heads as load_heads
    from cascade.exits.head_fitting import fit_heads as fit_heads
    from cascade.gate.baselines import StoredProfile as StoredProfile
    from cascade.gate.baselines import read_profile as read_profile
    from cascade.gate.comparison import Comparison as Comparison
    from cascade.gate.drift import compare as compare
    from cascade.gate.quick_gate import Gate as Gate
    from cascade.gate.quick_gate import run_gate as run_gate
    from cascade.models.loading import load as load
    from cascade.models.stack import DecoderStack as DecoderStack
    from cascade.record_kinds import read_record as read_record
    from cascade.saturation.profile import SaturationProfile as SaturationProfile
    from cascade.saturation.profile import analyze as analyze
    from cascade.shards.measuring import measure_shard as measure_shard
    from cascade.shards.merging import merge as merge
    from cascade.shards.plan import Plan as Plan
    from cascade.shards.planning import plan as plan
    from cascade.stages.cascades import Cascade as Cascade
    from cascade.stages.entries import Entry as Entry
    from cascade.stages.evaluation import evaluate_cascade as evaluate_cascade
    from cascade.stages.hard_tokens.collecting import collect_hard as collect_hard
    from cascade.stages.hard_tokens.dataset import HardTokens as HardTokens
    from cascade.stages.hard_tokens.dataset import load_hard_tokens as load_hard_tokens
    from cascade.stages.hard_tokens.plan import CollectingConfig as CollectingConfig
    from cascade.stages.training import train_stage as train_stage
    from cascade.stages.training_config import Recipe as Recipe
    from cascade.stages.training_config import TrainingConfig as TrainingConfig
    from cascade.stats.similarity_statistics import SimilarityStatistics as SimilarityStatistics
    from cascade.studies.comparisons.altered_models import copy_of as copy_of
    from cascade.studies.comparisons.compared_models import measure_model as measure_model
    from cascade.studies.comparisons.corpus_comparison import compare_corpora as compare_corpora
    from cascade.studies.comparisons.model_comparison import compare_models as compare_models
    from cascade.studies.explanations.final_norm import explain_norm as explain_norm
    from cascade.studies.explanations.layer_explanation import explain as explain

try:
    __version__ = version("cascade-exit")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

#: The module of each public name; imported on first use, so that importing cascade is fast.
_MODULES = {
    "Candidate": "decoding.drafting.proposers",
    "Cascade": "stages.cascades",
    "CascadeError": "core.errors",
    "CollectingConfig": "stages.hard_tokens.plan",
    "Comparison": "gate.comparison",
    "DecoderStack": "models.stack",
    "DrafterConfig": "drafters.config",
    "EarlyExit": "decoding.early_exit",
    "Entry": "stages.entries",
    "FittedHeads": "exits.fitted_heads",
    "Gate": "gate.quick_gate",
    "HardTokens": "stages.hard_tokens.dataset",
    "NgramTable": "decoding.drafting.tables",
    "Plan": "shards.plan",
    "Proposer": "decoding.drafting.proposers",
    "Recipe": "stages.training_config",
    "SaturationProfile": "saturation.profile",
    "SimilarityStatistics": "stats.similarity_statistics",
    "StoredProfile": "gate.baselines",
    "TokenBlocks": "corpora.blocks",
    "TrainingConfig": "stages.training_config",
    "analyze": "saturation.profile",
    "calibrate": "evaluation.calibration",
    "collect_hard": "stages.hard_tokens.collecting",
    "compare": "gate.drift",
    "compare_corpora": "studies.comparisons.corpus_comparison",
    "compare_models": "studies.comparisons.model_comparison",
    "compare_with_lossless": "evaluation.lossless.comparison",
    "copy_of": "studies.comparisons.altered_models",
    "decode": "decoding.custom_generation",
    "distill": "exits.distillation",
    "evaluate": "evaluation.exit_evaluation",
    "evaluate_cascade": "stages.evaluation",
    "explain": "studies.explanations.layer_explanation",
    "explain_norm": "studies.explanations.final_norm",
    "export_drafter": "drafters.export.exporting",
    "fit_heads": "exits.head_fitting",
    "load": "models.loading",
    "load_blocks": "corpora.blocks",
    "load_drafter": "drafters.proposer",
    "load_hard_tokens": "stages.hard_tokens.dataset",
    "load_heads": "exits.fitted_heads",
    "measure_model": "studies.comparisons.compared_models",
    "measure_shard": "shards.measuring",
    "merge": "shards.merging",
    "plan": "shards.planning",
    "read_profile": "gate.baselines",
    "read_record": "record_kinds",
    "run_gate": "gate.quick_gate",
    "search_exits": "evaluation.search.exit_search",
    "train_drafter": "drafters.making",
    "train_stage": "stages.training",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'cascade' has no attribute {name!r}")
    return getattr(import_module(f"cascade.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""CASCADE: measure how a causal language model saturates, let easy tokens exit, gate the drift."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cascade.baselines import StoredProfile as StoredProfile
    from cascade.baselines import read_profile as read_profile
    from cascade.baselines import read_record as read_record
    from cascade.calibration import calibrate as calibrate
    from cascade.cascade_evaluation import evaluate_cascade as evaluate_cascade
    from cascade.cascades import Cascade as Cascade
    from cascade.cascades import Entry as Entry
    from cascade.copies import copy_of as copy_of
    from cascade.corpora import TokenBlocks as TokenBlocks
    from cascade.corpora import load_blocks as load_blocks
    from cascade.corpus_comparison import compare_corpora as compare_corpora
    from cascade.distillation import distill as distill
    from cascade.drift import Comparison as Comparison
    from cascade.drift import compare as compare
    from cascade.early_exit import EarlyExit as EarlyExit
    from cascade.errors import CascadeError as CascadeError
    from cascade.evaluation import evaluate as evaluate
    from cascade.explanation import explain as explain
    from cascade.final_norm import explain_norm as explain_norm
    from cascade.gate import Gate as Gate
    from cascade.gate import run_gate as run_gate
    from cascade.hard_dataset import HardTokens as HardTokens
    from cascade.hard_dataset import load_hard_tokens as load_hard_tokens
    from cascade.hard_tokens import collect_hard as collect_hard
    from cascade.heads import FittedHeads as FittedHeads
    from cascade.heads import fit_heads as fit_heads
    from cascade.heads import load_heads as load_heads
    from cascade.model_comparison import compare_models as compare_models
    from cascade.model_comparison import measure_model as measure_model
    from cascade.models import DecoderStack as DecoderStack
    from cascade.models import load as load
    from cascade.saturation import SaturationProfile as SaturationProfile
    from cascade.saturation import analyze as analyze
    from cascade.statistics import SimilarityStatistics as SimilarityStatistics
    from cascade.training import Recipe as Recipe
    from cascade.training import train_stage as train_stage

try:
    __version__ = version("cascade-exit")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

#: Public name -> the room it lives in; loaded on first use, so that importing cascade is cheap.
_ROOMS = {
    "Cascade": "cascades",
    "CascadeError": "errors",
    "Comparison": "drift",
    "DecoderStack": "models",
    "EarlyExit": "early_exit",
    "Entry": "cascades",
    "FittedHeads": "heads",
    "Gate": "gate",
    "HardTokens": "hard_dataset",
    "Recipe": "training",
    "SaturationProfile": "saturation",
    "SimilarityStatistics": "statistics",
    "StoredProfile": "baselines",
    "TokenBlocks": "corpora",
    "analyze": "saturation",
    "calibrate": "calibration",
    "collect_hard": "hard_tokens",
    "compare": "drift",
    "compare_corpora": "corpus_comparison",
    "compare_models": "model_comparison",
    "copy_of": "copies",
    "distill": "distillation",
    "evaluate": "evaluation",
    "evaluate_cascade": "cascade_evaluation",
    "explain": "explanation",
    "explain_norm": "final_norm",
    "fit_heads": "heads",
    "load": "models",
    "load_blocks": "corpora",
    "load_hard_tokens": "hard_dataset",
    "load_heads": "heads",
    "measure_model": "model_comparison",
    "read_profile": "baselines",
    "read_record": "baselines",
    "run_gate": "gate",
    "train_stage": "training",
}

__all__ = ["__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'cascade' has no attribute {name!r}")
    return getattr(import_module(f"cascade.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

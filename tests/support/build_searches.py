"""What a search record says besides the search itself, made by hand."""

from __future__ import annotations

from typing import Any

from msgspec import structs

from cascade.core.schema import from_plain
from cascade.evaluation.records import ExitProvenance, FullModelFigures
from cascade.evaluation.search.choice import SearchConfig, SearchOrigin
from cascade.evaluation.search.records import SearchRecord, SearchSettings


def a_corpus(name: str, sequences: int) -> dict[str, Any]:
    return {
        "source": name,
        "name": name,
        "fingerprint": "sha256:33cc",
        "records": 35,
        "tokens": 128 * sequences,
        "sequences": sequences,
        "seq_len": 128,
    }


def a_provenance(sequences: int) -> ExitProvenance:
    plain = {
        "tokenizer_hash": "sha256:22bb",
        "model": {
            "name": "tiny-llama",
            "family": "llama",
            "quantization": None,
            "num_layers": 30,
            "dtype": "float32",
            "device": "cpu",
        },
        "corpus": a_corpus("held-out-confirm", sequences),
        "fitted_on": a_corpus("held-out-fit", sequences),
        "machine": {"processor": "a processor", "threads": 2, "capability": "AVX2", "blas": None},
        "versions": {"torch": "2.13.0"},
        "command": "cascade search-exit",
        "heads": {"corpus": a_corpus("train", 100)},
        "heads_fingerprint": "sha256:44dd",
        "heads_saw_corpus": False,
    }
    return from_plain(plain, ExitProvenance)


def a_search_origin(config: SearchConfig | None = None, *, sequences: int = 32) -> SearchOrigin:
    """Return the origin of a search that measured.

    Args:
        config: What was searched for.
        sequences: How many sequences fit, and how many confirm.
    """
    config = config or SearchConfig()
    settings = SearchSettings(
        agreement=config.agreement,
        risk=config.bound,
        confidence=config.confidence,
        layers=[24, 28],
        rules=["cosine", "max_probability"],
        batch_size=8,
        seed=0,
        computes_every_token_because=None,
        interval="95 %: resampled sequences",
        seconds="one process",
    )
    full = FullModelFigures(
        perplexity=37.01,
        tokens=128 * sequences,
        scored_tokens=127 * sequences,
        sequences=sequences,
        layers=30,
        flops_per_token=2.8e8,
    )
    return SearchOrigin(a_provenance(sequences), settings, [], full)


def renamed_model(record: SearchRecord, name: str) -> SearchRecord:
    """Return a record of a model with another name."""
    model = structs.replace(record.provenance.model, name=name)
    return structs.replace(record, provenance=structs.replace(record.provenance, model=model))

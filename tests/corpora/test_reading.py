"""Tests of how a corpus was read, as recorded and read again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade.core.provenance import CorpusProvenance
from cascade.core.schema import from_plain, to_plain
from cascade.corpora.blocks import TokenBlocks, load_blocks
from cascade.corpora.reading import CorpusReading
from tests.support.tiny_models import tiny_tokenizer

ROWS = [{"text": f"record {n} says {n * n}", "other": f"another {n} text"} for n in range(700)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus with more records than are read by default, and two columns."""
    path = tmp_path_factory.mktemp("corpora") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [None, *ROWS]), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 3, "num_samples": 20},
        {"text_column": "other", "max_tokens": 512},
        {"record_split": "held-out", "num_samples": None},
        {"seed": 0, "max_tokens": 100, "text_column": "text"},
    ],
)
def test_exactly_the_recorded_sequences_are_read_again(
    corpus: Path, options: dict[str, Any]
) -> None:
    tokenizer = tiny_tokenizer()
    blocks = load_blocks(str(corpus), tokenizer, seq_len=16, **options)
    stored = from_plain(to_plain(blocks.provenance()), CorpusProvenance)
    grown = corpus.with_name("grown.jsonl")
    for path in (corpus, grown) if "seed" not in options else (corpus,):
        grown.write_text(corpus.read_text("utf-8") + "\n" + corpus.read_text("utf-8"), "utf-8")
        again = load_blocks(str(path), tokenizer, **CorpusReading.of(stored).options())
        assert np.array_equal(again.ids, blocks.ids)
    anew = load_blocks(str(corpus), tokenizer, **CorpusReading.again(stored).options())
    assert anew.fingerprint() == blocks.fingerprint()


def test_defaults_are_not_recorded() -> None:
    blocks = TokenBlocks(np.zeros((2, 8), np.int32), "zeros", "zeros", records=1)
    read = {"split", "config", "text_column", "seed", "max_tokens", "num_samples"}
    assert not read & to_plain(blocks.provenance()).keys()

"""Tests of the profile of one of several corpora, and of its special layers."""

from __future__ import annotations

import functools

import numpy as np
import torch
from support.build_corpora import CORPORA
from support.tiny_models import tiny_model

from cascade import analyze, compare_corpora
from cascade.core.schema import from_plain, to_plain
from cascade.models.stack import DecoderStack
from cascade.saturation.records import ProfileRecord
from cascade.studies.comparisons.corpus_comparison import CorpusComparisonConfig
from cascade.studies.comparisons.corpus_measurement import MeasuredCorpus, special_shares
from cascade.studies.comparisons.corpus_records import CorpusComparison


@functools.cache
def a_deep_record() -> CorpusComparison:
    """Return a comparison on a model that has enough layers for a structure and a special one."""
    return compare_corpora(_deep_stack(), CORPORA, CorpusComparisonConfig(hard_ratios=(0.5,)))


@functools.cache
def _deep_stack() -> DecoderStack:
    model = tiny_model("llama", num_layers=8)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            # Only the fourth layer turns the stream much.
            scale = 1.0 if number == 3 else 0.05
            layer.mlp.down_proj.weight.mul_(scale)
            layer.self_attn.o_proj.weight.mul_(scale)
    return DecoderStack(model)


def test_structures_equal_those_of_each_corpus_profile() -> None:
    record = a_deep_record()
    for corpus, blocks in zip(record.corpora, CORPORA, strict=True):
        found = analyze(_deep_stack(), blocks).record()
        profile = from_plain(to_plain(found), ProfileRecord)
        assert corpus.structure == profile.structure
        assert corpus.structure.dips == ["4"]
        assert str(corpus.suggested_exit_layer) == profile.thresholds.exit_layer
        assert corpus.tokens == blocks.tokens
        row = next(row for row in corpus.special if row.layer == "4")
        assert (row.role, row.share_of_resamples) == ("dips", 1.0)
    # With only two distinct tokens, the last layer turns far more, so the norm does not stand out.
    (row,) = record.special.differ
    assert (row.layer, row.special_in, row.sure) == ("8+norm", ["A", "B"], True)
    assert not record.special.same


def test_special_shares_count_resamples() -> None:
    flat, dip = [0.95] * 7, [0.95] * 3 + [0.1] + [0.95] * 3
    labels = [str(number) for number in range(1, 8)]
    shares = special_shares(labels, np.array([flat, dip, dip, dip]))
    assert shares == dict.fromkeys(labels, 0.0) | {"4": 0.75}


def test_a_layer_special_only_in_resamples_has_no_role() -> None:
    profile = analyze(_deep_stack(), CORPORA[0])
    corpus = MeasuredCorpus(profile, 1, np.zeros((60, 12)))
    dip = np.array([0.95] * 2 + [0.1] + [0.95] * 6)
    draws = np.stack([corpus.means] * 3 + [dip])
    rows = {row.layer: row for row in corpus.described("A", draws).special}
    assert to_plain(rows["3"]) == {"layer": "3", "role": None, "share_of_resamples": 0.25}
    assert to_plain(rows["4"]) == {"layer": "4", "role": "dips", "share_of_resamples": 0.75}

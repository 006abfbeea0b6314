"""The figures of a profile: labelled, small and reproducible."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
from support.build_profile_records import (
    BINS,
    a_full_record,
    a_record,
    all_equal,
    density_figure,
    full_drawings,
    page_of,
    profile_figure,
    some_arrays,
)
from support.html import Page, ids

from cascade.report.saturation.figures import rebinned


def test_drawings_do_not_depend_on_the_users_matplotlib_style() -> None:
    import matplotlib

    record = a_full_record()
    arrays = some_arrays(record)
    first = profile_figure(record), density_figure(record, arrays), page_of(record, arrays)
    record = copy.deepcopy(record)
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True, "ytick.labelsize": 20}):
        again = profile_figure(record), density_figure(record, arrays), page_of(record, arrays)
        assert matplotlib.rcParams["font.size"] == 20
    assert first == again


def test_another_record_gives_another_drawing() -> None:
    record, other = a_full_record(), a_full_record()
    other["layers"][6]["mean"] -= 0.01
    assert profile_figure(record) != profile_figure(other)
    arrays, others = some_arrays(record), some_arrays(record)
    others["histogram"][6] = others["histogram"][24]
    assert density_figure(record, arrays) != density_figure(record, others)


def test_two_drawings_share_no_id_and_every_reference_has_its_target() -> None:
    profile, density = full_drawings()
    assert not set(ids(profile)) & set(ids(density))
    for svg in (profile, density):
        assert len(ids(svg)) == len(set(ids(svg))) > 10
        references = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
        assert references
        assert references <= set(ids(svg))


def test_drawings_are_small_and_the_heat_map_is_an_image() -> None:
    profile, density = full_drawings()
    assert len(profile) < 300_000
    assert len(density) < 300_000
    assert "data:image/png;base64," in density


def test_a_drawing_is_labelled_and_styles_only_itself() -> None:
    svg = full_drawings()[0]
    _, root = Page(svg).tags[0]
    assert root["role"] == "img"
    assert "saturated in layers 3 to 24 and 26 to 29" in str(root["aria-label"])
    assert re.findall(r"<style[^>]*>(.*?)\{", svg) == ["#layer-profile *"]


def test_every_layer_role_and_cutoff_is_named_in_the_line_chart() -> None:
    texts = [text.strip() for text in Page(full_drawings()[0]).texts]
    assert {str(layer) for layer in range(1, 31)} <= set(texts)
    for text in ("+norm", "stable 3-24", "stable 26-29", "cutoff 0.9146", "dip", "layer 25"):
        assert text in texts
    assert "0.8316" in texts


def test_a_long_name_is_shortened() -> None:
    record = a_record([0.9, 0.95])
    record["provenance"]["model"]["name"] = "models/" * 40
    texts = Page(profile_figure(record)).texts
    assert any(text.startswith("models/models/") and "... on embedded:" in text for text in texts)
    assert max(map(len, texts)) < 110


def test_some_labels_are_skipped_with_many_layers() -> None:
    texts = [text.strip() for text in Page(profile_figure(a_record([0.95] * 80))).texts]
    assert {"1", "5", "75", "80"} <= set(texts)
    assert not {"2", "77", "79"} & set(texts)


def test_similarity_one_is_at_the_top_of_both_drawings() -> None:
    for svg in full_drawings():
        heights = {
            text: float(y)
            for y, text in re.findall(
                r'<text [^>]*?y="([\d.]+)"[^>]*>(-?[01](?:\.\d+)?)</text>', svg
            )
        }
        assert heights["0.99"] < heights["0.9"] < heights["0.5"] < heights["0"]


def test_the_density_axis_is_cropped_to_the_range_in_use() -> None:
    record = a_record([0.95, 0.96])
    texts = [text.strip() for text in Page(density_figure(record, some_arrays(record))).texts]
    assert "0.9" in texts
    assert not {"0", "0.5", "-1"} & set(texts)


def test_equal_tokens_still_get_a_colour_scale_and_an_axis() -> None:
    record = all_equal(0.7312)
    drawn = density_figure(record, some_arrays(record))
    texts = [text.strip() for text in Page(drawn).texts]
    assert {"10%", "100%", "0.72", "0.73", "0.74"} <= set(texts)


def test_rebinning_for_display_loses_no_token() -> None:
    generator = np.random.default_rng(0)
    for low, high in ((0, BINS), (0, 1), (BINS - 1, BINS), (17, 1500), (300, 419), (6000, BINS)):
        histogram = np.zeros((3, BINS), dtype=np.int64)
        histogram[:, low:high] = generator.integers(0, 9, (3, high - low))
        histogram[:, low] = histogram[:, high - 1] = 1
        shares, edges = rebinned(histogram)
        assert shares.sum(axis=1) == pytest.approx(1.0)
        assert len(edges) == shares.shape[1] + 1 <= 122
        # The edges enclose what they must, and lie where the bins lie.
        # (A tenth of a bin: room for the last bit of a float.)
        first, last = edges[0] / np.pi * BINS, edges[-1] / np.pi * BINS
        assert first <= low + 0.1
        assert high - 0.1 <= last <= BINS + 0.1
        for share, counts in zip(shares, histogram, strict=True):
            expected, _ = np.histogram(
                (np.arange(BINS) + 0.5) * np.pi / BINS, edges, weights=counts
            )
            assert share * counts.sum() == pytest.approx(expected)

"""Layer roles are found by one rule at any position."""

from __future__ import annotations

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest_regressions.data_regression import DataRegressionFixture
from support.paths import BASELINES

from cascade.core.schema import to_plain
from cascade.saturation.layer_roles import find_structure, suggested_exit_layer
from cascade.saturation.records import LayerRoles

PUBLISHED = BASELINES / "smollm2-135m-instruct/published.csv"


def labels_of(means: list[float]) -> list[str]:
    return [str(layer) for layer in range(1, len(means) + 1)]


def found(means: list[float]) -> LayerRoles:
    return find_structure(labels_of(means), means)


def test_roles_of_the_published_table(
    data_regression: DataRegressionFixture,
) -> None:
    with PUBLISHED.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    labels = [row["layer"] for row in rows]
    structure = find_structure(labels, [float(row["mean"]) for row in rows])
    plain = to_plain(structure)
    del plain["rule"], plain["source"]
    data_regression.check(plain)


@given(st.integers(12, 48), st.data())
def test_planted_dip_is_found(depth: int, data: st.DataObject) -> None:
    dip = data.draw(st.integers(4, depth - 3))
    # 13.6 to 15.2 degrees, which is a narrower range than the smallest cutoff, 3.5 x 0.5 degrees.
    usual = data.draw(st.lists(st.floats(0.965, 0.972), min_size=depth, max_size=depth))
    means = [0.0, *usual[1:-1], 0.5]
    means[dip - 1] = data.draw(st.floats(0.2, 0.8))
    structure = found(means)
    assert structure.input_transform == ["1"]
    assert structure.dips == [str(dip)]
    assert structure.output_transform == [str(depth)]
    assert structure.stable_bands == [["2", str(dip - 1)], [str(dip + 1), str(depth - 1)]]
    assert suggested_exit_layer(structure, depth) == depth - 1


@given(st.lists(st.floats(-1, 1), min_size=5, max_size=40))
def test_every_layer_has_exactly_one_role(means: list[float]) -> None:
    structure = found(means)
    banded = [
        str(layer)
        for first, last in structure.stable_bands
        for layer in range(int(first), int(last) + 1)
    ]
    roles = [
        *structure.input_transform,
        *structure.dips,
        *structure.output_transform,
        *banded,
    ]
    assert sorted(roles) == sorted(labels_of(means))
    # The cutoff lies above the median, so at most half of the layers are active.
    assert len(banded) * 2 >= len(means)


def test_equal_layers_form_one_stable_band() -> None:
    structure = found([0.97] * 10)
    assert structure.stable_bands == [["1", "10"]]
    assert not structure.input_transform + structure.dips + structure.output_transform
    assert suggested_exit_layer(structure, 10) == 10


def test_small_difference_is_not_a_dip() -> None:
    # With nearly equal layers and no minimum spread, a difference of 0.1 % would count as a dip.
    assert found([0.97] * 10 + [0.969] + [0.97] * 10).dips == []


def test_normed_row_uses_the_cutoff_of_the_residual_rows() -> None:
    means = [0.0, *[0.96] * 8, 0.955]
    labels = [*labels_of(means), "10+norm"]
    assert find_structure(labels, [*means, 0.1]).output_transform == ["10+norm"]
    assert find_structure(labels, [*means, 0.96]).output_transform == []


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_layers_have_no_roles(depth: int) -> None:
    structure = found([0.1] * depth)
    assert structure.cutoff is None
    assert structure.stable_bands == []
    assert suggested_exit_layer(structure, depth) == max(1, depth - 1)

"""Products of float32: what rounds them on this device, and how they are computed in full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from cascade.core import float32_products
from cascade.core.float32_products import (
    is_by_autocast,
    product_precision,
    products_in,
    unit_of,
)

CPU = torch.device("cpu")
BACKEND = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    before = BACKEND.fp32_precision  # type: ignore[attr-defined]
    float32_products._rounds.cache_clear()
    yield
    BACKEND.fp32_precision = before  # type: ignore[attr-defined]
    float32_products._rounds.cache_clear()


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that does what is set."""
    monkeypatch.setattr(float32_products, "_rounds", lambda *_: True)


@pytest.mark.parametrize("setting", ["bf16", "tf32"])
def test_a_setting_counts_where_it_changes_products(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    BACKEND.fp32_precision = setting  # type: ignore[attr-defined]
    for rounds in (True, False):
        monkeypatch.setattr(float32_products, "_rounds", lambda *_, rounds=rounds: rounds)
        assert product_precision(CPU) == (setting if rounds else None)


def test_a_processor_is_asked_whether_it_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    BACKEND.fp32_precision = "bf16"  # type: ignore[attr-defined]
    right = torch.nn.functional.linear

    def linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if BACKEND.fp32_precision == "bf16" and rounds:  # type: ignore[attr-defined]
            return right(rows.bfloat16(), weight.bfloat16()).float()
        return right(rows.double(), weight.double()).float()

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    for rounds in (True, False):
        float32_products._rounds.cache_clear()
        assert product_precision(CPU) == ("bf16" if rounds else None)
        assert BACKEND.fp32_precision == "bf16"  # type: ignore[attr-defined]


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("before", ["none", "ieee", "bf16", "tf32"])
@pytest.mark.parametrize("wanted", [None, "bf16", "tf32"])
def test_a_precision_is_set_and_set_back(before: str, wanted: str | None) -> None:
    BACKEND.fp32_precision = before  # type: ignore[attr-defined]
    with contextlib.suppress(KeyError), products_in(CPU, wanted):
        assert product_precision(CPU) == wanted
        raise KeyError
    assert BACKEND.fp32_precision == before  # type: ignore[attr-defined]


@pytest.mark.usefixtures("rounding")
def test_the_setting_of_earlier_versions_is_still_read_afterwards() -> None:
    torch.set_float32_matmul_precision("medium")
    with products_in(CPU):
        assert product_precision(CPU) is None
    assert torch.get_float32_matmul_precision() == "medium"
    assert product_precision(CPU) == "bf16"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize(
    ("setting", "precision"), [("highest", None), ("high", "tf32"), ("medium", "bf16")]
)
def test_versions_without_a_setting_for_each_backend(
    setting: str, precision: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = ["highest"]
    monkeypatch.setattr(float32_products, "_backend", lambda _: object())
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: now[0])
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda to: now.__setitem__(0, to))
    with products_in(CPU, precision):
        assert now == [setting]
        assert product_precision(CPU) == precision
    assert now == ["highest"]


def test_autocast_is_named_and_left() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = product_precision(CPU)
        assert found == "bfloat16 by autocast"
        assert is_by_autocast(found)
        with products_in(CPU):
            assert product_precision(CPU) is None
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert not is_by_autocast("bf16")


def test_other_devices_have_no_setting() -> None:
    assert product_precision(torch.device("meta")) is None
    with products_in(torch.device("meta")):
        pass


def test_numbers_are_rounded_by_half_a_unit_at_most() -> None:
    numbers = torch.linspace(1, 2, 10_001)
    error = ((numbers.bfloat16().float() - numbers) / numbers).abs().max()
    assert error <= unit_of("bf16") / 2
    assert unit_of("bfloat16 by autocast") == unit_of("bf16")
    assert unit_of("tf32") == torch.finfo(torch.float16).eps

"""A baseline checked on another device: the noise, the tolerance, and the faults still seen."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from support.other_devices import Outcome, baseline_of, outcome_of, table_of
from support.paths import ROOT

RECORD = ROOT / "docs/other-devices.csv"
#: Pairs of arithmetics: of the baseline, and of the run.
ON_CPU = [("cpu", "avx2"), ("cpu", "bf16 products"), ("cpu bf16", "avx2 bf16")]
WITH_GPU = [
    ("cpu", "cuda"),
    ("cpu", "cuda tf32"),
    ("cuda", "cpu"),
    ("cuda tf32", "cpu"),
    ("cpu bf16", "cuda bf16"),
    ("cuda bf16", "cpu bf16"),
]
#: Faults that must be seen on every device, whatever the precision.
GROSS = ("skipped", "RoPE", "mask", "epsilon", "stale")


def stored() -> list[Outcome]:
    text = RECORD.read_text(encoding="utf-8").splitlines()
    return [Outcome(**row) for row in csv.DictReader(text)]


def check(outcome: Outcome) -> None:
    assert outcome.verdict == "PASS"
    assert float(outcome.moved) <= float(outcome.tolerance)
    for fault in GROSS:
        assert fault not in outcome.unseen
    rounded = "bfloat16" in outcome.run or "TF32 on" in outcome.run + outcome.baseline
    if outcome.dtype == "float32" and not rounded:
        assert outcome.unseen == "-"
        assert float(outcome.tolerance) <= 1e-5


def test_the_stored_record_has_no_false_alarm_and_misses_no_gross_fault() -> None:
    found = stored()
    assert {outcome.dtype for outcome in found} == {"float32", "bfloat16"}
    for outcome in found:
        check(outcome)


def measure(pairs: list[tuple[str, str]], folder: Path, request: pytest.FixtureRequest) -> None:
    """Measure pairs of arithmetics and check them; with `--force-regen`, store them."""
    found = [outcome_of(run, base, baseline_of(base, folder)) for base, run in pairs]
    for outcome in found:
        check(outcome)
    if request.config.getoption("force_regen"):
        new = {(row.machine, row.baseline, row.run, row.dtype): row for row in stored() + found}
        RECORD.write_text(table_of(list(new.values())), encoding="utf-8")


@pytest.mark.slow
def test_other_processors_and_precisions(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    measure(ON_CPU, tmp_path, request)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
def test_a_gpu_and_a_processor_check_each_other(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    measure(WITH_GPU, tmp_path, request)

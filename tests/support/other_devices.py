"""The reference model on other devices, and which faults the gate still sees there.

Each arithmetic runs in a process of its own, because a processor's instructions are chosen when
libraries are loaded: `python -m support.other_devices RUN BASE BASELINE.json` prints a row.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from support.paths import ROOT

#: Libraries with these settings compute as on a processor without AVX-512 and AMX.
_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


@dataclass(frozen=True)
class Arithmetic:
    """How the reference model is computed.

    Attributes:
        what: For the table.
        dtype: Of the weights.
        device: "cpu" or "cuda".
        products: The precision of products of float32, as torch names it.
        environment: Environment variables of the process.
    """

    what: str
    dtype: str = "float32"
    device: str = "cpu"
    products: str = "ieee"
    environment: dict[str, str] = field(default_factory=dict)


#: Name -> arithmetic; the first one of each dtype makes the baseline.
ARITHMETICS = {
    "cpu": Arithmetic("this processor"),
    "avx2": Arithmetic("instructions of an older processor (AVX2)", environment=_AVX2),
    "bf16 products": Arithmetic(
        "products of float32 rounded to bfloat16",
        products="bf16",
        environment={"ATEN_CPU_CAPABILITY": "avx2"},  # counts as another processor
    ),
    "cuda": Arithmetic("GPU, TF32 off", device="cuda"),
    "cuda tf32": Arithmetic("GPU, TF32 on", device="cuda", products="tf32"),
    "cpu bf16": Arithmetic("this processor", "bfloat16"),
    "avx2 bf16": Arithmetic(
        "instructions of an older processor (AVX2)", "bfloat16", environment=_AVX2
    ),
    "cuda bf16": Arithmetic("GPU", "bfloat16", "cuda"),
}

#: The faults that are planted, from gross ones to fine ones, by their names in the lists of faults.
PREFILL = (
    "skip",
    "rope",
    "mask 1",
    "epsilon",
    "scale",
    "head",
    "int8 one",
    "int8 all",
    "mlp",
    "mlp 1e-3",
    "mlp 3e-4",
)
DECODING = ("stale key", "zeroed key", "fp8 keys")


@dataclass(frozen=True)
class Outcome:
    """What the gate makes of the reference model in one arithmetic.

    Attributes:
        baseline: The arithmetic of the baseline.
        run: The arithmetic of the run.
        dtype: Of both.
        machine: The processor or GPU of the run.
        noise: How far rounding moves a sequence's mean: the largest variant, and float64.
        tolerance: How far a sequence's mean may move.
        moved: How far it moves without a fault.
        verdict: Of the run without a fault.
        unseen: The planted faults that the gate does not see, separated by semicolons.
    """

    baseline: str
    run: str
    dtype: str
    machine: str
    noise: str
    tolerance: str
    moved: str
    verdict: str
    unseen: str


def outcome_of(name: str, base: str, baseline: Path) -> Outcome:
    """Run an arithmetic in a process of its own.

    Args:
        name: The arithmetic.
        base: That of the baseline.
        baseline: The baseline's JSON file, or the folder of its run.
    """
    return Outcome(**json.loads(_in_process(name, base, str(baseline)).splitlines()[-1]))


def baseline_of(name: str, folder: Path) -> Path:
    """Return the baseline of an arithmetic, measured over the first sequences of the corpus.

    Args:
        name: The arithmetic.
        folder: A folder for a run.
    """
    if name == "cpu":
        return ROOT / "baselines/smollm2-135m-instruct-q4_1/embedded.saturation.json"
    run = folder / name.replace(" ", "-")
    _in_process(name, "analyze", str(run))
    return run


def _in_process(name: str, *arguments: str) -> str:
    paths = [str(ROOT), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-m", "support.other_devices", name, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | ARITHMETICS[name].environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return done.stdout


def table_of(outcomes: list[Outcome]) -> str:
    """Return outcomes as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(outcomes[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(outcome) for outcome in outcomes)
    return text.getvalue()


def _set_products(way: Arithmetic) -> None:
    import torch

    if way.products != "ieee":
        backend = torch.backends.cuda if way.device == "cuda" else torch.backends.mkldnn
        backend.matmul.fp32_precision = way.products  # type: ignore[attr-defined]


def _analyze(way: Arithmetic, folder: str) -> None:
    from cascade.cli import main

    sys.argv[1:] = ["analyze", "--device", way.device, "--dtype", way.dtype]
    sys.argv += ["--max-tokens", "8192", "--long-context", "0", "--output", folder]
    main()


def _run(name: str, base: str, path: Path) -> Outcome:
    from cascade.corpora.blocks import load_blocks
    from cascade.gate.baselines import read_profile
    from cascade.gate.comparison import environment_differences, tolerance_of
    from cascade.gate.decoding_check import check_decoding
    from cascade.gate.drift import compare
    from cascade.gate.noise import measure_noise
    from cascade.gate.quick_gate import quick_blocks
    from cascade.models.loading import load
    from cascade.saturation.profile import analyze
    from support.decoding_faults import DECODING_FAULTS
    from support.fault_list import FAULTS
    from support.faults import Fault, scaled_mlp

    way = ARITHMETICS[name]
    stack = load("smollm2-135m", device=way.device, dtype=way.dtype)
    baseline = read_profile(path)
    blocks = quick_blocks(load_blocks("embedded", stack.tokenizer), baseline)
    edges = baseline.arrays()["edges"]
    clean = analyze(stack, blocks, edges=edges)
    about = clean.record().provenance
    differ = environment_differences(about, baseline.record().provenance)
    noise = measure_noise(stack, blocks.ids[:4]) if differ else None
    tolerance, _ = tolerance_of(clean.record(), baseline.record(), noise)
    found = compare(clean, baseline, noise=noise, long_context=False)
    moved = max(abs(cell.difference) for cell in found.cells if cell.statistic == "mean")
    faults = FAULTS | {
        "mlp 1e-3": Fault("layer 13's MLP output x 1.001", scaled_mlp(13, 1.001), "layer"),
        "mlp 3e-4": Fault("layer 13's MLP output x 1.0003", scaled_mlp(13, 1.0003), "layer"),
    }
    unseen = []
    for each in PREFILL:
        with faults[each].plant(stack):
            profile = analyze(stack, blocks, edges=edges)
        verdict = compare(profile, baseline, noise=noise, long_context=False).verdict
        if verdict != "FAIL":
            unseen.append(faults[each].what)
    for each in DECODING:
        fault = DECODING_FAULTS[each]
        with fault.plant(stack):
            if check_decoding(stack, blocks.ids[:1]).verdict != "FAIL":
                unseen.append(fault.what)
    machine = about.machine
    return Outcome(
        baseline=ARITHMETICS[base].what,
        run=way.what,
        dtype=way.dtype,
        machine=str(getattr(machine, "accelerator", None) or getattr(machine, "processor", "")),
        noise="-" if noise is None else f"{max(noise.repeat, noise.exact or 0.0):.1e}",
        tolerance=f"{tolerance:.1e}",
        moved=f"{moved:.1e}",
        verdict=found.verdict,
        unseen="; ".join(unseen) or "-",
    )


if __name__ == "__main__":
    wanted, what, place = sys.argv[1:]
    _set_products(ARITHMETICS[wanted])
    if what == "analyze":
        _analyze(ARITHMETICS[wanted], place)
    else:
        print(json.dumps(asdict(_run(wanted, what, Path(place)))))

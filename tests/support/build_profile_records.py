"""Records of saturation profiles by hand, as plain values to edit, and what is drawn of them."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from rich.console import Console

from cascade.core.schema import from_plain
from cascade.report.saturation.figures import density_svg, layer_profile_svg
from cascade.report.saturation.page import profile_page
from cascade.report.saturation.terminal import print_profile
from cascade.saturation.records import ProfileRecord

BINS = 6144
STATISTICS = ("mean", "std", "min", "p10", "p50", "p90", "max")


def a_row(layer: str, mean: float, *, width: float = 0.04) -> dict[str, Any]:
    """Return one layer's statistics, every number of which is different at four decimals."""
    return {
        "layer": layer,
        "count": 1000,
        "mean": mean,
        "std": width / 3.7,
        "min": max(-1.0, mean - 4.1 * width),
        "p10": mean - width,
        "p50": mean + width / 9,
        "p90": min(0.997, mean + width / 1.3),
        "max": min(0.999, mean + 1.2 * width),
        "frac_negative": 0.0,
        "frac_below_half": 0.0,
    }


def a_record(means: list[float], *, normed: float | None = None) -> dict[str, Any]:
    """Return a record with one decoder layer per mean, no layer of which is active."""
    names = [str(layer) for layer in range(1, len(means) + 1)]
    rows = [a_row(name, mean) for name, mean in zip(names, means, strict=True)]
    if normed is not None:
        rows.append(a_row(f"{names[-1]}+norm", normed, width=0.2))
    return {
        "schema": 2,
        "kind": "saturation",
        "provenance": {
            "model": {
                "source": "tiny",
                "name": "tiny-llama",
                "family": "llama",
                "revision": None,
                "weights_hash": "sha256:11aa",
                "quantization": None,
                "num_layers": len(means),
                "hidden_size": 32,
                "dtype": "float32",
                "device": "cpu",
                "attention": "sdpa",
            },
            "tokenizer_hash": "sha256:22bb",
            "corpus": {
                "source": "embedded",
                "name": "embedded",
                "fingerprint": "sha256:33cc",
                "records": 20,
                "tokens": 1000,
                "sequences": 125,
                "seq_len": 8,
            },
            "machine": {"processor": "a processor", "threads": 2},
            "versions": {"cascade": "0.1.0", "torch": "2.13.0"},
            "command": "cascade analyze tiny",
        },
        "layers": rows,
        "structure": {
            "rule": "A layer is active when its mean lies far below the median.",
            "source": "A citation, 2013",
            "cutoff": 0.9146,
            "input_transform": [],
            "dips": [],
            "output_transform": [],
            "stable_bands": [[names[0], names[-1]]],
        },
        "thresholds": {
            "exit_layer": names[-2],
            "by_hard_ratio": [
                {"hard_ratio": 0.3, "threshold": 0.944312},
                {"hard_ratio": 0.7, "threshold": 0.956288},
            ],
        },
    }


def a_full_record(*, normed: float = 0.08) -> dict[str, Any]:
    """Return a record with every role and with outliers, shaped like SmolLM2-135M's."""
    means = [0.0068, 0.8175, *(0.955 + 0.0007 * layer for layer in range(3, 30)), 0.7101]
    means[24] = 0.8316
    record = a_record(means, normed=normed)
    record["structure"].update(
        input_transform=["1", "2"],
        dips=["25"],
        output_transform=["30", "30+norm"],
        stable_bands=[["3", "24"], ["26", "29"]],
    )
    record["layers"][0].update(frac_negative=0.3677, frac_below_half=1.0)
    record["layers"][11].update(frac_negative=0.00002, frac_below_half=0.0078)
    return record


def some_arrays(record: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return histograms with tokens between p10 and p90 and one at min and max."""
    histogram = np.zeros((len(record["layers"]), BINS), dtype=np.int64)
    for counts, row in zip(histogram, record["layers"], strict=True):
        inner = np.linspace(row["p10"], row["p90"], row["count"] - 2)
        values = np.clip([row["min"], *inner, row["max"]], -1, 1)
        bins = np.minimum(np.arccos(values) / np.pi * BINS, BINS - 1).astype(int)
        np.add.at(counts, bins, 1)
    return {"layers": np.array([row["layer"] for row in record["layers"]]), "histogram": histogram}


def two_layers() -> dict[str, Any]:
    record = a_record([0.1, 0.9])
    record["structure"].update(cutoff=None, stable_bands=[])
    return record


def all_equal(value: float) -> dict[str, Any]:
    record = a_record([value] * 5)
    for row in record["layers"]:
        row.update(dict.fromkeys(("mean", "min", "p10", "p50", "p90", "max"), value), std=0.0)
    record["structure"].update(cutoff=None, stable_bands=[])
    return record


def without_stable_bands() -> dict[str, Any]:
    record = a_record([0.1, 0.9, 0.2], normed=-0.4)
    record["structure"]["stable_bands"] = []
    return record


def many_dips() -> dict[str, Any]:
    record = a_record([0.8, 0.95] * 50, normed=0.3)
    record["structure"].update(
        dips=[str(layer) for layer in range(1, 100, 2)],
        stable_bands=[[str(layer)] * 2 for layer in range(2, 101, 2)],
    )
    return record


def named_in_another_script() -> dict[str, Any]:
    record = a_full_record()
    record["provenance"]["model"]["name"] = "模型 $x^{$ 😀"
    return record


def typed(record: dict[str, Any]) -> ProfileRecord:
    """Return the record of plain values."""
    return from_plain(record, ProfileRecord)


def profile_figure(record: dict[str, Any]) -> str:
    return layer_profile_svg(typed(record))


def density_figure(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    return density_svg(typed(record), arrays)


def page_of(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    return profile_page(typed(record), arrays)


@functools.cache
def full_drawings() -> tuple[str, str]:
    """Return both drawings of the full record, drawn once for all tests that only read them."""
    record = a_full_record()
    return profile_figure(record), density_figure(record, some_arrays(record))


@functools.cache
def full_page() -> str:
    record = a_full_record()
    return page_of(record, some_arrays(record))


def printed(record: dict[str, Any], *, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.BytesIO()
    file = io.TextIOWrapper(stream, encoding=encoding)
    print_profile(typed(record), Console(file=file, width=width))
    file.flush()
    return stream.getvalue().decode(encoding)


def section(text: str, heading: str) -> list[str]:
    """Return the printed lines below a heading, up to the next blank line."""
    below = text.split(f"\n{heading}\n", 1)[1]
    return below.split("\n\n", 1)[0].splitlines()

"""Benchmarks for the terminal: speed, ratios, memory, and the targets met or missed."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.text import Text

from cascade.report.reading import SCHEMA, Record
from cascade.report.terminal import print_heading, print_pairs, print_table


def print_bench(record: Record, console: Console) -> None:
    """Print a benchmark: speed of every way, ratios, memory, and targets met or not.

    Args:
        record: A saved record of kind `bench.collect`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema.
    """
    for key, expected in (("kind", "bench.collect"), ("schema", SCHEMA)):
        if record.get(key) != expected:
            raise ValueError(f"expected {key} {expected!r}, got {record.get(key)!r}")
    print_pairs(_bench_headline(record), console)
    print_heading("Speed", console)
    print_table(
        ("tokens/s", "median seconds", "fastest", "slowest", "way"),
        _speed_rows(record),
        console,
        gap=2,
        text_columns=1,
    )
    print_heading("Ratios of seconds: median and 95 % interval over rounds", console)
    print_table(
        ("median", "interval", "way/reference"),
        _ratio_rows(record),
        console,
        gap=2,
        text_columns=1,
    )
    print_heading("Peak memory", console)
    if record["memory"]["reason"] is None:
        print_table(
            ("peak MB", "after loading", "tokens", "way"),
            _peak_rows(record),
            console,
            gap=2,
            text_columns=1,
        )
    else:
        console.print(Text(f"Not measured: {record['memory']['reason']}."))
    print_heading("Targets (set for 2 cores and 4,096 tokens)", console)
    print_table(
        ("target", "limit", "measured", "verdict"),
        _target_rows(record),
        console,
        gap=1,
        text_columns=1,
    )
    print_heading("Notes", console)
    print_pairs(_bench_notes(record), console)


def _bench_headline(record: Record) -> list[tuple[str, str]]:
    provenance, settings = record["provenance"], record["settings"]
    machine = provenance["machine"]
    load = machine["load_average_before"]
    busy = "" if load is None else f", load average before the start {load:.2f}"
    return [
        ("Model", f"{provenance['model']['name']} on {provenance['model']['device']}"),
        (
            "Pass",
            f"{settings['tokens']:,} tokens in sequences of {settings['seq_len']:,}, "
            f"{settings['batch_size']} per batch; {settings['rounds']} rounds",
        ),
        (
            "Machine",
            f"{machine['processor']}, {machine['cores']} cores, {settings['threads']} threads"
            f"{busy}",
        ),
    ]


def _speed_rows(record: Record) -> list[list[str]]:
    return [
        [
            f"{way['tokens_per_second']:,.0f}",
            f"{np.median(way['seconds']):.3f}",
            f"{min(way['seconds']):.3f}",
            f"{max(way['seconds']):.3f}",
            name,
        ]
        for name, way in record["ways"].items()
    ]


def _ratio_rows(record: Record) -> list[list[str]]:
    return [
        [f"{row['median']:.3f}", "{:.3f} to {:.3f}".format(*row["interval"]), row["name"]]
        for row in record["ratios"]
    ]


def _peak_rows(record: Record) -> list[list[str]]:
    return [
        [
            f"{row['peak_mb']:,.1f}",
            f"{row['loaded_mb']:,.1f}",
            f"{row['tokens']:,}",
            row["way"],
        ]
        for row in record["memory"]["peaks"]
    ]


def _target_rows(record: Record) -> list[list[str]]:
    return [
        [
            target["name"],
            f"{target['sense']} {target['limit']:g}",
            "-" if target["measured"] is None else f"{target['measured']:.4g}",
            _verdict(target),
        ]
        for target in record["targets"]
    ]


def _verdict(target: Record) -> str:
    if target["met"] is None:
        return "not measured"
    verdict = "met" if target["met"] else "not met"
    interval = target["interval"]
    # With the limit inside its interval, another run could well say the opposite.
    undecided = interval is not None and interval[0] <= target["limit"] <= interval[1]
    return f"{verdict}, within noise" if undecided else verdict


def _bench_notes(record: Record) -> list[tuple[str, str]]:
    agreement = record["agreement"]
    notes = [
        ("Interval", record["interval"]),
        (
            "bf16",
            "largest shift of a layer's mean from fp32: "
            f"{agreement['bf16']['difference']:+.2e} in layer {agreement['bf16']['layer']}",
        ),
        (
            "Same work",
            "largest difference of a layer's mean, the seed's way from analyze: "
            f"{agreement['seed']['difference']:+.2e} in layer {agreement['seed']['layer']}",
        ),
        ("Peer", f"{record['peer']['reason']} ({record['peer']['source']})"),
    ]
    if record["memory"]["reason"] is None:
        notes.append(("Memory", record["memory"]["what"]))
    return notes

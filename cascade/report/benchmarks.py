"""Benchmarks for the terminal: speed, ratios, memory, and the targets met or missed."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.text import Text

from cascade.report.common.records import Record, check_record
from cascade.report.common.terminal import print_heading, print_pairs, print_table

_RATIOS = "Ratios of seconds: median and 95 % interval over rounds"


def print_bench(record: Record, console: Console) -> None:
    """Print a benchmark: speed of every way, ratios, memory, and targets met or not.

    Args:
        record: A saved record of kind `bench.collect`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema.
    """
    check_record(record, "bench.collect", ())
    print_pairs(_bench_headline(record), console)
    print_heading("Speed", console)
    _print_speed(record, console)
    print_heading(_RATIOS, console)
    _print_ratios(record, console)
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
    _print_targets(record, console)
    print_heading("Notes", console)
    print_pairs(_bench_notes(record), console)


def print_decoding(record: Record, console: Console) -> None:
    """Print a benchmark of decoding: speed, ratios, what was computed, targets met or not.

    Args:
        record: A saved record of kind `bench.decode`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema.
    """
    check_record(record, "bench.decode", ())
    print_pairs(_decoding_headline(record), console)
    print_heading("Speed", console)
    _print_speed(record, console)
    print_heading(_RATIOS, console)
    _print_ratios(record, console)
    print_heading("What was generated", console)
    print_table(
        ("exits", "layers/token", "rows of layers", "LM head", "as generate", "way"),
        _generated_rows(record),
        console,
        gap=2,
        text_columns=1,
    )
    for title, section in (
        ("assistant_early_exit, over fewer tokens", record["assistant"]),
        ("Scoring with 70 % of the tokens out early", record["scoring"]),
    ):
        print_heading(title, console)
        if section["reason"] is not None:
            console.print(Text(f"Not measured: {section['reason']}."))
            continue
        _print_speed(section, console)
        _print_ratios(section, console)
    print_heading("Targets (set for 2 cores)", console)
    _print_targets(record, console)
    print_heading("Notes", console)
    print_pairs(_decoding_notes(record), console)


def print_fitting(record: Record, console: Console) -> None:
    """Print a benchmark of fitting heads: speed, the ratio, and its target met or not.

    Args:
        record: A saved record of kind `bench.fit`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema.
    """
    check_record(record, "bench.fit", ())
    settings = record["settings"]
    heads = ("Heads", f"layers {', '.join(map(str, settings['layers']))}, in one pass")
    print_pairs([*_bench_headline(record), heads], console)
    print_heading("Speed", console)
    _print_speed(record, console)
    print_heading(_RATIOS, console)
    _print_ratios(record, console)
    print_heading("Targets (set for 2 cores and 100,000 tokens)", console)
    _print_targets(record, console)
    print_heading("Notes", console)
    print_pairs([("Interval", record["interval"])], console)


def print_gating(record: Record, console: Console) -> None:
    """Print a benchmark of the gate: speed, ratios, what surrounds it, and targets met or not.

    Args:
        record: A saved record of kind `bench.gate`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema.
    """
    check_record(record, "bench.gate", ())
    print_pairs(_bench_headline(record), console)
    print_heading("Speed", console)
    _print_speed(record, console)
    print_heading(_RATIOS, console)
    _print_ratios(record, console)
    print_heading("By themselves", console)
    print_table(
        ("median seconds", "fastest", "slowest", "what"),
        _alone_rows(record),
        console,
        gap=2,
        text_columns=1,
    )
    print_heading("Targets (set for 2 cores and 512 tokens)", console)
    _print_targets(record, console)
    print_heading("Notes", console)
    print_pairs(_gating_notes(record), console)


def _alone_rows(record: Record) -> list[list[str]]:
    return [
        [
            f"{np.median(row['seconds']):.3f}",
            f"{min(row['seconds']):.3f}",
            f"{max(row['seconds']):.3f}",
            name,
        ]
        for name, row in record["alone"].items()
    ]


def _gating_notes(record: Record) -> list[tuple[str, str]]:
    noise = "not needed here: the baseline was made on this machine"
    if record["elsewhere"]:
        noise = (
            f"the baseline was made elsewhere ({'; '.join(record['elsewhere'])}): the first gate "
            "here measures the noise as well, later ones read it from the cache"
        )
    return [
        ("Looks", f"after {', '.join(f'{tokens:,}' for tokens in record['looks'])} tokens"),
        ("Noise", noise),
        ("Interval", record["interval"]),
        *((name.capitalize(), row["what"]) for name, row in record["alone"].items()),
    ]


def print_collecting(record: Record, console: Console) -> None:
    """Print a benchmark of collecting hard tokens: speed, the ratio, its target met or not.

    Args:
        record: A saved record of kind `bench.collect-hard`.
        console: Where to print; its width and encoding are respected.

    Raises:
        ValueError: The record is of another kind or schema.
    """
    check_record(record, "bench.collect-hard", ())
    exit_layer = ("Exit", f"layer {record['settings']['layer']}")
    print_pairs([*_bench_headline(record), exit_layer], console)
    print_heading("Speed", console)
    _print_speed(record, console)
    print_heading(_RATIOS, console)
    _print_ratios(record, console)
    print_heading("Targets (set for 2 cores)", console)
    _print_targets(record, console)
    print_heading("Notes", console)
    print_pairs([("Interval", record["interval"])], console)


def _print_speed(record: Record, console: Console) -> None:
    print_table(
        ("tokens/s", "median seconds", "fastest", "slowest", "way"),
        _speed_rows(record),
        console,
        gap=2,
        text_columns=1,
    )


def _print_ratios(record: Record, console: Console) -> None:
    print_table(
        ("median", "interval", "way/reference"),
        _ratio_rows(record),
        console,
        gap=2,
        text_columns=1,
    )


def _print_targets(record: Record, console: Console) -> None:
    print_table(
        ("target", "limit", "measured", "verdict"),
        _target_rows(record),
        console,
        gap=1,
        text_columns=1,
    )


def _bench_headline(record: Record) -> list[tuple[str, str]]:
    provenance, settings = record["provenance"], record["settings"]
    return [
        ("Model", f"{provenance['model']['name']} on {provenance['model']['device']}"),
        (
            "Pass",
            f"{settings['tokens']:,} tokens in sequences of {settings['seq_len']:,}, "
            f"{settings['batch_size']} per batch; {settings['rounds']} rounds",
        ),
        ("Machine", _machine(record)),
    ]


def _decoding_headline(record: Record) -> list[tuple[str, str]]:
    provenance, settings, out = record["provenance"], record["settings"], record["exit"]
    model = provenance["model"]
    return [
        ("Model", f"{model['name']} on {model['device']}, {settings['dtype']}"),
        (
            "Round",
            f"{settings['prompts']} prompts of {settings['prompt_tokens']} tokens, "
            f"{settings['new_tokens']} new ones each, {settings['batch_size']} per batch; "
            f"{settings['rounds']} rounds",
        ),
        (
            "Exit",
            f"layer {out['layer']}, {out['rule']} from {settings['threshold']:.4g} on, "
            f"{out['head']} head ({out['heads']})",
        ),
        ("Machine", _machine(record)),
    ]


def _machine(record: Record) -> str:
    machine = record["provenance"]["machine"]
    load = machine["load_average_before"]
    busy = "" if load is None else f", load average before the start {load:.2f}"
    threads = record["settings"]["threads"]
    return f"{machine['processor']}, {machine['cores']} cores, {threads} threads{busy}"


def _generated_rows(record: Record) -> list[list[str]]:
    rows = []
    for name, row in record["generated"].items():
        counted = ["-"] * 4
        if "counts" in row:
            counts = row["counts"]
            counted = [
                f"{row['exit_share']:.3f}",
                f"{row['layers_per_token']:.2f}",
                f"{sum(counts['layer_rows']):,}",
                f"{counts['lm_head_rows']:,}",
            ]
        rows.append([*counted, f"{row['agreement']:.3f}", name])
    return rows


def _decoding_notes(record: Record) -> list[tuple[str, str]]:
    out, verified = record["exit"], record["generated"]["verified"]
    notes = [
        ("Interval", record["interval"]),
        ("Threshold", out["threshold"]),
        (
            "As generate",
            "share of new tokens that are those of generate at the same place; behind the first"
            " that differs, the texts are two",
        ),
        ("Verified", f"{verified['accepted']} of {verified['drafted']} drafted tokens confirmed"),
    ]
    if out["fallback"] is not None:
        notes.append(("Skipping", f"none: {out['fallback']}"))
    for row in record["scoring"].get("skipping", ()):
        notes.append(
            (
                row["name"],
                f"{row['exit_share']:.3f} of the tokens out, {row['flops_ratio']:.3f} of the "
                f"operations, {row['seconds_ratio']:.3f} of the time",
            )
        )
    return notes


def _speed_rows(record: Record) -> list[list[str]]:
    return [
        [
            _speed(way["tokens_per_second"]),
            f"{np.median(way['seconds']):.3f}",
            f"{min(way['seconds']):.3f}",
            f"{max(way['seconds']):.3f}",
            name,
        ]
        for name, way in record["ways"].items()
    ]


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.{0 if tokens_per_second >= 100 else 1}f}"


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

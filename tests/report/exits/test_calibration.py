"""The report of a calibration: thresholds with intervals, transfer and certificate."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
from msgspec.structs import replace
from rich.console import Console

from cascade.core.schema import SchemaError, from_plain, to_plain
from cascade.evaluation.calibration_record import CalibrationRecord
from cascade.report.common.exit_wording import ratio, show_threshold
from cascade.report.common.records import RULE_WORDS
from cascade.report.common.sections import html_page, markdown
from cascade.report.exits.calibration import calibration_report, print_calibration


def a_corpus(name: str) -> dict[str, Any]:
    return {
        "source": name,
        "name": name,
        "fingerprint": f"sha256:{name}",
        "records": 66,
        "tokens": 8192,
        "sequences": 64,
        "seq_len": 128,
    }


def a_fit(hard_ratio: float, threshold: float, *, ties: int = 0) -> dict[str, Any]:
    return {
        "hard_ratio": hard_ratio,
        "threshold": threshold,
        "reached": hard_ratio + 0.0012,
        "threshold_interval": [threshold - 0.001, threshold + 0.002],
        "reached_interval": [hard_ratio - 0.031, hard_ratio + 0.029],
        "ties": ties,
    }


def a_plain_record(*, rule: str = "cosine", head: str = "logit_lens") -> dict[str, Any]:
    heads = None if head == "logit_lens" else {"corpus": a_corpus("embedded-train")}
    return {
        "schema": 1,
        "kind": "calibration",
        "provenance": {
            "model": {
                "name": "tiny-llama",
                "family": "llama",
                "quantization": None,
                "num_layers": 30,
                "dtype": "float32",
                "device": "cpu",
            },
            "corpus": a_corpus("embedded-held-out"),
            "heads": heads,
        },
        "exit_layer": 29,
        "rule": rule,
        "seed": 0,
        "head": head,
        "propagation": "frozen",
        "interval": "95 % percentile bootstrap over whole sequences",
        "by_hard_ratio": [a_fit(0.3, 0.9461), a_fit(0.7, 0.9577)],
        "certificate": None,
        "transfer": None,
    }


def a_record(
    *, rule: str = "cosine", head: str = "logit_lens", **changes: Any
) -> CalibrationRecord:
    return from_plain(a_plain_record(rule=rule, head=head) | changes, CalibrationRecord)


def a_transfer() -> dict[str, Any]:
    rows = [
        {
            "from": "hard ratio 0.3",
            "threshold": 0.9461,
            "hard_ratio": 0.3384,
            "hard_ratio_interval": [0.2769, 0.3984],
            "loss": 0.2749,
            "loss_interval": [0.2349, 0.3105],
            "sequences": 16,
        },
        {
            "from": "risk 0.1",
            "threshold": 0.98765,
            "hard_ratio": 0.9123,
            "hard_ratio_interval": [0.9012, 0.9234],
            "loss": None,
            "loss_interval": None,
            "sequences": 16,
        },
    ]
    return {"corpus": a_corpus("other-tasks"), "rows": rows}


def a_certificate(threshold: float | None) -> dict[str, Any]:
    return {
        "threshold": threshold,
        "risk": 0.1,
        "confidence": 0.95,
        "sequences": 32 if threshold is None else 1032,
        "sequences_needed": 150,
        "empirical_risk": None if threshold is None else 0.0712,
        "p_values": [0.5, 0.6],
        "certified": 0 if threshold is None else 20,
        "reason": "the reason as the test gave it",
    }


def printed(record: CalibrationRecord, *, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.BytesIO()
    file = io.TextIOWrapper(stream, encoding=encoding)
    print_calibration(record, Console(file=file, width=width))
    file.flush()
    return stream.getvalue().decode(encoding)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_the_headline_names_model_corpus_layer_rule_head_and_propagation() -> None:
    head = flat(printed(a_record(head="ridge")).partition("Thresholds")[0])
    for part in (
        "tiny-llama (llama, 30 decoder layers)",
        "Exit layer 29, rule cosine; float32 on cpu",
        "Corpus embedded-held-out, 8,192 tokens: 64 sequences x 128",
        "Head ridge:",
        "Head corpus embedded-train, 8,192 tokens",
        "Propagation frozen:",
    ):
        assert part in head
    assert "Head corpus" not in printed(a_record())


def test_thresholds_are_shown_with_both_intervals() -> None:
    lines = [flat(line) for line in printed(a_record()).splitlines()]
    assert "30% 0.946100 0.945100 to 0.948100 30.12% 26.90% to 32.90%" in lines
    assert "70% 0.957700 0.956700 to 0.959700 70.12% 66.90% to 72.90%" in lines


def test_ties_are_a_column_only_if_there_are_any() -> None:
    assert "ties" not in printed(a_record())
    record = a_record(by_hard_ratio=[a_fit(0.3, 0.9461), a_fit(0.7, 0.9577, ties=1234)])
    lines = printed(record).splitlines()
    assert any(line.split()[:1] == ["70%"] and line.endswith("1,234") for line in lines)
    assert any(line.split()[:1] == ["30%"] and line.endswith(" 0") for line in lines)
    assert "exactly at the threshold" in printed(record)


def test_cosine_names_the_pair_of_history_entries() -> None:
    text = flat(printed(a_record()))
    assert "Exit layer 29, input and output (history[28] against history[29])." in text
    assert "Hard: similarity < threshold, the token continues." in text


def test_mean_cosine_names_both_pairs() -> None:
    text = flat(printed(a_record(rule="mean_cosine")))
    assert "history[27] against history[28], history[28] against history[29])." in text
    assert "Easy: mean similarity >= threshold" in text


@pytest.mark.parametrize("rule", ["top2_gap", "max_probability", "entropy", "patience"])
def test_other_rules_are_explained_without_a_pair(rule: str) -> None:
    text = flat(printed(a_record(rule=rule)))
    value, what = RULE_WORDS[rule]
    assert f"Exit layer 29: {what}. Hard: {value} < threshold" in text
    assert "history[" not in text


def test_an_unknown_rule_is_shown_by_its_name() -> None:
    text = flat(printed(a_record(rule="novel")))
    assert "Exit layer 29, rule novel. Hard: confidence < threshold" in text


def test_every_rule_is_explained() -> None:
    from cascade.evaluation.verdict import CONTROLS
    from cascade.exits.rules import RULES

    assert RULE_WORDS.keys() == RULES.keys() - {*CONTROLS}


def test_the_transfer_table_names_its_corpus_and_explains_the_loss() -> None:
    text = printed(a_record(transfer=a_transfer()))
    lines = [flat(line) for line in text.splitlines()]
    assert "0.946100 33.8% 27.7% to 39.8% 27.5% 23.5% to 31.1% hard ratio 0.3" in lines
    assert "0.987650 91.2% 90.1% to 92.3% - - risk 0.1" in lines
    assert "other-tasks, 8,192 tokens" in text
    assert "share of a sequence's tokens with another prediction than the full model" in flat(text)
    assert "other corpus" not in printed(a_record())


def test_the_same_text_is_not_called_another_corpus() -> None:
    transfer = a_transfer() | {"corpus": a_corpus("embedded-held-out")}
    text = flat(printed(a_record(transfer=transfer)))
    assert "thresholds on another corpus" not in text
    assert "The same thresholds on the same text" in text
    assert "Warning the thresholds were fitted on this text; use another corpus" in text


def test_few_sequences_give_a_warning() -> None:
    assert "Warning" not in printed(a_record())
    plain = a_plain_record()
    plain["provenance"]["corpus"]["sequences"] = 7
    text = flat(printed(from_plain(plain, CalibrationRecord)))
    assert "Warning 7 sequences are too few for reliable intervals" in text


def test_a_certificate_shows_its_threshold_risk_and_confidence() -> None:
    text = flat(printed(a_record(certificate=a_certificate(0.98765432))))
    assert "at most 10% of a sequence's tokens have another prediction" in text
    assert "with 95% confidence" in text
    assert "certified: threshold 0.987654" in text
    assert "1,032 sequences" in text
    assert "7.12% of their tokens had another prediction" in text
    assert "the reason as the test gave it" in text
    assert "use the full model" not in text


def test_too_few_test_sequences_name_the_number_needed() -> None:
    text = flat(printed(a_record(certificate=a_certificate(None))))
    assert "nothing is certified; use the full model, no token exits" in text
    assert "Tested none, because there are only 32 test sequences" in text
    assert "Needed at least 150 test sequences" in text
    assert "the reason as the test gave it" in text


def test_with_enough_test_sequences_no_number_is_shown() -> None:
    certificate = a_certificate(None) | {"sequences": 200}
    text = printed(a_record(certificate=certificate))
    assert "nothing is certified" in text
    assert "Needed" not in text


def test_without_a_hard_ratio_there_are_no_thresholds() -> None:
    text = printed(a_record(by_hard_ratio=[], certificate=a_certificate(0.98)))
    assert "Thresholds by target hard ratio\nnone\n" in text


def everything() -> CalibrationRecord:
    transfer = a_transfer()
    transfer["rows"][0].update({"threshold": -0.123456, "from": "hard ratio 0.333333", "loss": 1.0})
    return a_record(
        rule="mean_cosine",
        head="ridge",
        by_hard_ratio=[a_fit(0.333333, -0.123456, ties=8192)],
        transfer=transfer,
        certificate=a_certificate(-0.25),
    )


@pytest.mark.parametrize("width", [80, 100, 132])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_line_is_longer_than_the_console(width: int, encoding: str) -> None:
    lines = printed(everything(), width=width, encoding=encoding).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)


def test_markup_and_control_characters_in_a_name_are_escaped() -> None:
    plain = a_plain_record() | {"transfer": a_transfer()}
    plain["provenance"]["model"]["name"] = "[red]x[/red] :smile: [/nothing] \x1b[2J"
    plain["transfer"]["rows"][0]["from"] = "[b]"
    text = printed(from_plain(plain, CalibrationRecord))
    assert "[red]x[/red] :smile: [/nothing] \\x1b[2J" in text
    assert "[b]" in text
    assert "\x1b" not in text


def test_a_non_ascii_name_is_printed_on_an_ascii_console() -> None:
    plain = a_plain_record()
    plain["provenance"]["model"]["name"] = "模型"
    record = from_plain(plain, CalibrationRecord)
    assert "\\u6a21\\u578b" in printed(record, encoding="ascii")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "saturation"}, "expected kind 'calibration', got 'saturation'"),
        ({"schema": 2}, "expected schema 1, got 2"),
        (
            {"by_hard_ratio": [replace(a_record().by_hard_ratio[0], threshold=float("nan"))]},
            "expected numbers, got nan at by_hard_ratio[0].threshold; create the record again",
        ),
    ],
)
def test_a_record_of_another_kind_or_schema_or_with_nan_gives_a_one_line_error(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        printed(replace(a_record(), **change))
    assert "\n" not in str(caught.value)


def test_an_incomplete_calibration_is_refused() -> None:
    plain = a_plain_record()
    del plain["certificate"]
    with pytest.raises(SchemaError, match="expected an object or null at certificate, got nothing"):
        from_plain(plain, CalibrationRecord)


def test_printing_does_not_change_the_record() -> None:
    record = everything()
    before = copy.deepcopy(to_plain(record))
    printed(record)
    assert to_plain(record) == before


def test_the_report_is_the_same_as_a_page_and_as_markdown() -> None:
    report = calibration_report(everything())
    for text in (html_page(report), markdown(report)):
        assert "Thresholds by target hard ratio" in text
        assert "hard ratio 0.333333" in text
        assert "certified: threshold -0.250000" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.9461492896080017, "0.946149"),
        (-0.25, "-0.250000"),
        (1.0, "1.000000"),
        (0.0, "0.000000"),
        (0.9999999, "0.9999999"),
        (1e-7, "0.00000010"),
        (3.0, "3"),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
    ],
)
def test_only_thresholds_of_zero_or_one_are_shown_as_such(value: float, shown: str) -> None:
    assert show_threshold(value).rstrip("0") == shown.rstrip("0")
    assert float(show_threshold(value)) == pytest.approx(value, abs=5e-7)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.0, "0.000"),
        (1.0235, "1.024"),
        (12.345, "12.35"),
        (123.45, "123.5"),
        (1234.5, "1234"),
        (37_298_780.0, "3.7e7"),
        (float("inf"), "inf"),
    ],
)
def test_ratios_are_short(value: float | None, shown: str) -> None:
    assert ratio(value) == shown

"""The report of generated text: all tokens with their exit layers, and a summary."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
from rich.console import Console

from cascade.core.schema import from_plain
from cascade.decoding.transcript import GenerationRecord
from cascade.report.exits.generation import print_generation


def a_record(layers: list[int] | None = None, tokens: list[str] | None = None) -> dict[str, Any]:
    layers = [24, 24, 30, 28, 24] if layers is None else layers
    tokens = [" Paris", ",", " which", " is", " big"] if tokens is None else tokens
    return {
        "schema": 1,
        "kind": "generation",
        "prompt": "The capital of France is",
        "chat": False,
        "num_layers": 30,
        "exits": [
            {"layer": 24, "rule": "top2_gap", "threshold": 0.381, "head": "ridge"},
            {"layer": 28, "rule": "cosine", "threshold": None, "head": "ridge"},
        ],
        "propagation": "ridge",
        "tokens": tokens,
        "exit_layers": layers,
        "by_layer": [
            {"layer": 24, "tokens": 3, "share": 0.6},
            {"layer": 28, "tokens": 1, "share": 0.2},
            {"layer": 30, "tokens": 1, "share": 0.2},
        ],
        "layers_per_token": 26.314,
        "tokens_per_second": 14.21,
        "counts": {
            "layer_rows": [1000] * 30,
            "pairs": [1000] * 30,
            "key_value_rows": [0] * 30,
            "predicted_rows": [0] * 30,
            "lm_head_rows": 1061,
            "head_rows": {},
        },
        "verified": False,
        "drafted": 0,
        "accepted": 0,
        "fallback_reason": None,
        "full": {
            "text": " Paris, which is\nlarge",
            "tokens": 5,
            "same_tokens": 4,
            "tokens_per_second": 12.93,
            "speed_ratio": 1.0991,
        },
    }


def printed(record: dict[str, Any], *, encoding: str = "utf-8", **options: Any) -> str:
    stream = io.BytesIO()
    file = io.TextIOWrapper(stream, encoding=encoding)
    print_generation(
        from_plain(record, GenerationRecord), Console(file=file, **{"width": 80, **options})
    )
    file.flush()
    return stream.getvalue().decode(encoding)


def on_a_terminal(record: dict[str, Any], **options: Any) -> str:
    return printed(record, force_terminal=True, color_system="standard", **options)


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def flat(text: str) -> str:
    return " ".join(text.split())


def test_without_colours_marks_show_exit_layers() -> None:
    text = printed(a_record())
    assert text.startswith(
        "The capital of France is [24]Paris, [30]which [28]is [24]big\n\nExit layers\n"
    )
    assert "A mark applies to all tokens up to the next mark." in text
    assert "\x1b" not in text


def test_no_color_gives_marks_on_a_terminal() -> None:
    assert "is [24]Paris, [30]which" in without_codes(on_a_terminal(a_record(), no_color=True))


def test_on_a_terminal_tokens_have_the_colours_of_the_legend() -> None:
    text = on_a_terminal(a_record())
    first = text.splitlines()[0]
    assert without_codes(first) == "The capital of France is Paris, which is big"
    assert "\x1b[32m Paris,\x1b[0m\x1b[31m which\x1b[0m\x1b[36m is\x1b[0m" in first
    legend = {line.split()[0]: line for line in without_codes(text).splitlines() if "%" in line}
    assert legend["24"].split() == ["24", "3", "60.0%", "green", "exited"]
    assert legend["28"].split() == ["28", "1", "20.0%", "cyan", "exited"]
    assert legend["30"].split() == ["30", "1", "20.0%", "red", "all", "layers"]
    for code, word in ((32, "green"), (36, "cyan"), (31, "red")):
        assert re.search(rf"\x1b\[{code}m{word} *\x1b", text)


def test_the_prompt_is_plain() -> None:
    assert on_a_terminal(a_record()).startswith("The capital of France is\x1b[32m")


def test_an_answer_is_separated_from_the_question() -> None:
    for shown in (printed, on_a_terminal):
        text = without_codes(shown(a_record() | {"chat": True}))
        assert re.match(r"The capital of France is\n\n (\[24\])?Paris,", text)


def test_an_exit_layer_without_tokens_is_in_the_legend() -> None:
    record = a_record([30], [" Paris"])
    record["by_layer"] = [
        {"layer": 24, "tokens": 0, "share": 0.0},
        {"layer": 30, "tokens": 1, "share": 1.0},
    ]
    text = printed(record)
    assert re.search(r"^ +24 +0 +0\.0% +\[24\] +exited$", text, flags=re.MULTILINE)
    assert "for 1 new token\n" in text


def test_the_summary_shows_all_fields_of_the_record() -> None:
    text = flat(printed(a_record()))
    for part in (
        "layer 24, top2_gap >= 0.381000; ridge",
        "layer 28, no threshold: no token exits; ridge",
        "26.31 of 30 computed per token, including the prompt's tokens, which the table above does "
        "not count",
        "14.2 tokens/s, 1.10 x the full model's 12.9 tokens/s",
        "1,061 rows for 5 new tokens",
        "the first 4 of 5 new tokens are the same as the full model's",
        "Full model Paris, which is large",
    ):
        assert part in text
    assert "drafted" not in text
    assert "No skipping" not in text


def test_verified_drafts_are_counted() -> None:
    record = a_record() | {"verified": True, "drafted": 1024, "accepted": 1003}
    text = flat(printed(record))
    assert "early exit drafted 1,024 tokens, of which the full model confirmed 1,003" in text


def test_text_without_drafts_and_exits_says_so() -> None:
    record = a_record() | {"verified": True, "exits": []}
    text = flat(printed(record))
    assert "Verified the full model chose every token" in text
    assert "drafted" not in text


def test_text_equal_to_the_full_models_is_reported() -> None:
    record = a_record()
    record["full"]["same_tokens"] = 5
    text = printed(record)
    assert "all tokens are the same as the full model's" in text
    assert "Full model " not in text


def test_a_text_that_only_begins_like_the_full_models_is_not_the_same() -> None:
    record = a_record()
    record["full"].update(same_tokens=5, tokens=9)
    assert "the first 5 of 5 new tokens are the same as the full model's" in printed(record)


def test_without_the_full_model_there_is_only_the_speed() -> None:
    text = printed(a_record() | {"full": None})
    assert re.search(r"Speed +14\.2 tokens/s\n", text)
    assert "full model's" not in text


def test_the_reason_for_a_fallback_is_shown() -> None:
    text = flat(printed(a_record() | {"fallback_reason": "fused projections"}))
    assert "No skipping every layer computed every token here: fused projections" in text


def test_markup_and_control_characters_of_the_text_are_escaped() -> None:
    record = a_record([24, 30], ["[red]\x1b[31m\x07", " [/x] :smile:\r"])
    text = printed(record)
    assert "[24][red]\\x1b[31m\\x07 [30][/x] :smile:\\r" in text
    assert "\x1b" not in text


def test_line_breaks_of_the_text_are_kept() -> None:
    text = printed(a_record([24, 24], [" one", "\ntwo"]))
    assert text.startswith("The capital of France is [24]one\ntwo\n")


def test_an_ascii_console_gets_escapes_for_what_it_lacks() -> None:
    text = printed(a_record([24, 30], [" café", " 模"]), encoding="ascii")
    assert "[24]caf\\xe9 [30]\\u6a21" in text


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_longer_than_the_console(encoding: str, width: int) -> None:
    record = a_record([24, 28, 30] * 50, [" word", " other", "…"] * 50)
    record["fallback_reason"] = "a long reason " * 20
    lines = printed(record, encoding=encoding, width=width).splitlines()
    assert max(map(len, lines)) <= max(width, 50)


def test_many_exit_layers_are_distinguished_by_marks() -> None:
    layers = list(range(1, 31))
    record = a_record(layers, [f" w{layer}" for layer in layers])
    record["by_layer"] = [{"layer": layer, "tokens": 1, "share": 1 / 30} for layer in layers]
    text = printed(record)
    assert all(f"[{layer}]w{layer}" in text for layer in layers)
    on_a_terminal(record)


def test_a_generation_without_tokens_is_shown() -> None:
    record = a_record([], []) | {"by_layer": [], "full": None}
    text = printed(record)
    assert text.startswith("The capital of France is\n\nExit layers\nnone\n")
    assert "0 new tokens" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "evaluation"}, 'at kind, got "evaluation"'),
        ({"schema": 2}, "expected schema 1, got 2"),
        ({"layers_per_token": float("nan")}, "at layers_per_token, got NaN"),
        ({"exit_layers": [24]}, "expected one exit layer per token, got 1 for 5 tokens"),
        ({"exit_layers": [7] * 5}, "expected exit layers among those of by_layer, got 7"),
    ],
)
def test_an_invalid_record_gives_a_one_line_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        printed(a_record() | change)
    assert "\n" not in str(caught.value)


def test_an_incomplete_record_is_refused() -> None:
    record = a_record()
    del record["by_layer"]
    with pytest.raises(ValueError, match="expected a list at by_layer, got nothing"):
        printed(record)


def test_printing_does_not_change_the_record() -> None:
    record = a_record()
    before = copy.deepcopy(record)
    printed(record)
    assert record == before

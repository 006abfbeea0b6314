"""Generated text is shown whole, and every token tells the layer at which it left."""

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


def test_without_colours_marks_tell_where_tokens_left() -> None:
    text = printed(a_record())
    assert text.startswith(
        "The capital of France is [24]Paris, [30]which [28]is [24]big\n\nWhere the tokens left\n"
    )
    assert "A mark holds for all tokens up to the next one." in text
    assert "\x1b" not in text


def test_no_color_brings_marks_even_on_a_terminal() -> None:
    assert "is [24]Paris, [30]which" in without_codes(on_a_terminal(a_record(), no_color=True))


def test_on_a_terminal_tokens_have_the_colours_of_the_legend() -> None:
    text = on_a_terminal(a_record())
    first = text.splitlines()[0]
    assert without_codes(first) == "The capital of France is Paris, which is big"
    assert "\x1b[32m Paris,\x1b[0m\x1b[31m which\x1b[0m\x1b[36m is\x1b[0m" in first
    legend = {line.split()[0]: line for line in without_codes(text).splitlines() if "%" in line}
    assert legend["24"].split() == ["24", "3", "60.0%", "green", "left"]
    assert legend["28"].split() == ["28", "1", "20.0%", "cyan", "left"]
    assert legend["30"].split() == ["30", "1", "20.0%", "red", "went", "all", "the", "way"]
    for code, word in ((32, "green"), (36, "cyan"), (31, "red")):
        assert re.search(rf"\x1b\[{code}m{word} *\x1b", text)


def test_the_prompt_is_plain() -> None:
    assert on_a_terminal(a_record()).startswith("The capital of France is\x1b[32m")


def test_an_answer_stands_apart_from_the_question() -> None:
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
    assert re.search(r"^ +24 +0 +0\.0% +\[24\] +left$", text, flags=re.MULTILINE)
    assert "for 1 new token\n" in text


def test_the_summary_says_everything_that_the_record_does() -> None:
    text = flat(printed(a_record()))
    for part in (
        "layer 24, top2_gap >= 0.381000; ridge",
        "layer 28, never; ridge",
        "26.31 of 30 computed per token, the prompt's tokens included, which the table above does "
        "not count",
        "14.2 tokens/s, the full model 12.9 tokens/s: 1.10 x its speed",
        "1,061 rows for 5 new tokens",
        "the first 4 of 5 new tokens are the full model's",
        "Full model Paris, which is large",
    ):
        assert part in text
    assert "drafted" not in text
    assert "No skipping" not in text


def test_drafts_are_told_where_they_were_verified() -> None:
    record = a_record() | {"verified": True, "drafted": 1024, "accepted": 1003}
    text = flat(printed(record))
    assert "exits drafted 1,024 tokens, the full model confirmed 1,003 of them" in text


def test_the_same_text_as_the_full_models_is_said_to_be_the_same() -> None:
    record = a_record()
    record["full"]["same_tokens"] = 5
    text = printed(record)
    assert "the text is the full model's, token for token" in text
    assert "Full model " not in text


def test_a_text_that_only_begins_like_the_full_models_is_not_the_same() -> None:
    record = a_record()
    record["full"].update(same_tokens=5, tokens=9)
    assert "the first 5 of 5 new tokens are the full model's" in printed(record)


def test_without_the_full_model_there_is_only_the_speed() -> None:
    text = printed(a_record() | {"full": None})
    assert re.search(r"Speed +14\.2 tokens/s\n", text)
    assert "full model's" not in text


def test_a_fallback_says_why() -> None:
    text = flat(printed(a_record() | {"fallback_reason": "fused projections"}))
    assert "No skipping every layer computed every token here: fused projections" in text


def test_markup_and_control_characters_of_the_model_are_shown_and_do_nothing() -> None:
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


def test_many_exit_layers_are_told_apart_by_marks() -> None:
    layers = list(range(1, 31))
    record = a_record(layers, [f" w{layer}" for layer in layers])
    record["by_layer"] = [{"layer": layer, "tokens": 1, "share": 1 / 30} for layer in layers]
    text = printed(record)
    assert all(f"[{layer}]w{layer}" in text for layer in layers)
    on_a_terminal(record)


def test_no_token_at_all_is_no_error() -> None:
    record = a_record([], []) | {"by_layer": [], "full": None}
    text = printed(record)
    assert text.startswith("The capital of France is\n\nWhere the tokens left\nnone\n")
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
def test_a_record_that_cannot_be_shown_is_refused_in_one_line(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        printed(a_record() | change)
    assert "\n" not in str(caught.value)


def test_a_record_without_a_section_is_refused_by_name() -> None:
    record = a_record()
    del record["by_layer"]
    with pytest.raises(ValueError, match="expected a list at by_layer, got nothing"):
        printed(record)


def test_printing_leaves_the_record_as_it_was() -> None:
    record = a_record()
    before = copy.deepcopy(record)
    printed(record)
    assert record == before

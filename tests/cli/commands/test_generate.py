"""`cascade generate`, run as a user would, on a tiny checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.commands import Done, Run
from support.drafting import FREE
from support.tiny_drafters import stored

from cascade import load
from cascade.decoding import generation


def test_generate_shows_exit_layers_and_the_full_models_text(tiny: Run, here: Path) -> None:
    done = tiny(
        "generate", "--prompt", "Number 7", "--layer", 2, "--threshold", 0.5, "--max-new-tokens", 8
    )
    assert done.status == 0, done.err
    assert "Number 7" in done.out
    assert "tokens/s" in done.out


def test_verified_text_equals_the_full_models(tiny: Run, here: Path) -> None:
    done = tiny(
        "generate",
        *("--prompt", "Number 7", "--layer", 2, "--threshold=-1", "--verify"),
        *("--max-new-tokens", 12),
    )
    assert done.status == 0, done.err
    assert "all tokens are the same as the full model's" in done.out


def test_a_drafter_drafts_without_changing_the_text(
    tiny: Run, here: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = load(str(models / "tiny"))
    stored(here / "drafter", stack, use="table and network")
    monkeypatch.setattr(generation, "pass_costs", lambda *_: FREE)
    prompt = ("generate", "--prompt", "Number 7", "--max-new-tokens", 12, "--json")
    plain, done = tiny(*prompt), tiny(*prompt, "--drafter", "drafter")
    assert done.status == plain.status == 0, done.err
    made, own = json.loads(done.out), json.loads(plain.out)
    assert made["tokens"] == own["tokens"]
    assert made["proposers"] == ["n-gram", "table", "drafter", "runner-ups"]
    assert made["drafted"] > 0


def test_a_drafter_of_another_model_is_refused(tiny: Run, here: Path) -> None:
    stored(here / "drafter")
    done = tiny("generate", "--prompt", "x", "--drafter", "drafter")
    assert (done.status, done.out) == (2, "")
    assert "the weights of this drafter belong to" in done.err


def test_a_pad_token_within_the_prompt_is_text(run: Run, folder: Path, models: Path) -> None:
    pads = {"pad_token_id": ord("m") - 30, "eos_token_id": 1}  # the tiny tokenizer's number of it
    (folder / "generation_config.json").write_text(json.dumps(pads))
    prompt = ("--prompt", "Number 7", "--max-new-tokens", 4)
    usual = run("generate", "--model", models / "tiny", *prompt)
    done = run("generate", "--model", folder, *prompt)
    assert done.status == usual.status == 0, done.err
    # The same text: no token of the prompt was taken for padding.
    assert done.out.splitlines()[0] == usual.out.splitlines()[0]
    assert done.out.startswith("Number 7")


def test_sampling_defaults_are_the_models_own(run: Run, here: Path, models: Path) -> None:
    shutil.copytree(models / "tiny", here / "tame")
    (here / "tame" / "generation_config.json").write_text(json.dumps({"top_p": 0.01}))
    prompt = ("generate", "--model", "tame", "--prompt", "Number 7", "--max-new-tokens", 12)
    prompt = (*prompt, "--layer", 2)
    greedy, own, free = (
        run(*prompt, "--no-compare", *options).out.splitlines()[0]
        for options in ((), ("--sample",), ("--sample", "--top-k", 0, "--top-p", 1))
    )
    assert own == greedy
    assert free != greedy


QWEN = {
    "repetition_penalty": 1.7,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.8,
    "top_k": 20,
    "pad_token_id": 0,
    "transformers_version": "4.37.0",
}


def first_line(done: Done) -> str:
    assert done.status == 0, done.err
    return done.out.splitlines()[0]


def test_the_models_generation_config_is_followed_and_recorded(
    run: Run, here: Path, models: Path
) -> None:
    shutil.copytree(models / "tiny", here / "qwen")
    config = here / "qwen" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | QWEN))
    (here / "given.json").write_text(json.dumps(QWEN | {"do_sample": False, "colour": "red"}))
    # With exits, marks do not depend on how fast this machine is.
    given = ("--prompt", "Number 7", "--max-new-tokens", 12, "--layer", 2)
    own = run("generate", "--model", "qwen", *given)
    plain = run("generate", "--model", models / "tiny", *given)
    assert first_line(own) != first_line(plain)
    summary = " ".join(own.out.split())
    assert "Choice the likeliest token; repetition_penalty 1.7" in summary
    assert "all tokens are the same as the full model's" in summary
    assert "Choice" not in plain.out
    options: tuple[tuple[object, ...], ...] = (
        ("--repetition-penalty", 1.7),
        ("--generation-config", "repetition_penalty=1.7"),
        ("--generation-config", "given.json"),
        ("--generation-config", "repetition_penalty=5.0", "--generation-config", "given.json"),
        ("--generation-config", "repetition_penalty=null", "--repetition-penalty", 1.7),
    )
    for more in options:
        done = run("generate", "--model", models / "tiny", *given, *more)
        assert first_line(done) == first_line(own)
    assert (
        "transformers does not know these settings of given.json: colour"
        in run(
            "generate", "--model", models / "tiny", *given, "--generation-config", "given.json"
        ).err
    )
    off = run("generate", "--model", "qwen", *given, "--generation-config", "repetition_penalty=1")
    assert first_line(off) == first_line(plain)
    record = json.loads(
        run("generate", "--model", "qwen", *given, "--sample", "--min-p", 0.1, "--json").out
    )
    assert record["settings"].pop("eos_token_id")
    assert record["settings"] == {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "seed": 0,
        "min_p": 0.1,
        "repetition_penalty": 1.7,
    }


def test_settings_that_are_refused_can_be_turned_off_as_the_error_says(
    run: Run, here: Path, models: Path
) -> None:
    shutil.copytree(models / "tiny", here / "beams")
    (here / "beams" / "generation_config.json").write_text('{"num_beams": 4, "guidance_scale": 2}')
    given = ("generate", "--model", "beams", "--prompt", "Number 7", "--max-new-tokens", 2)
    refused = run(*given)
    assert (refused.status, refused.out) == (2, "")
    off = "guidance_scale=1, num_beams=1"
    assert f"turn them off with {off} (on the command line, each after --gen" in refused.err
    more = [word for pair in off.split(", ") for word in ("--generation-config", pair)]
    assert run(*given, *more).status == 0


def test_a_prompt_that_is_too_long_is_refused_before_a_forward_pass(
    tiny: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade.decoding.selective_layers import LayerTask, SkippingLayers

    widths, run = [], SkippingLayers.run

    def spy(self: SkippingLayers, task: LayerTask) -> Any:
        widths.append(task.hidden.shape[1])
        return run(self, task)

    monkeypatch.setattr(SkippingLayers, "run", spy)
    done = tiny("generate", "--prompt", "x" * 30, "--max-new-tokens", 40)
    assert (done.status, done.out) == (2, "")
    assert "a prompt of 30 tokens and 40 new tokens exceed the model's 64 positions" in done.err
    assert max(widths, default=0) < 30


def test_the_default_layer_of_generate_is_one_that_the_heads_have(
    tiny: Run, fitted: Path, here: Path
) -> None:
    assert tiny("fit-heads", "--layers", "1,2", "--output", "low.safetensors").status == 0
    for heads, layer in ((fitted, 3), ("low.safetensors", 2)):
        given = ("--prompt", "Number 7", "--heads", heads, "--max-new-tokens", 2)
        done = tiny("generate", *given, "--no-compare")
        assert done.status == 0, done.err
        assert f"layer {layer}, no threshold: no token exits; ridge" in " ".join(done.out.split())


def test_a_chat_answer_is_separated_from_its_prompt(run: Run, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}:")
    given = ("generate", "--model", folder, "--prompt", "Number 7", "--max-new-tokens", 2)
    given = (*given, "--layer", 2)
    for options, behind in (((), ""), (("--chat",), "\n\n")):
        done = run(*given, "--no-compare", *options)
        assert done.status == 0, done.err
        assert re.match(rf"Number 7{behind} *\[4\]", done.out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "  "), "expected text in --prompt, got an empty one"),
        (("--prompt", "x" * 70), "exceed the model's 64 positions"),
        (("--prompt", "x", "--max-new-tokens", 64), "exceed the model's 64 positions"),
        (("--prompt", "x", "--threshold", 3), "the rule cosine gives confidences from -1 to 1"),
        (("--prompt", "x", "--layer", 5, "--threshold", 0.5), "expected an exit layer in 1..4"),
        (
            ("--prompt", "x", "--rule", "oracle", "--threshold", 0.5),
            "it can score but not generate",
        ),
        (("--prompt", "x", "--temperature", 0, "--sample"), "leave out --sample"),
        (("--prompt", "x", "--temperature", "nan", "--sample"), "expected a --temperature above 0"),
        (("--prompt", "x", "--top-p", 0.5), "--top-p need --sample; add it"),
        (("--prompt", "x", "--min-p", 0.5), "--min-p need --sample; add it"),
        (
            ("--prompt", "x", "--generation-config", "min_p=big"),
            "expected KEY=VALUE with a value in JSON (1.3, true, null, [1, 2]) after",
        ),
        (
            ("--prompt", "x", "--generation-config", "none.json"),
            "got 'none.json', which cannot be read (No such file or directory); correct it",
        ),
        (
            ("--prompt", "x", "--generation-config", "beam=4"),
            "expected settings of a GenerationConfig of transformers, or seed, got beam",
        ),
        (
            ("--prompt", "x", "--repetition-penalty", 0),
            "transformers rejects the generation settings repetition_penalty: `penalty` has to be",
        ),
        (("--prompt", "x\udcff"), "expected a --prompt in UTF-8"),
        (("--prompt", "x" * 50, "--max-new-tokens", 20), "exceed the model's 64 positions"),
        (
            ("--prompt", "x", "--top-k", -1, "--sample"),
            "expected top_k to be an integer of at least 0, got -1",
        ),
        (("--prompt", "x", "--hard-ratio", 0.5), "--hard-ratio needs --calibration"),
        (("--prompt", "x", "--chat"), "no chat template"),
        (
            ("--prompt", "x", "--drafter", "none"),
            "no record none/record.json; make one with `cascade train-drafter`",
        ),
        (
            ("--prompt", "x", "--drafter", "none", "--layer", 2),
            "--drafter drafts for the full model, and exits were asked for as well; leave out",
        ),
        (("--prompt", "x", "--calibration", "none.json"), "cascade calibrate"),
        *(
            (
                ("--prompt", "x", "--calibration", "none.json", option, value),
                "--calibration sets layer, rule, threshold and propagation; leave out " + option,
            )
            for option, value in (
                *(("--layer", 2), ("--threshold", 0.5), ("--rule", "cosine")),
                *(("--rule", "top2_gap"), ("--propagation", "frozen")),
            )
        ),
        (
            ("--prompt", "x", "--calibration", "c", "--rule", "cosine", "--propagation", "exact"),
            "leave out --rule, --propagation",
        ),
        (
            ("--prompt", "x", "--verify", "--propagation", "ridge"),
            "--verify needs --propagation exact, got ridge",
        ),
        (
            ("--prompt", "x", "--rule", "patience", "--threshold", 1),
            "the rule patience needs an earlier exit, and there is none below layer 3",
        ),
    ],
)
def test_generate_rejects_invalid_options_in_one_line(
    tiny: Run, here: Path, arguments: tuple[object, ...], message: str
) -> None:
    done = tiny("generate", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1

"""The commands of early exit, run as a user would, on a tiny checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import Run
from support.disk import contents, largest_file

COMMON = ("--corpus", "texts.jsonl", "--seq-len", 16)


@pytest.fixture
def tiny(run: Run, models: Path) -> Callable[..., Any]:
    """Run a command with the tiny model on the corpus at hand."""

    def tiny(command: str, *arguments: object) -> Any:
        corpus = () if command == "generate" else COMMON
        return run(command, "--model", models / "tiny", *corpus, *arguments)

    return tiny


@pytest.fixture(scope="session")
def fitted(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of the tiny model's layers 2 and 3."""
    import numpy as np

    from cascade import TokenBlocks, fit_heads, load

    stack = load(str(models / "tiny"))
    ids = np.random.default_rng(0).integers(2, 97, (40, 16)).astype(np.int32)
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    fit_heads(stack, TokenBlocks(ids, "random", "random", 40), [2, 3]).save(path)
    return path


def read(path: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(Path(path).read_text())
    return record


# --- fit-heads -------------------------------------------------------------------------------


def test_heads_are_fitted_distilled_and_then_serve(tiny: Run, here: Path) -> None:
    done = tiny("fit-heads", "--layers", "2,3", "--distill", 1, "--output", "h.safetensors")
    assert done.status == 0, done.err
    assert "Layer 2: KL to the full model" in done.out
    assert "Wrote h.safetensors" in done.err
    served = tiny("evaluate", "--heads", "h.safetensors", "--propagation", "ridge", "--output", "e")
    assert served.status == 0, served.err
    assert {row["head"] for row in read("e/evaluation.json")["points"]} == {"ridge"}


def test_half_precision_halves_the_file(tiny: Run, here: Path) -> None:
    for name, options in (("a", ()), ("b", ("--half",))):
        output = f"{name}.safetensors"
        assert tiny("fit-heads", "--layers", "3", "--output", output, *options).status == 0
    sizes = [Path(f"{name}.safetensors").stat().st_size for name in "ab"]
    assert sizes[1] < 0.75 * sizes[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "0"), "expected an exit layer in 1..4, got 0"),
        (("--layers", "5"), "expected an exit layer in 1..4, got 5"),
        (("--layers", "2,2"), "expected distinct exit layers"),
        (("--layers", "two"), "expected layers such as 24 or 20,24,28, got 'two'"),
        (("--layers", "2", "--output", "h.bin"), "expected --output to be a .safetensors file"),
        (("--layers", "2", "--seq-len", 65), "exceed the model's 64 positions"),
        (("--layers", "2", "--distill", 1, "--max-tokens", 64), "expected at least 10"),
        (("--layers", "2", "--distill", 1, "--seed", 2**64), f"got '{2**64}'"),
    ],
)
def test_fitting_refuses_in_one_line_and_writes_nothing(
    tiny: Run, here: Path, arguments: tuple[object, ...], message: str
) -> None:
    before = contents(here)
    done = tiny("fit-heads", "--output", "h.safetensors", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert contents(here) == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("texts.jsonl/h.safetensors", "cannot write texts.jsonl/h.safetensors: "),
        ("x" * 300 + ".safetensors", "File name too long; choose a folder you can write to"),
        ("folder.safetensors", "folder.safetensors is a folder, expected a file"),
    ],
)
def test_heads_that_could_not_be_written_are_not_fitted(
    tiny: Run, here: Path, output: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade.models.loading.load", None)  # refused before the model is read
    (here / "folder.safetensors").mkdir()
    before = contents(here)
    done = tiny("fit-heads", "--layers", "2", "--output", output, "--overwrite")
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert contents(here) == before


def test_fitting_replaces_heads_only_when_told(tiny: Run, here: Path) -> None:
    Path("h.safetensors").write_text("mine")
    done = tiny("fit-heads", "--layers", "2", "--output", "h.safetensors")
    assert done.status == 2
    assert "h.safetensors exists" in done.err
    assert Path("h.safetensors").read_text() == "mine"
    with largest_file(1000):
        done = tiny("fit-heads", "--layers", "2", "--output", "h.safetensors", "--overwrite")
    assert done.status == 2
    assert "cannot write h.safetensors" in done.err
    assert Path("h.safetensors").read_text() == "mine"
    done = tiny("fit-heads", "--layers", "2", "--output", "h.safetensors", "--overwrite")
    assert done.status == 0


# --- calibrate -------------------------------------------------------------------------------


def test_a_calibration_prints_its_table_and_generates(tiny: Run, here: Path) -> None:
    done = tiny("calibrate", "--layer", 3, "--transfer-to", "texts.jsonl", "--output", "c")
    assert done.status == 0, done.err
    assert "history[2] against history[3]" in done.out
    record = read("c/calibration.json")
    assert [row["hard_ratio"] for row in record["by_hard_ratio"]] == [0.3, 0.5, 0.7]
    # The same corpus again: what was reached is what is realized.
    for row, moved in zip(record["by_hard_ratio"], record["transfer"]["rows"], strict=True):
        assert moved["hard_ratio"] == row["reached"]
    done = tiny(
        "generate",
        *("--prompt", "Number 7", "--calibration", "c/calibration.json", "--hard-ratio", 0.5),
        *("--max-new-tokens", 6),
    )
    assert done.status == 0, done.err


def test_thresholds_are_fitted_on_text_that_the_heads_have_not_seen(
    run: Run, models: Path, here: Path
) -> None:
    few = ("--model", models / "tiny", "--seq-len", 16, "--max-tokens", 320)
    assert run("fit-heads", *few, "--layers", 3, "--output", "h.safetensors").status == 0
    given = ("calibrate", *few, "--layer", 3, "--heads", "h.safetensors")
    done = run(*given, "--transfer-to", "embedded", "--output", "c")
    assert done.status == 0, done.err
    assert "the heads were fitted on this very text" not in done.out
    assert "The same thresholds on the same text" in done.out
    record = read("c/calibration.json")
    assert record["provenance"]["heads"]["corpus"]["name"] == "embedded-train"
    assert record["provenance"]["corpus"]["name"] == "embedded-held-out"
    assert record["transfer"]["corpus"]["name"] == "embedded-held-out"
    done = run(*given, "--split", "train")
    assert "Beware" in done.out
    assert "the heads were fitted on this very text" in done.out
    evaluated = run("evaluate", *few, "--heads", "h.safetensors", "--split", "train")
    assert "Beware" in evaluated.out


def test_the_other_corpus_has_a_split_and_a_column_of_its_own(
    tiny: Run, here: Path, tmp_path: Path
) -> None:
    Path("other.jsonl").write_text(
        "".join(
            json.dumps({"body": f"Text {n}, in a column of its own."}) + "\n" for n in range(40)
        )
    )
    onto = ("--transfer-to", "other.jsonl", "--transfer-text-column", "body")
    done = tiny("calibrate", "--layer", 3, *onto, "--output", "c")
    assert done.status == 0, done.err
    assert read("c/calibration.json")["transfer"]["corpus"]["name"] == "other"
    split = ("--transfer-to", "embedded", "--transfer-split", "train", "--max-tokens", 320)
    done = tiny("calibrate", "--layer", 3, *split, "--output", "d")
    assert read("d/calibration.json")["transfer"]["corpus"]["name"] == "embedded-train"
    done = tiny("calibrate", "--layer", 3, "--transfer-split", "train")
    assert done.status == 2
    assert "--transfer-to" in done.err


def test_without_a_layer_it_is_one_that_the_heads_have(tiny: Run, here: Path) -> None:
    for layers, expected in (("2", 2), ("1,3", 3), ("2,4", 2), ("4", 4)):
        path = f"{layers.replace(',', '-')}.safetensors"
        assert tiny("fit-heads", "--layers", layers, "--output", path).status == 0
        done = tiny("calibrate", "--heads", path, "--output", "c", "--overwrite")
        assert done.status == 0, done.err
        assert read("c/calibration.json")["exit_layer"] == expected


def test_too_few_sequences_certify_nothing_and_leave_the_full_model(
    tiny: Run, here: Path, models: Path
) -> None:
    done = tiny("calibrate", "--layer", 3, "--risk", 0.05, "--output", "c")
    assert done.status == 0, done.err
    assert "600" in done.out
    assert read("c/calibration.json")["certificate"]["threshold"] is None
    texts = [
        tiny("generate", "--prompt", "Number 7", "--no-compare", "--max-new-tokens", 6, *extra).out
        for extra in ((), ("--calibration", "c/calibration.json"))
    ]
    assert texts[0].splitlines()[0] == texts[1].splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layer", 0), "expected an exit layer in 1..4, got 0"),
        (("--layer", 9), "expected an exit layer in 1..4, got 9"),
        (("--rule", "cosinus"), "expected a rule among cosine"),
        (("--rule", "oracle"), "it has nothing to calibrate"),
        (("--rule", "fixed"), "it has no threshold to calibrate"),
        (("--risk", 1e-155), "expected a risk of at least 1e-06, got 1e-155"),
        (("--seed", -1), "got '-1'"),
        (("--heads", "."), ". is a folder, expected the .safetensors file"),
        (("--hard-ratio", 1.5), "expected a hard ratio in 0..1, got 1.5"),
        (("--risk", 0), "expected a risk between 0 and 1, got 0"),
        (("--risk", 0.1, "--confidence", 1), "expected a confidence between 0 and 1, got 1"),
        (("--propagation", "thawed"), "expected a propagation among frozen, ridge, exact"),
        (("--heads", "none.safetensors"), "no exit heads at none.safetensors"),
        (("--transfer-to", "none.jsonl"), "no corpus file none.jsonl"),
        (("--max-tokens", 16), "a larger --max-tokens"),
        (("--dtype", "int8"), "expected --dtype among"),
    ],
)
def test_calibrating_refuses_in_one_line_and_writes_nothing(
    tiny: Run, here: Path, arguments: tuple[object, ...], message: str
) -> None:
    before = contents(here)
    done = tiny("calibrate", "--output", "c", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert contents(here) == before


def test_heads_and_calibrations_of_another_model_are_refused_with_both_named(
    tiny: Run, run: Run, models: Path, fitted: Path, here: Path
) -> None:
    shutil.copy(fitted, here / "h.safetensors")
    assert tiny("calibrate", "--layer", 3, "--heads", "h.safetensors", "--output", "c").status == 0
    given = ("--heads", "h.safetensors")
    prompt = ("generate", "--prompt", "Number 7", "--max-new-tokens", 4)
    saved = ("--calibration", "c/calibration.json", "--hard-ratio", 0.5)
    for model, options, what in (
        (models / "other", given, "these exit heads"),
        (models / "other", saved, "this calibration's thresholds"),
        (models / "tiny", (*given, "--dtype", "bfloat16"), "these exit heads"),
    ):
        done = run(*prompt, "--model", model, *options)
        assert done.status == 2, done.out
        assert f"{what} belong" in done.err
        named = ("float32", "bfloat16") if "bfloat16" in options else ("tiny", "other")
        assert all(name in done.err for name in named)
    done = run(*prompt, "--model", models / "tiny", *saved)
    assert "give the same --heads" in done.err


# --- evaluate and accept ---------------------------------------------------------------------


def test_an_evaluation_says_whether_early_exit_pays_and_becomes_budgets(
    tiny: Run, run: Run, here: Path
) -> None:
    done = tiny("evaluate", "--layers", "2,3", "--point", "3:cosine:0.5", "--output", "e")
    assert done.status == 0, done.err
    assert "early exit here" in done.out
    assert sorted(contents(here / "e")) == ["evaluation.html", "evaluation.json", "pareto.svg"]
    columns = {
        *("exit_layer", "rule", "head", "threshold", "exit_share", "agreement", "perplexity"),
        *("perplexity_ratio", "kl", "layers_per_token", "flops_ratio", "seconds_ratio"),
    }
    record = read("e/evaluation.json")
    assert all(columns <= row.keys() for row in record["points"])
    assert {row["rule"] for row in record["points"]} >= {"cosine", "random", "fixed", "oracle"}
    accepted = run("accept", "e")
    assert accepted.status == 0, accepted.err
    (budgets,) = Path("baselines").rglob("*.budgets.json")
    assert [p["threshold"] for p in read(str(budgets))["groups"][0]["points"]] == [0.5]


def test_points_alone_are_measured_as_they_are_among_others(tiny: Run, here: Path) -> None:
    point = ("--point", "3:top2_gap:0.1")
    assert tiny("evaluate", "--layers", "2", *point, "--output", "all").status == 0
    assert tiny("evaluate", "--only-points", *point, "--output", "one").status == 0
    (alone,) = read("one/evaluation.json")["points"]
    among = next(
        row for row in read("all/evaluation.json")["points"] if row["threshold_from"] == "given"
    )
    timed = {"seconds_ratio", "seconds_ratio_interval"}
    assert {k: v for k, v in alone.items() if k not in timed} == {
        k: v for k, v in among.items() if k not in timed
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "7"), "expected an exit layer in 1..4, got 7"),
        (("--point", "3:cosine"), "expected a point LAYER:RULE:THRESHOLD"),
        (("--point", "3:cosine:1.5"), "expected a threshold in there, got 1.5"),
        (("--point", "3:cosine:nan"), "the rule cosine gives confidences from -1 to 1"),
        (("--rule", "none"), "expected a rule among cosine"),
        (("--agreement", 2), "expected a share of agreement in 0..1, got 2"),
        (("--perplexity-ratio", 0.5), "expected a finite perplexity ratio of at least 1, got 0.5"),
        (("--propagation", "ridge"), "ridge propagation needs fitted heads"),
        (("--only-points",), "expected at least one point"),
        (("--max-tokens", 32), "a larger --max-tokens"),
        (("--rule", "oracle"), "the rules oracle are controls"),
        (("--layers", 1, "--rule", "mean_cosine"), "the rule mean_cosine looks at 2 layers"),
        (("--perplexity-ratio", "inf"), "got inf"),
        (("--seed", -1), "got '-1'"),
        (("--heads", "."), ". is a folder, expected the .safetensors file"),
    ],
)
def test_evaluating_refuses_in_one_line_and_writes_nothing(
    tiny: Run, here: Path, arguments: tuple[object, ...], message: str
) -> None:
    before = contents(here)
    done = tiny("evaluate", "--output", "e", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert contents(here) == before


def test_accepting_an_evaluation_without_a_given_point_is_refused(
    tiny: Run, run: Run, here: Path
) -> None:
    assert tiny("evaluate", "--layers", "3", "--output", "e").status == 0
    done = run("accept", "e")
    assert done.status == 2
    assert "no point to budget" in done.err
    assert not Path("baselines").exists()


def test_accepting_says_whose_budgets_give_way_and_refuses_those_of_another_dtype(
    tiny: Run, run: Run, fitted: Path, here: Path
) -> None:
    point = ("--only-points", "--point", "3:cosine:0.5")
    assert tiny("fit-heads", "--layers", 3, "--output", "anew.safetensors").status == 0
    for name, heads in (("a", fitted), ("b", here / "anew.safetensors")):
        assert tiny("evaluate", *point, "--heads", heads, "--output", name).status == 0
        done = run("accept", name)
        assert done.status == 0, done.err
    assert "Replaces the budgets of other heads, sha256:" in done.out
    before = contents(here / "baselines")
    assert tiny("evaluate", *point, "--dtype", "bfloat16", "--output", "c").status == 0
    done = run("accept", "c")
    assert (done.status, done.out) == (2, "")
    assert "model.dtype is bfloat16, the budget's is float32" in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert contents(here / "baselines") == before


# --- generate --------------------------------------------------------------------------------


def test_generating_shows_the_layers_and_the_full_model_beside(tiny: Run, here: Path) -> None:
    done = tiny(
        "generate", "--prompt", "Number 7", "--layer", 2, "--threshold", 0.5, "--max-new-tokens", 8
    )
    assert done.status == 0, done.err
    assert "Number 7" in done.out
    assert "tokens/s" in done.out


def test_verified_text_is_the_full_models(tiny: Run, here: Path) -> None:
    done = tiny(
        "generate",
        *("--prompt", "Number 7", "--layer", 2, "--threshold=-1", "--verify"),
        *("--max-new-tokens", 12),
    )
    assert done.status == 0, done.err
    assert "the text is the full model's, token for token" in done.out


def test_a_prompt_is_text_also_where_it_holds_the_token_that_the_model_pads_with(
    run: Run, folder: Path, here: Path
) -> None:
    pads = {"pad_token_id": ord("m") - 30, "eos_token_id": 1}  # the tiny tokenizer's number of it
    (folder / "generation_config.json").write_text(json.dumps(pads))
    done = run("generate", "--model", folder, "--prompt", "Number 7", "--max-new-tokens", 4)
    assert done.status == 0, done.err


def test_a_draw_is_the_models_own_until_it_is_told_otherwise(
    run: Run, here: Path, models: Path
) -> None:
    shutil.copytree(models / "tiny", here / "tame")
    (here / "tame" / "generation_config.json").write_text(json.dumps({"top_p": 0.01}))
    prompt = ("generate", "--model", "tame", "--prompt", "Number 7", "--max-new-tokens", 12)
    greedy, own, free = (
        run(*prompt, "--no-compare", *options).out.splitlines()[0]
        for options in ((), ("--sample",), ("--sample", "--top-k", 0, "--top-p", 1))
    )
    assert own == greedy
    assert free != greedy


def test_a_prompt_that_does_not_fit_is_refused_before_a_pass_over_it(
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
    assert "a prompt of 30 tokens and 40 new ones exceed the model's 64 positions" in done.err
    assert max(widths, default=0) < 30


def test_without_a_layer_generating_takes_one_that_the_heads_have(
    tiny: Run, fitted: Path, here: Path
) -> None:
    assert tiny("fit-heads", "--layers", "1,2", "--output", "low.safetensors").status == 0
    for heads, layer in ((fitted, 3), ("low.safetensors", 2)):
        given = ("--prompt", "Number 7", "--heads", heads, "--max-new-tokens", 2)
        done = tiny("generate", *given, "--no-compare")
        assert done.status == 0, done.err
        assert f"layer {layer}, never; ridge" in done.out


def test_an_answer_stands_apart_from_the_question(run: Run, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}:")
    given = ("generate", "--model", folder, "--prompt", "Number 7", "--max-new-tokens", 2)
    for options, behind in (((), ""), (("--chat",), "\n\n")):
        done = run(*given, "--no-compare", *options)
        assert done.status == 0, done.err
        assert re.match(rf"Number 7{behind} *\[4\]", done.out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "  "), "expected a prompt, got an empty one"),
        (("--prompt", "x" * 70), "exceed the model's 64 positions"),
        (("--prompt", "x", "--max-new-tokens", 64), "exceed the model's 64 positions"),
        (("--prompt", "x", "--threshold", 3), "the rule cosine gives confidences from -1 to 1"),
        (("--prompt", "x", "--layer", 5, "--threshold", 0.5), "expected an exit layer in 1..4"),
        (("--prompt", "x", "--rule", "oracle", "--threshold", 0.5), "it can score, not generate"),
        (("--prompt", "x", "--temperature", 0, "--sample"), "leave out --sample"),
        (("--prompt", "x", "--temperature", "nan", "--sample"), "expected a --temperature above 0"),
        (("--prompt", "x", "--top-p", 0.5), "--top-p are of a draw; give --sample"),
        (("--prompt", "x\udcff"), "expected a --prompt in UTF-8"),
        (("--prompt", "x" * 50, "--max-new-tokens", 20), "exceed the model's 64 positions"),
        (("--prompt", "x", "--top-k", -1, "--sample"), "expected top_k a whole number from 0"),
        (("--prompt", "x", "--hard-ratio", 0.5), "give --calibration"),
        (("--prompt", "x", "--chat"), "no chat template"),
        (("--prompt", "x", "--calibration", "none.json"), "cascade calibrate"),
        *(
            (
                ("--prompt", "x", "--calibration", "none.json", option, value),
                "--calibration says layer, rule, threshold and propagation; leave out " + option,
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
            "the rule patience looks at earlier exits, and none lies below layer 3",
        ),
    ],
)
def test_generating_refuses_in_one_line(
    tiny: Run, here: Path, arguments: tuple[object, ...], message: str
) -> None:
    done = tiny("generate", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1

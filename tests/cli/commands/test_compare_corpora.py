"""Corpora side by side as a user would put them, on a tiny checkpoint; and how each is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import Done, Run
from support.disk import contents

from cascade.cli.commands.comparisons import CORPORA_PICTURES

FILES = {"corpora.json", "corpora.html", *CORPORA_PICTURES}


@pytest.fixture
def compare(run: Run, models: Path, here: Path) -> Callable[..., Done]:
    """Compare corpora on the tiny model; beside texts.jsonl there are digits and other columns."""
    rows = [{"text": f"{n:09}" * 5, "body": "to be or not to be " * 3, "n": n} for n in range(40)]
    (here / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def compare(*arguments: object) -> Done:
        common = ("--model", models / "tiny", "--seq-len", 16)
        return run("compare-corpora", *common, *arguments)

    return compare


def in_folder(path: Path) -> Path:
    """Make a dataset as the hub holds it: two configurations, two splits."""
    for config, split, text in (
        ("en", "train", "some English text, the same again and again"),
        ("en", "test", "OTHER TEXT OF THE SAME KIND, IN CAPITALS ALONE"),
        ("de", "train", "0123456789 9876543210 0011223344 5566778899"),
    ):
        (path / config).mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"{n} {text}", "more": f"{n} ??? !!! {text}"} for n in range(30)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / config / f"{split}.jsonl").write_text(lines)
    (path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  default: true\n  data_files:\n"
        "  - {split: train, path: en/train.jsonl}\n  - {split: test, path: en/test.jsonl}\n"
        "- config_name: de\n  data_files:\n  - {split: train, path: de/train.jsonl}\n---\n"
    )
    return path


def read(path: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(Path(path).read_text())
    return record


def test_comparing_two_files_writes_all_output_files(compare: Callable[..., Done]) -> None:
    done = compare("texts.jsonl", "digits.jsonl", "--layer", 3, "--output", "out")
    assert done.status == 0, done.err
    assert {path.name for path in Path("out").iterdir()} == FILES
    assert "B (digits) against A: " in done.out
    assert "history[2] against history[3]" in done.out
    assert done.err.strip() == f"Wrote {Path('out') / 'corpora.html'}"
    record = read("out/corpora.json")
    assert record["kind"] == "corpus-comparison"
    assert record["provenance"]["command"].startswith("cascade compare-corpora --model")
    page = Path("out/corpora.html").read_text()
    for name in CORPORA_PICTURES:
        assert f'<svg id="{Path(name).stem}"' in Path("out", name).read_text()
        assert f'<svg id="{Path(name).stem}"' in page


def test_options_reach_the_comparison(compare: Callable[..., Done]) -> None:
    done = compare(
        *("texts.jsonl", "digits.jsonl", "--layer", 2, "--margin", 0.03, "--tolerance", 0.1),
        *("--hard-ratio", 0.4, "--hard-ratio", 0.6, "--seed", 5, "--output", "out"),
    )
    assert done.status == 0, done.err
    settings = read("out/corpora.json")["settings"]
    assert settings == {
        "layer": 2,
        "hard_ratios": [0.4, 0.6],
        "margin": 0.03,
        "tolerance": 0.1,
        "seed": 5,
        "layer_suggested": False,
        "confidence": 0.95,
    }


def test_equally_many_evenly_spaced_tokens_of_each_corpus_are_compared(
    compare: Callable[..., Done],
) -> None:
    corpora = ("texts.jsonl", "digits.jsonl")
    assert compare(*corpora, "--max-tokens", 170, "--output", "some").status == 0
    for corpus in read("some/corpora.json")["corpora"]:
        assert corpus["tokens"] == 160
        assert corpus["spread"].startswith("evenly over ")
    assert compare(*corpora, "--max-tokens", 0, "--output", "all").status == 0
    sizes = [corpus["tokens"] for corpus in read("all/corpora.json")["corpora"]]
    assert min(sizes) > 1000
    assert len(set(sizes)) == 2
    assert [corpus["spread"] for corpus in read("all/corpora.json")["corpora"]] == [None, None]
    done = compare(*corpora, "--max-tokens", 0, "--num-samples", 10, "--output", "few")
    assert done.status == 0
    records = read("few/corpora.json")["provenance"]["corpora"].values()
    assert [corpus["records"] for corpus in records] == [10, 10]


def test_configurations_splits_and_columns_of_one_dataset_are_corpora(
    compare: Callable[..., Done], here: Path
) -> None:
    in_folder(here / "hub")
    done = compare(
        *("./hub", "./hub@test", "./hub:de", "./hub:en@train#more"),
        *("--layer", 3, "--hard-ratio", 0.5, "--output", "out"),
    )
    assert done.status == 0, done.err
    record = read("out/corpora.json")
    names = [corpus["name"] for corpus in record["corpora"]]
    assert names == ["hub", "hub-test", "hub-de", "hub-en-train-more"]
    prints = [corpus["fingerprint"] for corpus in record["provenance"]["corpora"].values()]
    assert len(set(prints)) == 4


def test_a_streamed_dataset_has_the_same_text_as_a_downloaded_one(
    compare: Callable[..., Done], here: Path
) -> None:
    in_folder(here / "hub")
    prints = []
    for folder, stream in (("fetched", ()), ("streamed", ("--stream",))):
        options = ("--layer", 3, "--hard-ratio", 0.5, "--output", folder, *stream)
        assert compare("./hub", "texts.jsonl", *options).status == 0
        corpora = read(f"{folder}/corpora.json")["provenance"]["corpora"]
        prints.append(corpora["A"]["fingerprint"])
    assert prints[0] == prints[1]


def test_hub_datasets_are_loaded_by_name_configuration_and_split(
    compare: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return [{"text": f"{n} {args[0]} and more of it"} for n in range(30)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    done = compare(
        *("Salesforce/wikitext:wikitext-2-raw-v1@test", "tatsu-lab/alpaca@train[:1000]"),
        *("allenai/c4:en@validation", "--layer", 3, "--hard-ratio", 0.5, "--stream"),
    )
    assert done.status == 0, done.err
    assert asked == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test", "streaming": True}),
        (("tatsu-lab/alpaca", None), {"split": "train[:1000]", "streaming": True}),
        (("allenai/c4", "en"), {"split": "validation", "streaming": True}),
    ]
    assert "salesforce--wikitext-wikitext-2-raw-v1-test" in done.out.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "missing argument"),
        (("texts.jsonl",), "expected at least 2 corpora to compare, got 1; add another one"),
        (tuple(f"{n}.jsonl" for n in range(9)), "expected at most 8 corpora, got 9"),
        (("texts.jsonl", "./texts.jsonl"), "got 'texts.jsonl' and './texts.jsonl', which are one"),
        (("texts.jsonl", "copy.jsonl"), "the same tokens from texts.jsonl and copy.jsonl"),
        (("texts.jsonl", "none.jsonl"), "no corpus file none.jsonl"),
        (("texts.jsonl", "no@ne.jsonl"), "no corpus file no@ne.jsonl"),
        (("texts.jsonl", "nobody/none@test"), "no corpus nobody/none: "),
        (("texts.jsonl", "digits.jsonl@test"), "@SPLIT and :CONFIG belong to hub datasets, got th"),
        (
            ("texts.jsonl", "digits.jsonl#none"),
            "column 'none', got body, n, text; name one with #C",
        ),
        (
            ("texts.jsonl", "digits.jsonl#n"),
            "expected text in column 'n', got int; fix it or name",
        ),
        (("texts.jsonl", "embedded@none"), "expected @SPLIT among held-out, train, got none"),
        (("texts.jsonl", "embedded:none"), ":CONFIG belongs to hub datasets, got it for embedded"),
        (("texts.jsonl", "embedded@"), "expected a corpus NAME[:CONFIG][@SPLIT][#COLUMN], got 'em"),
        (
            ("texts.jsonl", "short.txt"),
            "at least 2 sequences of short for an interval, got 1",
        ),
        (("texts.jsonl", "empty.txt"), "empty.txt is empty"),
        (("texts.jsonl", "digits.jsonl", "--layer", 5), "expected --layer in 1..4, got 5"),
        (("texts.jsonl", "digits.jsonl", "--layer", 0), "expected --layer of at least 1, got 0"),
        (("texts.jsonl", "digits.jsonl", "--hard-ratio", 1), "expected a --hard-ratio between 0"),
        (("texts.jsonl", "digits.jsonl", "--margin", 0), "expected a --margin between 0 and 2"),
        (("texts.jsonl", "digits.jsonl", "--tolerance", 2), "expected a --tolerance between 0 and"),
        (("texts.jsonl", "digits.jsonl", "--max-tokens", 15), "at least one sequence of 16 tokens"),
        (("texts.jsonl", "digits.jsonl", "--max-tokens", 16), "expected at least 2 sequences"),
        (("texts.jsonl", "digits.jsonl", "--seq-len", 65), "use --seq-len 64 or less"),
        (("texts.jsonl", "digits.jsonl", "--stream", "--num-samples", 0), "--num-samples above 0"),
        (("texts.jsonl", "digits.jsonl", "--seed", -1), "got '-1'"),
    ],
)
def test_corpora_that_cannot_be_compared_give_a_one_line_error_and_write_nothing(
    compare: Callable[..., Done], here: Path, arguments: tuple[object, ...], message: str
) -> None:
    (here / "copy.jsonl").write_text((here / "texts.jsonl").read_text())
    (here / "short.txt").write_text("too short for two of 16")
    (here / "empty.txt").write_text(" ")
    before = contents(here)
    done = compare(*arguments, "--output", "out")
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert "--split" not in done.err
    assert "--text-column" not in done.err
    assert contents(here) == before


def test_an_earlier_run_is_replaced_only_with_overwrite(compare: Callable[..., Done]) -> None:
    arguments = ("texts.jsonl", "digits.jsonl", "--layer", 3, "--hard-ratio", 0.5, "--output", "o")
    assert compare(*arguments).status == 0
    before = contents(Path("o"))
    done = compare(*arguments)
    assert done.status == 2
    assert "--overwrite" in done.err
    assert contents(Path("o")) == before
    assert compare(*arguments, "--overwrite", "--seed", 1).status == 0
    assert contents(Path("o")).keys() == before.keys()
    assert contents(Path("o")) != before


def test_help_describes_how_to_name_a_corpus(run: Run) -> None:
    done = run("compare-corpora", "--help")
    assert done.status == 0
    assert "NAME:CONFIG@SPLIT#COLUMN" in done.out
    assert "Salesforce/wikitext:wikitext-2-raw-v1@test" in done.out

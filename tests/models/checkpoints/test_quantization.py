"""Quantization methods that transformers does not know are refused before it ignores them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.stacks import one_line
from support.tiny_models import save_checkpoint

from cascade.core.errors import ModelError
from cascade.models.checkpoints.quantization import quantization_method
from cascade.models.loading import load


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        (None, None),
        ({}, None),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_a_known_method_is_returned(settings: Any, method: str | None) -> None:
    assert quantization_method({"quantization_config": settings}, "model") == method


@pytest.mark.parametrize(
    "settings", [{"quant_method": "mybits"}, {"bits": 4}, {"quant_algo": "FP8"}, "mybits", [4]]
)
def test_an_unknown_method_is_refused(settings: Any, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as error:
        load(folder)
    assert "is quantized with " in one_line(error)
    assert "quant_method among" in one_line(error)
    assert "update transformers" in one_line(error)


@pytest.mark.parametrize(
    ("method", "package"), [("gptq", "optimum"), ("awq", "gptqmodel"), ("torchao", "torchao")]
)
def test_a_missing_package_is_named_with_the_remedy(
    method: str, package: str, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as error:
        load(folder)
    assert package in one_line(error)
    assert one_line(error).endswith("install the package that it names")

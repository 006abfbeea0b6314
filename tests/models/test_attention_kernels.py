"""An attention kernel that a config names and this machine lacks is replaced, with a note."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stacks import one_line
from support.tiny_models import random_ids, save_checkpoint
from transformers import Gemma3Config, LlamaConfig

from cascade.core.errors import UsageError
from cascade.models.attention_kernels import choose_attention
from cascade.models.loading import load
from cascade.report.common.records import run_line
from cascade.saturation.profile import similarities

ABSENT = [
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "kernels-community/flash-attn2",
    "paged|eager",
    "nonsense",
]


@pytest.mark.parametrize("kernel", ABSENT)
def test_a_kernel_that_is_not_here_is_replaced(kernel: str) -> None:
    config = LlamaConfig(attn_implementation=kernel)
    place = torch.device("cpu")
    assert choose_attention(config, None, device=place, dtype=torch.float32) == kernel
    assert config._attn_implementation is None


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_records_name_the_kernel_of_the_config_and_the_one_in_its_place(
    key: str, tmp_path: Path
) -> None:
    kernel = "flash_attention_2"
    folder = save_checkpoint(tmp_path / "m", num_layers=2)
    expected = load(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: kernel}))
    stack = load(folder)
    assert stack.provenance.attention == expected.provenance.attention == "sdpa"
    assert stack.provenance.attention_in_config == kernel
    assert run_line(stack.provenance) == (
        f"float32 on cpu, sdpa attention (config.json names {kernel}, which this machine lacks)"
    )
    ids = random_ids(2, 12)
    torch.testing.assert_close(
        similarities(stack, ids), similarities(expected, ids), atol=0, rtol=0
    )


def test_nested_configs_are_followed() -> None:
    config = Gemma3Config(text_config={"num_hidden_layers": 2})
    config.text_config._attn_implementation = "flash_attention_2"
    replaced = choose_attention(config, None, device=torch.device("cpu"), dtype=torch.float32)
    assert replaced == "flash_attention_2"
    assert config.text_config._attn_implementation is None


@pytest.mark.parametrize("kernel", ["eager", "sdpa", None])
def test_a_kernel_that_every_machine_has_is_kept(kernel: Any) -> None:
    config = LlamaConfig(attn_implementation=kernel)
    assert choose_attention(config, None, device=torch.device("cpu"), dtype=torch.float32) is None
    assert config._attn_implementation == kernel


def test_a_family_without_sdpa_falls_back_to_eager(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m", "bloom", num_layers=2)
    path = folder / "config.json"
    named = {"attn_implementation": "flash_attention_2"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    assert load(folder).provenance.attention == "eager"


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention", "acme/kernel"])
def test_a_kernel_that_the_user_names_is_an_error_where_it_is_not_here(
    kernel: str, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path / "m", num_layers=2)
    with pytest.raises(UsageError) as error:
        load(folder, attn_implementation=kernel)
    assert f"attn_implementation {kernel} cannot run here: it needs" in one_line(error)

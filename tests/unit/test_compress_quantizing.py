"""Quantised folders: transformers loads and runs them, and they are as small as they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kubedistill_api.quantization import Quantize
from kubedistill_trainer.compress.calibration import Batch
from kubedistill_trainer.compress.oneshot import quantize
from kubedistill_trainer.compress.precision import check_not_quantized, group_size
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.models.load import load_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": True,
}  # fmt: skip


def saved(folder: Path, model_type: str = "llama") -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SHAPE)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return load_model(folder, "spec.student", torch.bfloat16)


def batches() -> list[Batch]:
    tokens = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(32).expand(2, 32)
    return [(part, positions, part) for part in tokens.split(2)]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "scheme,algorithm,bits,error",
    [
        ("W4A16", "RTN", 4, 0.3),
        ("W4A16", "GPTQ", 4, 0.3),
        ("W4A16", "AWQ", 4, 0.3),
        ("W8A16", "RTN", 8, 0.03),
        ("W8A8", "GPTQ", 8, 0.05),
    ],
)
def test_a_quantised_folder_is_small_and_says_what_the_model_said(
    tmp_path: Path, model_type: str, scheme: Any, algorithm: Any, bits: int, error: float
) -> None:
    model = saved(tmp_path / "whole", model_type)
    tokens = batches()[0][0]
    with torch.no_grad():
        before = model(tokens).logits.float()
    wanted = Quantize(scheme=scheme, algorithm=algorithm)
    quantize(model, wanted, batches(), tmp_path / "small", "spec.quantize")
    again = load_model(tmp_path / "small", "spec.student", torch.bfloat16)
    with torch.no_grad():
        decoder, head = again.get_decoder(), again.get_output_embeddings()
        after = head(decoder(tokens).last_hidden_state).float()
    assert 0 < (after - before).norm() / before.norm() < error
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["type"]) == (bits, "int")
    assert weights["group_size"] == (64 if bits == 4 else None)
    with pytest.raises(InputsRefused, match=r"quantised already \(compressed-tensors\)"):
        check_not_quantized(config, "spec.student")
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    linear = sum(t.numel() * t.element_size() for n, t in tensors.items() if "proj" in n)
    whole = sum(p.numel() for n, p in model_parameters(tmp_path / "whole") if "proj" in n)
    assert bits / 8 * whole <= linear < (bits + 1) / 8 * whole


def model_parameters(folder: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(folder / "model.safetensors").items())


def test_a_cache_of_keys_and_values_gets_its_scales(tmp_path: Path) -> None:
    model = saved(tmp_path / "whole")
    wanted = Quantize(scheme="W8A16", algorithm="RTN", kv_cache=True)
    quantize(model, wanted, batches(), tmp_path / "small", "spec.quantize")
    names = load_file(tmp_path / "small" / "model.safetensors")
    assert {"model.layers.0.self_attn.k_scale", "model.layers.1.self_attn.v_scale"} <= set(names)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
    load_model(tmp_path / "small", "spec.student", torch.bfloat16)


@pytest.mark.parametrize(
    "wanted,widths,size",
    [
        ({}, (4096, 14336), 128),
        ({}, (576, 1536), 64),
        ({}, (576, 1000), 8),
        ({"group_size": 32}, (576, 1536), 32),
        ({"group_size": 128}, (576, 1536), "found 128, which does not divide hidden_size 576; write 64"),
        ({}, (100, 1536), "found scheme W4A16 for widths that no group of 8 divides: hidden_size 100"),
        ({"group_size": 16}, (100, 1536), "found 16, which does not divide hidden_size 100; write W8A16"),
    ],
)  # fmt: skip
def test_groups_divide_every_width(
    wanted: dict[str, Any], widths: tuple[int, int], size: int | str
) -> None:
    config = {
        "hidden_size": widths[0], "intermediate_size": widths[1], "num_attention_heads": 4,
    }  # fmt: skip
    if isinstance(size, int):
        assert group_size(Quantize(**wanted), config, "spec.quantize") == size
        return
    with pytest.raises(InputsRefused) as refused:
        group_size(Quantize(**wanted), config, "spec.quantize")
    assert size in refused.value.message

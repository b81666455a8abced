"""Loading a model folder: all of its weights, or a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.models import load
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM


def _saved(folder: Path, *, tied: bool) -> dict[str, Any]:
    config = LlamaConfig(
        vocab_size=61, hidden_size=12, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_folder_is_loaded(tmp_path: Path, tied: bool) -> None:
    weights = _saved(tmp_path, tied=tied)
    model = load.load_model(tmp_path, "spec.teacher", torch.float32)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights.get(name, weights["model.embed_tokens.weight"]))


def test_of_an_index_and_a_single_file_the_index_counts(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=61, hidden_size=12, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    stale = {name: value * 0 for name, value in model.state_dict().items()}
    save_file(stale, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load.load_model(tmp_path, "spec.teacher", torch.float32)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    loaded.save_pretrained(tmp_path / "again")
    assert "transformers_weights" not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize(
    "lost", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_weight_that_is_missing_is_not_made_up(tmp_path: Path, lost: str) -> None:
    weights = _saved(tmp_path, tied=False)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputsRefused) as refused:
        load.load_model(tmp_path, "spec.teacher", torch.float32)
    [problem] = refused.value.problems
    assert problem.field == "spec.teacher"
    assert problem.found == f"no weights for {lost}"

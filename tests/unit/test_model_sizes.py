"""Counting by config is what building the model counts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.models import load
from kubedistill_trainer.models.sizes import decoder_parameters

SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "tie_word_embeddings": True},
        {"model_type": "llama", "attention_bias": True, "head_dim": 10, "vocab_size": 203},
        {"model_type": "mistral", "head_dim": 8},
        {"model_type": "mistral", "tie_word_embeddings": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 16},
        {"model_type": "qwen3", "head_dim": 8, "attention_bias": True},
    ],
)
def test_counted_as_built(keys: dict[str, Any]) -> None:
    whole = {**SMALL, **keys}
    built = load.empty_model(load.config_of(whole, 199, "spec.student.config", 64), "field")
    assert decoder_parameters(whole, 199, "spec.student.config") == load.parameter_count(built)


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "gpt2"},
        {"model_type": "llama", "mlp_bias": True},
        {"model_type": "qwen3"},
        {"model_type": "llama", "num_key_value_heads": None},
    ],
)
def test_the_unusual_is_built(keys: dict[str, Any]) -> None:
    assert decoder_parameters({**SMALL, **keys}, 199, "field") is None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"hidden_size": 50}, "spec.student.config.hidden_size"),
        ({"num_key_value_heads": 4}, "spec.student.config.num_attention_heads"),
        ({"num_hidden_layers": 0}, "spec.student.config.num_hidden_layers"),
        ({"head_dim": 0}, "spec.student.config.head_dim"),
        ({"head_dim": "8"}, "spec.student.config.head_dim"),
        ({"vocab_size": "many"}, "spec.student.config.vocab_size"),
        ({"intermediate_size": "wide"}, "spec.student.config.intermediate_size"),
    ],
)
def test_sizes_that_make_no_model_are_named(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(InputsRefused, match=words):
        decoder_parameters({**SMALL, "model_type": "llama", **keys}, 199, "spec.student.config")


def test_a_preflight_starts_without_torch() -> None:
    modules = "preflight, teacher.manifest, teacher.partition_log, teacher.repairs, launch, outcome"
    imports = "; ".join(f"import kubedistill_trainer.{m}" for m in modules.split(", "))
    program = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)

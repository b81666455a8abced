"""Models in memory: from a folder, or from a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig
from transformers.distributed import DistributedConfig

from kubedistill_trainer.failures import refuse, unreadable
from kubedistill_trainer.models.sizes import check_vocabulary
from kubedistill_trainer.models.weights import INDEX

Model = Any
"""A transformers causal language model (the library has no types worth the name)."""


def config_of(keys: dict[str, Any], vocab_size: int, field: str, max_positions: int) -> Any:
    """A Hugging Face config object from the keys that a person wrote under `field`."""
    keys = dict(keys)
    model_type = keys.pop("model_type", None)
    if not isinstance(model_type, str):
        raise refuse(f"{field}.model_type", repr(model_type), "name an architecture, such as llama")
    keys.setdefault("vocab_size", vocab_size)
    keys.setdefault("max_position_embeddings", max(max_positions, 2048))
    check_vocabulary(keys, vocab_size, field)
    try:
        return AutoConfig.for_model(model_type, **keys)
    except Exception as error:  # each architecture checks its own keys with its own exceptions
        raise refuse(
            field, f"{type(error).__name__}: {error}", "correct the model's config"
        ) from error


def empty_model(config: Any, field: str) -> Model:
    """The architecture of `config` without memory behind its weights, to count and to check."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise refuse(
            field, f"{type(error).__name__}: {error}", "correct the model's config"
        ) from error


def random_model(config: Any, seed: int, dtype: torch.dtype) -> Model:
    """Random weights, the same for the same seed on every rank."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def load_model(
    folder: Path, field: str, dtype: torch.dtype, plan: dict[str, str] | None = None
) -> Model:
    """A model from a local folder; safetensors only, no code of the folder is run.

    With a tensor-parallel `plan` this process's part of it. InputsRefused for a folder that lacks
    weights: transformers would draw random ones.
    """
    split: dict[str, Any] = {"distributed_config": DistributedConfig(tp_plan=plan)} if plan else {}
    try:
        config = _config(folder)
        if getattr(config, "quantization_config", None) is not None:
            # By default its weights are made numbers again in the whole model's forward pass, and
            # here the decoder and the head are used by themselves.
            split["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        if (folder / INDEX).is_file():
            # Of a single file beside an index transformers takes the file, which nobody looked at.
            config.transformers_weights = INDEX
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **split,
        )
    except Exception as error:
        raise unreadable(
            field, f"{type(error).__name__}: {error}", "give a model that transformers loads"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise unreadable(
            field, f"no weights for {missing[0]}{others}", "upload all of the model's files"
        )
    return model


def config_of_folder(folder: Path, field: str) -> Any:
    """The Hugging Face config object of a local folder."""
    try:
        return _config(folder)
    except Exception as error:
        raise unreadable(
            field, f"{type(error).__name__}: {error}", "give a model that transformers loads"
        ) from error


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def parameter_count(model: Model) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def dtype_of(precision: str) -> torch.dtype:
    """The type of `training.precision`."""
    return torch.bfloat16 if precision == "BF16" else torch.float32

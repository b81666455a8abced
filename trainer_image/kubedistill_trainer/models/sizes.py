"""What a model's config says of its size, without importing torch.

A preflight has to say how large a student is. Building it on torch's meta device is right for every
architecture and takes as long as importing torch and transformers; for models of Llama's shape the
sizes can be added up. Anything unusual gives None, and the model is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kubedistill_trainer.failures import refuse


@dataclass(frozen=True)
class _Shape:
    """Where an architecture differs from Llama."""

    qkv_bias: bool = False
    head_norms: bool = False


_SHAPES = {
    "llama": _Shape(),
    "mistral": _Shape(),
    "qwen2": _Shape(qkv_bias=True),
    "qwen3": _Shape(head_norms=True),
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_COUNTS = frozenset(
    {*_SIZES, "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"}
)
_FRACTIONS = frozenset({"rms_norm_eps", "initializer_range"})
_SWITCHES = frozenset({"tie_word_embeddings", "attention_bias", "use_cache"})


def check_vocabulary(keys: Mapping[str, Any], vocab_size: int, field: str) -> None:
    """Refuse a model without an embedding for each id of the tokenizer."""
    given = keys.get("vocab_size")
    if given is None:
        return
    if not _is_whole(given) or given < vocab_size:
        raise refuse(
            f"{field}.vocab_size",
            repr(given),
            f"the tokenizer has {vocab_size} ids: leave it out, or give at least that many",
        )


def is_plain(keys: Mapping[str, Any]) -> bool:
    """Whether nothing but keys of Llama's shape is in a config that a person wrote, and each as it
    has to be. Of anything else (`rms_norm_eps: 1e-5`, which YAML reads as text; an activation that
    there is not) only building the model says whether it makes one."""
    return all(_is_plain(name, value) for name, value in keys.items())


def _is_plain(name: str, value: Any) -> bool:
    if name in _COUNTS:
        return _is_whole(value) and value > 0
    if name in _FRACTIONS:
        return isinstance(value, float) and 0 < value < 1
    if name in _SWITCHES:
        return isinstance(value, bool)
    return name == "model_type"


def decoder_parameters(keys: Mapping[str, Any], vocab_size: int, field: str) -> int | None:
    """Parameters, tied ones once; None where the config has to be built to be counted.

    InputsRefused, naming a key below `field`, for sizes that make no model.
    """
    shape = _SHAPES.get(str(keys.get("model_type")))
    if shape is None or any(keys.get(name) is None for name in (*_SIZES, "num_key_value_heads")):
        return None
    if keys.get("mlp_bias") or (keys.get("head_dim") is None and shape.head_norms):
        return None
    check_vocabulary(keys, vocab_size, field)
    hidden, inner, layers, heads = (_size(keys, name, field) for name in _SIZES)
    kv_heads = _size(keys, "num_key_value_heads", field)
    head = keys.get("head_dim")
    if head is None:
        _check_divides(hidden, heads, f"{field}.hidden_size", "num_attention_heads")
        head = hidden // heads
    else:
        head = _size(keys, "head_dim", field)
    _check_divides(heads, kv_heads, f"{field}.num_attention_heads", "num_key_value_heads")
    queries, values = heads * head, kv_heads * head
    attention = hidden * (2 * queries + 2 * values)
    if keys.get("attention_bias"):
        attention += queries + 2 * values + hidden
    elif shape.qkv_bias:
        attention += queries + 2 * values
    if shape.head_norms:
        attention += 2 * head
    layer = attention + 3 * hidden * inner + 2 * hidden
    vocabulary = int(keys.get("vocab_size") or vocab_size)
    embeddings = vocabulary * hidden * (1 if keys.get("tie_word_embeddings") else 2)
    return layers * layer + hidden + embeddings


def _size(keys: Mapping[str, Any], name: str, field: str) -> int:
    value = keys[name]
    if not _is_whole(value) or value < 1:
        raise refuse(f"{field}.{name}", repr(value), "give a whole number of at least 1")
    return int(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_divides(whole: int, part: int, field: str, name: str) -> None:
    if whole % part:
        raise refuse(
            field, f"{whole}, which {name} {part} does not divide", f"a multiple of {part}"
        )

"""Do the tensors of a model folder make the model of its config? By names and shapes alone.

A layer that config.json does not count is left out without a word when a model is loaded, and a
tensor of another shape ends the load: in a pod, when the GPUs are there. What is compared is what can
be told for every architecture; where one names its tensors otherwise, nothing is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kubedistill_trainer.failures import InputsRefused, unreadable

_VOCABULARY = re.compile(
    r"(?:^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings|lm_head|embed_out)\.weight$"
)
"""Token embeddings and LM heads. Not by their shape: as many rows may be a layer's width."""
_HEADS = frozenset({"lm_head", "embed_out"})
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_WIDTHS = ("word_embed_proj_dim", "embedding_size", "hidden_size", "n_embd", "d_model")
"""The first that a config has is the width of its embedding."""
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers")

Shape = tuple[int, ...]


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row for each token."""
    return _VOCABULARY.search(name) is not None


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, from 0; None for one of no layer."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def check_shapes(
    shapes: Mapping[str, Shape], config: Mapping[str, Any], field: str, uri: str
) -> None:
    """InputsRefused (unreadable) for tensors (name → shape) that are not those of `config`."""
    rows, (width_key, width) = config.get("vocab_size"), _first_of(config, _WIDTHS)
    for name, shape in shapes.items():
        found = _VOCABULARY.search(name)
        if found is None or len(shape) != 2:
            continue
        if found[1] in _HEADS and config.get("tie_word_embeddings"):
            continue  # it is not loaded
        if isinstance(rows, int) and shape[0] != rows:
            raise _mismatch(field, uri, f"{shape[0]} rows in {name}", f"vocab_size {rows}")
        # A head is as wide as the last layer, whatever the embedding is.
        if width is not None and found[1] not in _HEADS and shape[1] != width:
            raise _mismatch(field, uri, f"{shape[1]} columns in {name}", f"{width_key} {width}")
    _check_depth(shapes, config, field, uri)


def _check_depth(
    shapes: Mapping[str, Shape], config: Mapping[str, Any], field: str, uri: str
) -> None:
    """As many layers as the config says. Models with several stacks (a picture's beside the text's)
    are not looked at; layers that only help to train (`num_nextn_predict_layers`) may be there."""
    key, wanted = _first_of(config, _DEPTHS)
    stacks: dict[str, set[int]] = {}
    for name in shapes:
        if (found := _LAYER.search(name)) is not None:
            stacks.setdefault(name[: found.start(1)], set()).add(int(found[1]))
    if wanted is None or len(stacks) != 1:
        return
    [(stack, present)] = stacks.items()
    said = f"{key} {wanted}"
    missing = sorted(set(range(wanted)) - present)
    if missing:
        raise _mismatch(field, uri, f"no tensor of {stack}{missing[0]}", said)
    extra = config.get("num_nextn_predict_layers")
    most = wanted + (extra if isinstance(extra, int) else 0)
    if max(present) >= most:
        raise _mismatch(field, uri, f"{len(present)} layers ({stack}0 to {max(present)})", said)


def _first_of(config: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, int | None]:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return key, value
    return "", None


def _mismatch(field: str, uri: str, found: str, said: str) -> InputsRefused:
    return unreadable(
        field,
        f"{found} of {uri}, whose config.json says {said}",
        "give the config.json that was saved with these weights, and all of the model's files",
    )

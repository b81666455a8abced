"""A smaller model from the parts of a larger one that stay."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from kubedistill_trainer.compress.architecture import Architecture, Axis, in_layer, is_norm
from kubedistill_trainer.compress.choosing import Kept
from kubedistill_trainer.compress.importance import Statistics
from kubedistill_trainer.compress.sizes import Sizes, config_changes
from kubedistill_trainer.models.shapes import layer_of


@torch.no_grad()
def cut(
    model: Any,
    architecture: Architecture,
    sizes: Sizes,
    target: Sizes,
    kept: Kept,
    statistics: Statistics | None = None,
) -> Any:
    """A model of `target` sizes with the kept parts of `model`, in its type and on its device.

    With `statistics` norms are scaled for the channels that their mean lacks. Equal to `model` where
    everything is kept.
    """
    config = copy.deepcopy(model.config)
    for key, value in config_changes(target, config, kept.layers).items():
        setattr(config, key, value)
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
    state = _state(model, architecture, sizes, kept)
    if len(kept.hidden) < sizes.hidden:
        _rescale(state, architecture, sizes, kept, statistics)
    with no_init_weights():
        smaller = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing, _ = smaller.load_state_dict(state, strict=False)
    smaller.tie_weights()
    lacking = set(missing) - set(smaller.all_tied_weights_keys)
    assert not lacking, f"the description of {architecture.name} leaves out {sorted(lacking)}"
    return smaller.to(device)


def _state(model: Any, architecture: Architecture, sizes: Sizes, kept: Kept) -> dict[str, Tensor]:
    """The kept part of each tensor, under its name in the smaller model."""
    places = {old: new for new, old in enumerate(kept.layers)}
    state = {}
    for name, tensor in model.named_parameters():
        layer = layer_of(name)
        if layer is not None and layer not in places:
            continue
        place = None if layer is None else places[layer]
        part = tensor.detach()
        for axis_index, axis in enumerate(architecture.axes_of(name)):
            indices = _indices(axis, place, sizes, kept)
            if indices is not None:
                part = part.index_select(axis_index, torch.tensor(indices, device=part.device))
        new = name if layer is None else f"model.layers.{place}.{in_layer(name, layer)}"
        state[new] = part.clone()
    return state


def _indices(axis: Axis, place: int | None, sizes: Sizes, kept: Kept) -> list[int] | None:
    """What stays of an axis; None for all of it."""
    if axis == "hidden":
        return list(kept.hidden)
    if place is None:
        return None
    match axis:
        case "queries":
            return _channels(kept.queries[place], sizes.head_size)
        case "keys":
            return _channels(kept.kv_heads[place], sizes.head_size)
        case "ffn":
            return list(kept.ffn[place])
    return None


def _channels(heads: tuple[int, ...], size: int) -> list[int]:
    return [head * size + channel for head in heads for channel in range(size)]


def _rescale(
    state: Mapping[str, Tensor],
    architecture: Architecture,
    sizes: Sizes,
    kept: Kept,
    statistics: Statistics | None,
) -> None:
    """Undo what fewer channels of the hidden state change beside their absence.

    A norm divides by the root of the mean square of its channels: of those that stay it is another
    one than of all. Embeddings that are multiplied by the root of the width are by a smaller one;
    they go into the first norm and, tied, into the head, which the last norm sees to.
    """
    offset = architecture.norm_offset
    hidden = torch.tensor(kept.hidden)
    if statistics is not None:
        for name in state:
            index = _norm_index(name, architecture, kept)
            if index is None:
                continue
            raw = statistics.raw[index]
            ratio = (raw[hidden].mean() / raw.mean().clamp(min=1e-30)).sqrt().item()
            state[name].copy_((state[name] + offset) * ratio - offset)
    if architecture.scaled_embedding:
        ratio = (sizes.hidden / len(kept.hidden)) ** 0.5
        embedding = state["model.embed_tokens.weight"]
        embedding.copy_(embedding * ratio)
        if "lm_head.weight" not in state:
            norm = state["model.norm.weight"]
            norm.copy_((norm + offset) / ratio - offset)


def _norm_index(name: str, architecture: Architecture, kept: Kept) -> int | None:
    """Which row of the statistics a norm's weight belongs to; None for what is no norm."""
    if not is_norm(name, architecture.axes_of(name)):
        return None
    layer = layer_of(name)
    norms = architecture.norms
    if layer is None:
        return -1
    module = in_layer(name, layer).removesuffix(".weight")
    return kept.layers[layer] * len(norms) + norms.index(module)

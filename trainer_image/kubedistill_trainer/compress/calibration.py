"""Text on which a model is looked at before it is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kubedistill_trainer.losses import distillation_loss
from kubedistill_trainer.models.decoder import final_hidden, softcap_of

Batch = tuple[Tensor, Tensor, Tensor]
"""Tokens, positions and labels, each [B, L], as of a packed sequence. Positions without a label
(IGNORED) are read, and not counted: nothing is learnt there."""


@contextmanager
def working_on(model: Any, device: torch.device) -> Iterator[None]:
    """Forward passes of a model that lies elsewhere run on `device`, which holds a layer at a time.

    What lies outside the layers is there throughout. Afterwards all is where it was.
    """
    with ExitStack() as stack:
        if next(model.parameters()).device != device:
            layers = model.get_decoder().layers
            inner = {id(tensor) for layer in layers for tensor in _tensors(layer)}
            stack.callback(_moved([t for t in _tensors(model) if id(t) not in inner], device))
            for layer in layers:
                _visit(layer, device, stack)
        yield


def _visit(layer: nn.Module, device: torch.device, stack: ExitStack) -> None:
    back: list[Callable[[], None]] = []

    def come(*_: Any) -> None:
        back.append(_moved(_tensors(layer), device))

    def leave(*_: Any) -> None:
        back.pop()()

    for handle in (
        layer.register_forward_pre_hook(come, prepend=True),
        layer.register_forward_hook(leave, always_call=True),
    ):
        stack.callback(handle.remove)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _moved(tensors: list[Tensor], device: torch.device) -> Callable[[], None]:
    """Put tensors on a device; what is called puts back what they held before, without a copy."""
    held = [tensor.data for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.data.to(device)

    def back() -> None:
        for tensor, data in zip(tensors, held, strict=True):
            tensor.data = data

    return back


def loss_of(model: Any, tokens: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropy over the labels, in nats; on the device of the model's head."""
    device = model.get_output_embeddings().weight.device
    hidden = final_hidden(model.get_decoder(), tokens.to(device), positions.to(device))
    return distillation_loss(
        hidden.flatten(0, 1),
        model.get_output_embeddings().weight,
        labels.flatten().to(device),
        None,
        temperature=1.0,
        soft_weight=0.0,
        normalizer=1.0,
        softcap=softcap_of(model),
    ).total

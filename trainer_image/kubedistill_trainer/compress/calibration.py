"""Text on which a model is looked at before it is changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kubedistill_trainer.losses import distillation_loss
from kubedistill_trainer.models.decoder import final_hidden, softcap_of

Batch = tuple[Tensor, Tensor, Tensor]
"""Tokens, positions and labels, each [B, L], as of a packed sequence. Positions without a label
(IGNORED) are read, and not counted: nothing is learnt there."""


def loss_of(model: Any, tokens: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropy over the labels, in nats."""
    device = next(model.parameters()).device
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

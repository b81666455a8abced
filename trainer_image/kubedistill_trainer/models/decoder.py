"""What is asked of any decoder: its last states, and how its head makes logits of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def final_hidden(decoder: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    """The decoder's states after its final norm, [B, L, H]; attention stays within documents.

    transformers derives the block-diagonal mask from positions that restart, given that neither a
    mask nor a cache is passed.
    """
    output = decoder(input_ids=tokens, position_ids=positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap), or the logits where there is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def softcap_of(model: Any) -> float | None:
    """The cap of the final logits (Gemma 2), if the architecture has one."""
    value = getattr(model.config, "final_logit_softcapping", None)
    return None if value is None else float(value)

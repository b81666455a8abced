"""Text from a model: a batch of prompts of any lengths at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    end_ids: Collection[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """What `model` says after each of `prompts` (token ids, none empty), without the prompt.

    An answer ends before the first of `end_ids`, or after `max_tokens`; `temperature` 0 takes the
    likeliest token, above it tokens are drawn from the likeliest with the mass `top_p`. The same
    batch with the same seed gives the same text; other ways to divide prompts into batches do not.
    """
    device = model.get_output_embeddings().weight.device
    ends = sorted(end_ids)
    ids, seen = left_padded(prompts, ends[0])
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=seen.to(device),
            max_new_tokens=max_tokens,
            do_sample=temperature > 0,
            eos_token_id=ends,
            pad_token_id=ends[0],
            **drawn,
        )
    return [_until_end(answer, frozenset(end_ids)) for answer in out[:, ids.shape[1] :].tolist()]


def left_padded(prompts: Sequence[Sequence[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, L] and which of them are seen: filled on the left, so that every answer begins
    at the same place."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), fill, dtype=torch.long)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        seen[row, width - len(prompt) :] = 1
    return ids, seen


def _until_end(answer: list[int], ends: frozenset[int]) -> list[int]:
    return next((answer[:i] for i, token in enumerate(answer) if token in ends), answer)

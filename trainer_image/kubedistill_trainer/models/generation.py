"""Text from a model: a batch of prompts of any lengths at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)


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
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """What `model` says after each of `prompts` (token ids, none empty), without the prompt.

    An answer ends before the first of `end_ids`, or after `max_tokens`; `temperature` 0 takes the
    likeliest token, above it tokens are drawn from the likeliest with the mass `top_p`. The same
    batch with the same seed gives the same text; other ways to divide prompts into batches do not.
    """
    device = model.get_output_embeddings().weight.device
    ends = sorted(end_ids)
    ids, seen = left_padded(prompts, ends[0])
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature > 0 and seeds is not None:
        width = ids.shape[1]
        drawn["logits_processor"] = _drawn_by(seeds, temperature, top_p, max_tokens, width)
    elif temperature > 0:
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=seen.to(device),
            max_new_tokens=max_tokens,
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


def _drawn_by(
    seeds: Sequence[int], temperature: float, top_p: float, max_tokens: int, width: int
) -> LogitsProcessorList:
    """What leaves the likeliest token no choice: it is the one that each row's seed draws."""
    steps: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    return LogitsProcessorList([*steps, _Drawn(seeds, max_tokens, width)])


class _Drawn(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token a row: the inverse of its distribution at the row's next random number."""

    def __init__(self, seeds: Sequence[int], max_tokens: int, width: int) -> None:
        numbers = [np.random.default_rng(seed).random(max_tokens) for seed in seeds]
        self._numbers_BT = torch.from_numpy(np.stack(numbers)).float()
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sums_BV = scores.float().softmax(-1).cumsum(-1)
        at_B1 = self._numbers_BT[:, input_ids.shape[1] - self._width, None].to(scores.device)
        # A number that rounding makes 1 draws the last token that has a probability.
        below_B1 = torch.minimum(
            at_B1 * sums_BV[:, -1:], sums_BV[:, -1:].nextafter(sums_BV.new_zeros(1))
        )
        chosen_B1 = torch.searchsorted(sums_BV, below_B1, right=True)
        return torch.full_like(scores, float("-inf")).scatter(-1, chosen_B1, 0.0)


def _until_end(answer: list[int], ends: frozenset[int]) -> list[int]:
    return next((answer[:i] for i, token in enumerate(answer) if token in ends), answer)

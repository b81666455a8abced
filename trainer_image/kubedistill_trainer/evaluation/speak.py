"""Greedy answers of a model, and how sure it was of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from kubedistill_trainer.models.generation import left_padded

Tick = Callable[[], None]
"""Called at every token: says that work goes on, and raises where it has to end."""
_BATCH_TOKENS = 16_384
_LEAST = 1e-30


class NoRoom(Exception):
    """What is asked does not fit into a model's positions."""


@dataclass(frozen=True)
class Said:
    """An answer's tokens, without its end, and the probability of each."""

    ids: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()

    @property
    def confidence(self) -> float:
        """Geometric mean of the probabilities of its tokens; 0 of an answer without any."""
        return likelihood([math.log(max(p, _LEAST)) for p in self.probabilities])


def likelihood(log_probs: Sequence[float]) -> float:
    """Geometric mean of the probabilities of an answer's tokens; 0 of an answer without any."""
    if not log_probs:
        return 0.0
    return math.exp(sum(max(value, math.log(_LEAST)) for value in log_probs) / len(log_probs))


class _Sureness(LogitsProcessor):  # type: ignore[misc]
    """Notes the probability of each step's likeliest token, which greedy decoding takes."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.float()
        self.steps.append((best.amax(-1) - best.logsumexp(-1)).exp())
        return scores


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends a row at a line's end, where answers are one line; and lets `tick` look in."""

    def __init__(self, breaks: Callable[[int], bool] | None, tick: Tick) -> None:
        self._breaks = breaks
        self._tick = tick

    def __call__(self, input_ids: Tensor, scores: Tensor, **rest: Any) -> Tensor:
        self._tick()
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self._breaks is not None:
            last = input_ids[:, -1].tolist()
            done |= torch.tensor([self._breaks(token) for token in last], device=done.device)
        return done


@torch.inference_mode()
def speak(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    end_ids: Collection[int],
    breaks: Callable[[int], bool] | None = None,
    tick: Tick = lambda: None,
) -> list[Said]:
    """The likeliest answer to each of `prompts` (token ids), in their order.

    An answer ends before one of `end_ids`, before a token that `breaks`, or after `max_tokens`.
    What a model's generation config says of penalties and draws is set aside. Raises NoRoom where
    one of the prompts does not fit into the model's positions beside its answer: an answer that
    could not be given says nothing of the model.
    """
    check_room(prompts, positions_of(model), max_tokens)
    ends = frozenset(end_ids)
    answers = [Said()] * len(prompts)
    # By length, so that little is padded.
    order = sorted(range(len(prompts)), key=_length(prompts))
    for batch in _batches(order, prompts, max_tokens):
        said = _generate(model, [prompts[i] for i in batch], max_tokens, ends, breaks, tick)
        for index, one in zip(batch, said, strict=True):
            answers[index] = one
    return answers


def check_room(prompts: Sequence[Sequence[int]], positions: int, max_tokens: int) -> None:
    """Raises NoRoom with what was found and what would fit; also for a prompt without tokens."""
    if not all(prompts):
        raise NoRoom("a prompt has no tokens: the chat template leaves the question out")
    long = sum(len(prompt) + max_tokens > positions for prompt in prompts)
    if not long:
        return
    longest = max(map(len, prompts))
    least = (
        f"write at most {positions - longest} for maxAnswerTokens"
        if longest < positions
        else "the prompt alone fills them"
    )
    raise NoRoom(
        f"{long:,} of {len(prompts):,} prompts do not fit: the longest has {longest:,} tokens, with "
        f"{max_tokens:,} for the answer (spec.evaluation.maxAnswerTokens) that is more than the "
        f"model's {positions:,} positions; {least}"
    )


def _length(prompts: Sequence[Sequence[int]]) -> Callable[[int], int]:
    return lambda index: len(prompts[index])


def _batches(
    order: Sequence[int], prompts: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[list[int]]:
    """As many at once as fit a number of tokens, their answers included."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * (len(prompts[index]) + max_tokens) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    ends: frozenset[int],
    breaks: Callable[[int], bool] | None,
    tick: Tick,
) -> list[Said]:
    sureness = _Sureness()
    with plain_generation(model):
        out = _run(
            model, prompts, max_tokens, ends,
            logits_processor=[sureness], stopping_criteria=[_Stop(breaks, tick)],
        )  # fmt: skip
    width = max(map(len, prompts))
    sure = torch.stack(sureness.steps, dim=1).cpu().tolist()
    answers = []
    for ids, probabilities in zip(out[:, width:].tolist(), sure, strict=True):
        over = (i for i, t in enumerate(ids) if t in ends or (breaks is not None and breaks(t)))
        length = next(over, len(ids))
        answers.append(Said(tuple(ids[:length]), tuple(probabilities[:length])))
    return answers


def _run(
    model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, ends: frozenset[int], **rest: Any
) -> Tensor:
    device = model.get_output_embeddings().weight.device
    fill = min(ends)
    ids, seen = left_padded(prompts, fill)
    out: Tensor = model.generate(
        input_ids=ids.to(device),
        attention_mask=seen.to(device),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=fill,
        **rest,
    )
    return out


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Without what the model's folder says of its generation."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def positions_of(model: Any) -> int:
    """Tokens that a model can see at once; very many where its architecture sets no end."""
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found else 1 << 30


def end_ids(model: Any, end_of_text: int) -> frozenset[int]:
    """What ends a text: the tokenizer's end, and those that the model's folder names."""
    named = model.generation_config.eos_token_id
    if named is None:
        named = []
    return frozenset({end_of_text, *([named] if isinstance(named, int) else named)})

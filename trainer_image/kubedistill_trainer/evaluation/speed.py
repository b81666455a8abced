"""Time to first token, tokens a second and memory of a model, on the device that it is on."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import StoppingCriteria

from kubedistill_trainer.evaluation.results import Pace, Performance
from kubedistill_trainer.evaluation.speak import NoRoom, Tick, plain_generation, positions_of

BATCHES = (1, 8)
PROMPT_TOKENS = 64
ANSWER_TOKENS = 32
ROUNDS = 3
_FEWEST_POSITIONS = 3
"""A prompt of one token, and an answer of two, between which time passes."""
_STRIDE = 7919
_SAMPLE_SECONDS = 0.002


@torch.inference_mode()
def measure_speed(model: Any, tick: Tick) -> Performance:
    """Medians of `ROUNDS` rounds after one to warm up; every answer has the same length."""
    device = model.get_output_embeddings().weight.device
    prompt, answer = lengths(positions_of(model))
    vocab_size = model.get_output_embeddings().weight.shape[0]
    paces, working = [], 0
    with plain_generation(model):
        for batch in BATCHES:
            ids = (torch.arange(batch * prompt, device=device) * _STRIDE) % vocab_size
            run = _Run(model, ids.view(batch, prompt), answer, _synchronise(device), tick)
            # Of the round that warms up: whoever looks at memory takes time of the process.
            with _memory(device) as used:
                run.once()
            working = max(working, used())
            paces.append(pace(batch, [run.once() for _ in range(ROUNDS)]))
    cuda, parts = device.type == "cuda", getattr(model, "tp_size", None) or 1
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    return Performance(
        device=name if parts == 1 else f"{parts} × {name}",
        prompt_tokens=prompt,
        answer_tokens=answer,
        rounds=ROUNDS,
        paces=tuple(paces),
        weights_bytes=weights_bytes(model),
        working_bytes=working * parts,
        memory="CUDA allocations" if cuda else "growth of the process",
    )


def lengths(positions: int) -> tuple[int, int]:
    """Tokens of prompt and answer: the usual ones, or what fits into a model's positions.
    NoRoom where nothing does."""
    if positions < _FEWEST_POSITIONS:
        raise NoRoom(
            f"the model has {positions:,} positions, and speed takes {_FEWEST_POSITIONS}: "
            "a token of prompt and two of answer"
        )
    prompt = min(PROMPT_TOKENS, max(1, positions // 2))
    return prompt, min(ANSWER_TOKENS, max(2, positions - prompt))


def pace(batch: int, rounds: list[list[float]]) -> Pace:
    """From each round's times of its tokens, in seconds since it began."""
    speeds = [
        batch * (len(times) - 1) / max(times[-1] - times[0], 1e-9)
        for times in rounds
        if len(times) > 1
    ]
    return Pace(
        batch=batch,
        first_token_seconds=statistics.median(times[0] for times in rounds),
        tokens_per_second=statistics.median(speeds),
    )


def weights_bytes(model: Any) -> int:
    """Bytes of parameters and buffers, tied ones once."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True)
class _Run:
    """`prompts`: [B, L]. Answers have `length` tokens."""

    model: Any
    prompts: Tensor
    length: int
    synchronise: Callable[[], None]
    tick: Tick

    def once(self) -> list[float]:
        """When each token was there, in seconds since the start."""
        clock = _Clock(self.synchronise, self.tick)
        self.synchronise()
        clock.start()
        # Without an end-of-text token every answer has its whole length.
        self.model.generate(
            input_ids=self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            max_new_tokens=self.length,
            do_sample=False,
            stopping_criteria=[clock],
        )
        return clock.times


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes the time of every token; ends nothing."""

    def __init__(self, synchronise: Callable[[], None], tick: Tick) -> None:
        self._synchronise = synchronise
        self._tick = tick
        self._began = 0.0
        self.times: list[float] = []

    def start(self) -> None:
        self._began = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor, **rest: Any) -> Tensor:
        self._synchronise()
        self.times.append(time.perf_counter() - self._began)
        self._tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _synchronise(device: torch.device) -> Callable[[], None]:
    if device.type != "cuda":
        return lambda: None
    return lambda: torch.cuda.synchronize(device)


@contextmanager
def _memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Greatest memory in use within the block beyond what was in use before, in bytes."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    watch = _ResidentMemory()
    thread = threading.Thread(target=watch.follow, name="memory", daemon=True)
    thread.start()
    try:
        yield lambda: watch.growth
    finally:
        watch.stop.set()
        thread.join()


class _ResidentMemory:
    """By how much this process has grown."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._peak = self._before
        self.stop = threading.Event()

    def follow(self) -> None:
        while not self.stop.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def growth(self) -> int:
        return self._peak - self._before

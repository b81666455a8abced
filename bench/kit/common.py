"""What the benchmarks share: arguments, fair timing, peak memory, and the report with its goals."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from kubedistill_api.objective import Objective
from kubedistill_trainer.losses import Teacher
from kubedistill_trainer.methods.student import StudentWithLoss
from transformers import LlamaConfig, LlamaForCausalLM

# The profiler announces every start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")


@dataclass(frozen=True)
class Measure:
    """One number beside its peer's. `goal` is in words; `met` is None where there is no goal."""

    measure: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None
    goal: str = ""
    met: bool | None = None

    @property
    def ratio(self) -> float | None:
        """value / peer_value."""
        return self.value / self.peer_value if self.peer_value else None

    def as_dict(self) -> dict[str, object]:
        return {
            "measure": self.measure,
            "value": self.value,
            "unit": self.unit,
            "peer": self.peer,
            "peer_value": self.peer_value,
            "ratio": self.ratio,
            "goal": self.goal,
            "met": self.met,
        }


def arguments(description: str) -> argparse.Namespace:
    """--quick and --json."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small shapes, within a minute")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a measure, a line each"
    )
    return parser.parse_args()


def note(text: str, *, as_json: bool) -> None:
    """A line about what is going on; beside the JSON, not in it."""
    print(text, file=sys.stderr if as_json else sys.stdout, flush=True)


def report(measures: Sequence[Measure], *, as_json: bool) -> None:
    """The table (or JSON lines), closed by `goals met: N/M`."""
    if as_json:
        for measure in measures:
            print(json.dumps(measure.as_dict()))
    else:
        _table([("measure", "value", "peer", "ratio", "goal", "met"), *map(_cells, measures)])
    judged = [m.met for m in measures if m.met is not None]
    note(f"goals met: {sum(judged)}/{len(judged)}", as_json=as_json)


def _cells(m: Measure) -> tuple[str, ...]:
    peer = "" if m.peer_value is None else f"{m.peer}: {m.peer_value:.4g}"
    ratio = "" if m.ratio is None else f"{m.ratio:.3f}"
    met = {True: "yes", False: "NO", None: ""}[m.met]
    return (m.measure, f"{m.value:.4g} {m.unit}", peer, ratio, m.goal, met)


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def interleaved(
    functions: dict[str, Callable[[], object]], *, repeats: int, budget_seconds: float
) -> dict[str, list[float]]:
    """Seconds of each call, round by round, so that a slow minute of the machine hits all alike.

    Every function runs once unmeasured. Each round begins with another one. Stops after `repeats`
    rounds, or after the round in which the budget is spent (there is at least one).
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    start, names = time.perf_counter(), list(functions)
    for round_ in range(repeats):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(functions[name]))
        if time.perf_counter() - start > budget_seconds:
            break
    return seconds


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, with the GPU's work if there is a GPU."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired_ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Median of the rounds' own ratios: what the machine did in a round cancels out."""
    return median(a / b for a, b in zip(ours, peer, strict=True))


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most tensor memory that was live at once during the call, over what was live before.

    On a GPU by the allocator's own statistics, on a CPU by its record of every allocation
    (including temporaries inside operators, which a dispatch mode cannot see).
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    results = profile.profiler.kineto_results
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        live += change
        peak = max(peak, live)
    return peak


def student(layers: int, width: int, heads: int, key_value_heads: int, vocab_size: int) -> Any:
    """A Llama-shaped student with random weights, the same ones each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=width, intermediate_size=width * 8 // 3,
            num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=key_value_heads, tie_word_embeddings=True,
        )
    )  # fmt: skip


def training_step(
    model: Any, temperature: float, batch: int, length: int
) -> Callable[[Teacher | None], None]:
    """A step as the trainer makes it, without DeepSpeed: forward, loss, backward, AdamW.

    It takes a teacher's outputs for batch · length tokens, or None for cross-entropy alone.
    """
    vocab_size = model.config.vocab_size
    module = StudentWithLoss(model, Objective(temperature=temperature), vocab_size)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5)
    tokens = torch.randint(0, vocab_size, (batch, length))
    positions = torch.arange(length).expand_as(tokens)

    def step(teacher: Teacher | None) -> None:
        parts = module(tokens, positions, tokens, teacher, float(tokens.numel()))
        assert not isinstance(parts, torch.Tensor)
        parts.total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

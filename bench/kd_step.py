"""A training step with a cached teacher beside the same step with cross-entropy alone.

The student has SmolLM2-135M's shape with half of its layers (vocabulary 49,152, width 576), random
weights, fp32, AdamW, at T = 1, the schema's default, and at T = 4. A step is forward, loss, backward
and optimizer, as the trainer runs it (`StudentWithLoss`) without DeepSpeed. The cached teacher's
outputs are in memory, as the stream's reader has them once it has worked ahead; `bench/codec.py`
measures that work. Hidden multiplies by the teacher's LM head once more, which is not to be had for 2%.

    uv run python bench/kd_step.py [--quick] [--json]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from kit.common import (
    Measure,
    arguments,
    interleaved,
    note,
    paired_ratio,
    report,
    student,
    training_step,
)
from kubedistill_trainer.losses import Teacher, TeacherHidden, TeacherSampled, TeacherSparse

GOAL = 1.02
TEMPERATURES = (1.0, 4.0)
ALONE = "CE alone"
K, DRAWS = 100, 50


@dataclass(frozen=True)
class Plan:
    """Shape of the student and of a step."""

    layers: int
    vocab_size: int
    width: int
    tokens: int
    rounds: int
    seconds: float


FULL = Plan(15, 49_152, 576, 512, 15, 480)
# The same width and vocabulary: of a small student the loss is another share of the step.
QUICK = Plan(8, 49_152, 576, 192, 11, 35)


def teachers(plan: Plan, head: torch.Tensor, temperature: float) -> dict[str, Teacher]:
    """What each kind of stream gives for a step, of a random teacher of the student's width."""
    states = torch.randn(plan.tokens, plan.width)
    log_p = torch.log_softmax(states @ head.T, -1)
    top = log_p.topk(K)
    drawn = log_p[:, :DRAWS].softmax(-1)
    log_z = (log_p / temperature).logsumexp(-1)
    return {
        f"Sparse, K={K}": TeacherSparse(top.indices, top.values, log_z),
        f"Sampled, {DRAWS} draws": TeacherSampled(top.indices[:, :DRAWS].contiguous(), drawn),
        "Hidden": TeacherHidden(states, head.clone()),
    }


def steps(plan: Plan) -> dict[str, Callable[[], object]]:
    """One step for each kind; they share the student, which none of them depends on."""
    heads = max(1, plan.width // 64)
    model = student(plan.layers, plan.width, heads, max(1, heads // 3), plan.vocab_size)
    head = model.get_output_embeddings().weight.detach()
    found: dict[str, Callable[[], object]] = {}
    for temperature in TEMPERATURES:
        step = training_step(model, temperature, 2, plan.tokens // 2)
        found.setdefault(ALONE, partial(step, None))
        for name, teacher in teachers(plan, head, temperature).items():
            found[f"{name}, T={temperature:g}"] = partial(step, teacher)
    return found


def main() -> None:
    options = arguments(__doc__ or "")
    plan = QUICK if options.quick else FULL
    note(
        f"{plan.layers} layers, H={plan.width}, V={plan.vocab_size}, {plan.tokens} tokens a step, "
        f"{torch.get_num_threads()} threads",
        as_json=options.json,
    )
    seconds = interleaved(steps(plan), repeats=plan.rounds, budget_seconds=plan.seconds)
    baseline = seconds.pop(ALONE)
    measures = []
    for name, times in seconds.items():
        ratio, value = paired_ratio(times, baseline), 1e3 * median(times)
        goal, met = f"≤ {GOAL}", ratio <= GOAL
        measures.append(Measure(f"step, {name}", value, "ms", ALONE, value / ratio, goal, met))
    report(measures, as_json=options.json)


if __name__ == "__main__":
    main()

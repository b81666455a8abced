"""How fast one core decodes the teacher's cache, beside how fast a training rank on it eats.

The peer is the training step itself (`StudentWithLoss`, forward, loss, backward, AdamW) on one
thread, in tokens a second: a rank that shares its core with the decoder loses what decoding takes.
Students: the demo's last (2 layers of 96, vocabulary 2,048), and SmolLM2-135M's shape with half of
its layers. Payloads are of distributions as language has them: a Zipfian prior, and context.

    uv run python bench/codec.py [--quick] [--json]
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from kit.common import Measure, arguments, interleaved, note, report, student, training_step
from kubedistill_trainer.losses import Teacher, TeacherHidden
from kubedistill_trainer.methods.signal import joined_sampled, joined_sparse
from kubedistill_trainer.teacher.codec import decode_outputs, encode_outputs
from kubedistill_trainer.teacher.payload import (
    Hidden,
    TeacherOutputs,
    sampled_of_logits,
    sparse_of_logits,
)
from kubedistill_trainer.teacher.payload_spec import (
    HiddenSpec,
    PayloadSpec,
    SampledSpec,
    SparseSpec,
)

GOAL = 5.0
TEMPERATURE = 4.0


@dataclass(frozen=True)
class Plan:
    """A student, and the width of its teacher; `length` tokens a sample, `batch` samples a step."""

    name: str
    layers: int
    width: int
    heads: int
    vocab_size: int
    teacher_width: int
    length: int
    batch: int
    k: int


DEMO = Plan("demo", 2, 96, 4, 2_048, 112, 128, 4, 100)
SMOLLM2 = Plan("SmolLM2", 15, 576, 9, 49_152, 576, 256, 1, 100)
QUICK = Plan("SmolLM2, 2 layers", 2, 576, 9, 49_152, 576, 128, 1, 100)


def specs(plan: Plan) -> list[PayloadSpec]:
    return [
        SparseSpec(k=plan.k, temperatures=(1.0, TEMPERATURE)),
        SampledSpec(draws=50, temperature=TEMPERATURE),
        HiddenSpec(),
    ]


def records(plan: Plan, spec: PayloadSpec) -> list[bytes]:
    """The encoded samples of a step."""
    generator = torch.Generator().manual_seed(0)
    prior = -torch.log(torch.arange(1, plan.vocab_size + 1).float())
    prior = prior[torch.randperm(plan.vocab_size, generator=generator)]
    result = []
    for _ in range(plan.batch):
        noise = torch.randn(plan.length, plan.vocab_size, generator=generator)
        logits = prior + 2 * noise
        match spec:
            case SparseSpec():
                outputs = TeacherOutputs(sparse=sparse_of_logits(logits, spec.k, spec.temperatures))
            case SampledSpec():
                drawn = sampled_of_logits(logits, spec.draws, spec.temperature, generator)
                outputs = TeacherOutputs(sampled=drawn)
            case HiddenSpec():
                states = torch.randn(plan.length, plan.teacher_width, generator=generator)
                outputs = TeacherOutputs(hidden=Hidden(states))
        result.append(encode_outputs(outputs, [spec], plan.vocab_size))
    return result


def teacher_of(plan: Plan, spec: PayloadSpec, encoded: list[bytes]) -> Teacher:
    """What the loss takes, of the decoded samples."""
    outputs = [decode_outputs(record, [spec]) for record in encoded]
    cpu = torch.device("cpu")
    if isinstance(spec, SparseSpec):
        return joined_sparse(outputs, TEMPERATURE, cpu)
    if isinstance(spec, SampledSpec):
        return joined_sampled(outputs, cpu)
    states = torch.cat([o.hidden.states for o in outputs if o.hidden is not None])
    return TeacherHidden(states, torch.randn(plan.vocab_size, plan.teacher_width))


def measured(plan: Plan, rounds: int, seconds: float) -> list[Measure]:
    """Each payload's decoding beside the step that it feeds."""
    result = []
    tokens = plan.batch * plan.length
    for spec in specs(plan):
        encoded = records(plan, spec)
        model = student(plan.layers, plan.width, plan.heads, plan.heads, plan.vocab_size)
        train = training_step(model, TEMPERATURE, plan.batch, plan.length)
        step = partial(train, teacher_of(plan, spec, encoded))

        def decode(spec: PayloadSpec = spec, encoded: list[bytes] = encoded) -> object:
            return [decode_outputs(record, [spec]) for record in encoded]

        times = interleaved(
            {"decode": decode, "step": step}, repeats=rounds, budget_seconds=seconds
        )
        rate, eaten = (tokens / min(times[name]) for name in ("decode", "step"))
        result.append(
            Measure(
                f"decode {spec.kind}, {plan.name}", rate, "tokens/s", "a training rank", eaten,
                f"≥ {GOAL:g} times what the rank eats", rate >= GOAL * eaten,
            )
        )  # fmt: skip
    return result


def main() -> None:
    options = arguments(__doc__ or "")
    torch.set_num_threads(1)
    note("one thread, fp32", as_json=options.json)
    plans = [DEMO, QUICK] if options.quick else [DEMO, SMOLLM2]
    rounds, seconds = (3, 4.0) if options.quick else (9, 60.0)
    measures = [m for plan in plans for m in measured(plan, rounds, seconds)]
    report(measures, as_json=options.json)


if __name__ == "__main__":
    main()

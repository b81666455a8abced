"""What distillation is worth on real text, by seed: mean and spread of the held-out perplexity.

A teacher is trained on the Brown corpus, then small students on the same tokens for the same number
of steps: by cross-entropy alone, and by distillation in every variant that the product offers. What
differs between seeds is the student's start and the order of the data; within a seed all students
start alike and see the same batches. Steps are the trainer's own (`StudentWithLoss`, its schedule and
its order of data) without DeepSpeed. The teacher's states are made once and kept in memory, which is
what an online teacher would give again in each epoch; "stream" writes them to a SeaweedFS server and
reads them back as the trainer does, with the payload Hidden (`kit/stream.py`).

Which temperature the schema has for a default is judged by what is found here.

    uv run python bench/quality.py [--quick] [--json]
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

import numpy as np
import torch
from kit.brown import documents
from kit.common import Measure, arguments, note, report
from kit.stream import Open, streamed
from kubedistill_api.objective import Objective
from kubedistill_api.training import Training
from kubedistill_trainer.data.order import Order, Part, Split, split
from kubedistill_trainer.data.packing import IGNORED, Packed, encode, pack
from kubedistill_trainer.losses import FeatureMatcher, LossParts, Teacher, TeacherHidden
from kubedistill_trainer.methods.objective import feature_pairs
from kubedistill_trainer.methods.schedule import learning_rate
from kubedistill_trainer.methods.signal import hidden_states
from kubedistill_trainer.methods.student import StudentWithLoss
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "examples" / "demo"))

from corpus import trained_tokenizer  # noqa: E402
from devcluster.assets import cache_root  # noqa: E402

TEMPERATURES = (1.0, 2.0, 4.0, 6.0, 8.0, 10.0)
DEFAULT = Objective().temperature
"""The schema's."""
STREAMED = 4.0
"""Where a cache of the likeliest tokens is of no use any more, and a stream has to show its worth."""
LENGTH, BATCH = 128, 16
GOAL_BEST = 1.02


@dataclass(frozen=True)
class Shape:
    """A Llama: layers and width; heads are 32 wide."""

    layers: int
    width: int


@dataclass(frozen=True)
class Plan:
    """Sizes and steps; `vocab_size` of the tokenizer, which is trained on the text."""

    teacher: Shape
    middle: Shape
    student: Shape
    vocab_size: int
    texts: int
    teacher_steps: int
    steps: int
    seeds: int


FULL = Plan(Shape(3, 192), Shape(2, 128), Shape(2, 64), 2048, 500, 500, 200, 3)
QUICK = Plan(Shape(2, 64), Shape(2, 48), Shape(1, 32), 512, 20, 20, 10, 2)


@dataclass(frozen=True)
class Text:
    packed: Packed
    split: Split


class Source(Protocol):
    """A teacher as a student's steps see it: `Signal` of the trainer, of which this is a part."""

    def expect(self, batches: Iterator[Any]) -> None: ...
    def batch(self, samples: Any, tokens: Tensor, positions: Tensor) -> Teacher | None: ...


@dataclass(frozen=True)
class Cached:
    """A teacher's states [samples, L, H], final and after inner layers, and its head [V, H]."""

    states: Tensor
    layers: Mapping[int, Tensor]
    head: Tensor

    def expect(self, batches: Iterator[Any]) -> None:
        """All of it is here."""

    def batch(self, samples: Any, tokens: Tensor, positions: Tensor) -> TeacherHidden:
        index = torch.from_numpy(np.asarray(samples))
        layers = {n: states[index].flatten(0, 1) for n, states in self.layers.items()}
        return TeacherHidden(self.states[index].flatten(0, 1), self.head, None, layers)


def text(plan: Plan) -> Text:
    texts = documents(cache_root() / "corpora")[: plan.texts]
    tokenizer = trained_tokenizer(texts, plan.vocab_size)
    packed = pack(encode(texts, tokenizer, 0), LENGTH)
    return Text(packed, split([len(packed)], 0.05, 0))


def model(shape: Shape, vocab_size: int, seed: int) -> Any:
    torch.manual_seed(seed)
    heads = shape.width // 32
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=shape.width, intermediate_size=shape.width * 8 // 3,
            num_hidden_layers=shape.layers, num_attention_heads=heads, num_key_value_heads=heads,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def tensors(packed: Packed, samples: Any) -> tuple[Tensor, Tensor, Tensor]:
    part = packed.take(samples)
    tokens, positions, labels = map(torch.from_numpy, (part.tokens, part.positions, part.labels))
    return tokens, positions, labels


def trained(
    data: Text,
    student: Any,
    steps: int,
    seed: int,
    teacher: Source | None = None,
    objective: Objective | None = None,
) -> Any:
    """`student` after `steps` steps; `objective` where there is a teacher."""
    features = None
    if isinstance(teacher, Cached) and objective is not None and objective.features:
        count = max(teacher.layers)
        pairs = feature_pairs(objective, student.config.num_hidden_layers, count)
        features = FeatureMatcher(pairs, student.config.hidden_size, teacher.head.shape[1])
    module = StudentWithLoss(student, objective, student.config.vocab_size, features)
    training = Training(learning_rate=2e-3, seed=seed)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=training.weight_decay)
    order = Order([Part(data.split.training)], BATCH, seed)
    if teacher is not None:
        teacher.expect(order.batch(step) for step in range(steps))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, training)
        samples = order.batch(step)
        tokens, positions, labels = tensors(data.packed, samples)
        valid = float((labels != IGNORED).sum())
        batch = teacher.batch(samples, tokens, positions) if teacher else None
        parts = module(tokens, positions, labels, batch, valid)
        assert isinstance(parts, LossParts)
        parts.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(module.parameters(), training.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
    return student


@torch.inference_mode()
def cached(trained_model: Any, data: Text, layers: bool = False) -> Cached:
    """What the teacher gives for all samples; `layers`: with all inner states."""
    wanted = tuple(range(1, trained_model.config.num_hidden_layers + 1)) if layers else ()
    final: list[Tensor] = []
    inner: dict[int, list[Tensor]] = {n: [] for n in wanted}
    for ids in np.array_split(np.arange(len(data.packed)), math.ceil(len(data.packed) / BATCH)):
        tokens, positions, _ = tensors(data.packed, ids)
        last, found = hidden_states(trained_model.get_decoder(), tokens, positions, wanted)
        final.append(last.view(len(ids), LENGTH, -1))
        for n, states in found.items():
            inner[n].append(states.view(len(ids), LENGTH, -1))
    head = trained_model.get_output_embeddings().weight.detach().clone()
    # No inference tensors: the students' graphs have to save them.
    layers_of = {n: torch.cat(states).clone() for n, states in inner.items()}
    return Cached(torch.cat(final).clone(), layers_of, head)


@torch.inference_mode()
def perplexity(trained_model: Any, data: Text) -> float:
    """On the held-out sequences."""
    nll, count = 0.0, 0
    for ids in np.array_split(data.split.heldout, math.ceil(len(data.split.heldout) / BATCH)):
        tokens, positions, labels = tensors(data.packed, ids)
        logits = trained_model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        nll += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(),
                labels.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
        )
        count += int((labels != IGNORED).sum())
    return math.exp(nll / count)


def variants(default: float) -> dict[str, Objective | None]:
    """The students that learn from the teacher itself."""
    matching = [{"loss": "MSE", "weight": 0.1}]
    return {
        "cross-entropy": None,
        **{f"T = {T:g}": Objective(temperature=T) for T in TEMPERATURES},
        f"T = {default:g}, features": Objective.model_validate(
            {"temperature": default, "features": matching}
        ),
    }


def seed_results(
    data: Text, teacher: Cached, open_stream: Open, plan: Plan, seed: int
) -> Iterator[tuple[str, float]]:
    """(name, held-out perplexity) of each student of a seed."""

    def result(
        source: Source | None, objective: Objective | None, steps: int = plan.steps
    ) -> float:
        start = model(plan.student, plan.vocab_size, seed + 1)
        return perplexity(trained(data, start, steps, seed, source, objective), data)

    for name, objective in variants(DEFAULT).items():
        yield name, result(teacher if objective else None, objective)
    stream = open_stream()
    try:
        yield f"T = {STREAMED:g}, stream", result(stream, Objective(temperature=STREAMED))
    finally:
        stream.close()
    default = Objective(temperature=DEFAULT)
    yield f"T = {DEFAULT:g}, twice the steps", result(teacher, default, 2 * plan.steps)
    start = model(plan.middle, plan.vocab_size, seed + 1)
    middle = trained(data, start, plan.steps, seed, teacher, default)
    yield f"T = {DEFAULT:g}, the middle student", perplexity(middle, data)
    yield f"T = {DEFAULT:g}, progressive", result(cached(middle, data), default)


def measures(found: Mapping[str, list[float]]) -> list[Measure]:
    """Means beside cross-entropy's, spreads, and what is judged."""
    means = {name: mean(values) for name, values in found.items()}
    hard = means["cross-entropy"]
    noise = max(stdev(values) for values in found.values())
    rows = []
    for name, value in means.items():
        rows.append(Measure(f"perplexity, {name}", value, "", "cross-entropy", hard))
        rows.append(Measure(f"spread, {name}", stdev(found[name]), "perplexity"))
    default, online, stream = (
        f"T = {DEFAULT:g}", f"T = {STREAMED:g}", f"T = {STREAMED:g}, stream",
    )  # fmt: skip
    best = min((f"T = {T:g}" for T in TEMPERATURES), key=lambda name: means[name])

    def judge(name: str, peer: str, goal: str, met: bool) -> None:
        rows.append(Measure(name, means[name], "perplexity", peer, means[peer], goal, met))

    judge(default, "cross-entropy", "distillation at the schema's T is better",
          means[default] < hard)  # fmt: skip
    gap = mean(abs(a - b) for a, b in zip(found[stream], found[online], strict=True))
    judge(stream, online, "apart by less than seeds are", gap <= noise)
    judge(
        default,
        best,
        f"the schema's T ≤ {GOAL_BEST} × the best",
        means[default] <= GOAL_BEST * means[best],
    )
    return rows


def main() -> None:
    options = arguments(__doc__ or "")
    plan = QUICK if options.quick else FULL
    say: Callable[[str], None] = lambda line: note(line, as_json=options.json)  # noqa: E731
    begun = time.perf_counter()
    data = text(plan)
    say(f"Brown corpus: {len(data.split.training)} sequences of {LENGTH} tokens to learn from, "
        f"{len(data.split.heldout)} held out; {plan}")  # fmt: skip
    big = model(plan.teacher, plan.vocab_size, 0)
    big = trained(data, big, plan.teacher_steps, 0)
    say(f"teacher: perplexity {perplexity(big, data):.2f}, {time.perf_counter() - begun:.0f} s")
    teacher = cached(big, data, layers=True)
    found: dict[str, list[float]] = {}
    with streamed(teacher.states, teacher.head, data.packed) as open_stream:
        say(f"stream written, {time.perf_counter() - begun:.0f} s")
        for seed in range(plan.seeds):
            for name, value in seed_results(data, teacher, open_stream, plan, seed):
                found.setdefault(name, []).append(value)
                say(f"seed {seed}, {name}: {value:.2f}, {time.perf_counter() - begun:.0f} s")
    report(measures(found), as_json=options.json)


if __name__ == "__main__":
    main()

"""Forward and backward of the distillation loss: ours, dense PyTorch, Liger's and TRL's chunked losses.

All three compute w · T² · KL(teacher ‖ student) + (1 − w) · CE from the same final hidden states and
LM heads (T = 4, w = 0.5, fp32; Liger: its generalised JSD with beta = 0, which is forward KL, and
the T² in its weight), checked against each other before anything is timed. Liger runs with several
chunk sizes, and on a GPU compiled as well; the fastest of them is the peer. On a GPU ours takes its
compiled form (`losses/fused.py`), and the eager one is measured beside it.

TRL's chunked loss has the soft term alone, so it is measured against ours with w = 1.

Memory is the peak of live tensors above the inputs. Every implementation must give the gradient of
the hidden states and of the LM head, so the comparison with dense counts them on both sides. For
"flat in V" the head's gradient is subtracted: it is V · H bytes by what it is.

    uv run python bench/kd_loss.py [--quick] [--json]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from kit.common import Measure, arguments, interleaved, note, paired_ratio, peak_bytes, report
from kubedistill_trainer.losses import TeacherHidden, distillation_loss, fused
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

TEMPERATURE, SOFT_WEIGHT = 4.0, 0.5
LIGER_CHUNKS = (64, 128, 256, 1024)
MIB = 1 << 20
GOAL_MEMORY, GOAL_FLAT, GOAL_TIME = 15.0, 1.25, 1.02


@dataclass(frozen=True)
class Plan:
    """What is measured. `memory_tokens` for the comparison with dense, `tokens` for all else."""

    vocabularies: tuple[int, ...]
    tokens: int
    memory_tokens: int
    width: int
    rounds: int
    seconds_per_vocabulary: float


FULL = Plan((32_000, 49_152, 128_256, 151_936), 1024, 2048, 576, 7, 45)
# As many tokens as fill the workspace at the smallest vocabulary: memory is flat from there on.
QUICK = Plan((32_000, 128_256), 256, 1024, 64, 5, 4)


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    head: Tensor
    states: Tensor
    teacher_head: Tensor
    labels: Tensor

    def reset(self) -> None:
        self.hidden.grad = self.head.grad = None


def inputs(vocab: int, tokens: int, width: int, device: torch.device) -> Inputs:
    """A student near its teacher; every token has a label, which favours the peers."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device)
    head = torch.randn(vocab, width, device=device) * (2 / width**0.5)
    return Inputs(
        hidden.clone().requires_grad_(),
        head.clone().requires_grad_(),
        hidden.add_(torch.randn_like(hidden), alpha=0.3),
        head,
        torch.randint(vocab, (tokens,), device=device),
    )


def eager(x: Inputs) -> float:
    """Ours as on a CPU."""
    taken, fused.worth_fusing = fused.worth_fusing, lambda device: False
    try:
        return ours(x)
    finally:
        fused.worth_fusing = taken


def ours(x: Inputs, soft_weight: float = SOFT_WEIGHT) -> float:
    x.reset()
    loss = distillation_loss(
        x.hidden,
        x.head,
        x.labels,
        TeacherHidden(x.states, x.teacher_head),
        temperature=TEMPERATURE,
        soft_weight=soft_weight,
        normalizer=len(x.labels),
    ).total
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def dense(x: Inputs, soft_weight: float = SOFT_WEIGHT) -> float:
    x.reset()
    logits = x.hidden @ x.head.T
    with torch.no_grad():
        log_p = log_softmax(x.states @ x.teacher_head.T / TEMPERATURE, dim=-1)
    log_q = log_softmax(logits / TEMPERATURE, dim=-1)
    soft = TEMPERATURE**2 * kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    loss = soft_weight * soft + (1 - soft_weight) * cross_entropy(logits, x.labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def liger(chunk: int, *, compiled: bool) -> Callable[[Inputs], float]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - SOFT_WEIGHT,
        weight_soft_loss=SOFT_WEIGHT * TEMPERATURE**2,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=compiled,
        chunk_size=chunk,
    )

    def run(x: Inputs) -> float:
        x.reset()
        loss = function(x.hidden, x.head, x.states, x.teacher_head, x.labels)
        loss.backward()
        return float(loss.detach())

    return run


def trl(x: Inputs) -> float:
    """TRL's chunked divergence: the soft term alone, for T² · KL(teacher ‖ student)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    x.reset()
    per_token, _ = ChunkedDivergenceFunction.apply(
        x.hidden, x.head, None, x.states, x.teacher_head, None, 0.0, TEMPERATURE
    )
    loss = TEMPERATURE**2 * per_token.mean()
    loss.backward()
    return float(loss.detach())


def peers(device: torch.device, tokens: int) -> dict[str, Callable[[Inputs], float]]:
    """Liger's variants. On a CPU its compiler takes minutes a shape: there it runs as it is."""
    modes = (False, True) if device.type == "cuda" else (False,)
    return {
        f"liger({chunk}{', compiled' if compiled else ''})": liger(chunk, compiled=compiled)
        for compiled in modes
        for chunk in LIGER_CHUNKS
        if chunk <= tokens
    }


def disagreement(
    functions: dict[str, Callable[[Inputs], float]], x: Inputs, soft_weight: float
) -> float:
    """Greatest relative difference of loss or gradient from the dense loss."""
    expected = [torch.tensor(dense(x, soft_weight)), x.hidden.grad, x.head.grad]
    worst = 0.0
    for function in functions.values():
        found = [torch.tensor(function(x)), x.hidden.grad, x.head.grad]
        for a, b in zip(found, expected, strict=True):
            assert a is not None
            assert b is not None
            worst = max(worst, float((a - b).norm() / b.norm()))
    return worst


def agreement(device: torch.device) -> Measure:
    x = inputs(2_003, 97, 64, device)
    worst = max(
        disagreement({"ours": ours, **peers(device, 97)}, x, SOFT_WEIGHT),
        disagreement({"ours": partial(ours, soft_weight=1.0), "trl": trl}, x, 1.0),
    )
    goal = "≤ 1e-4: all compute the same loss and gradients"
    return Measure("disagreement with dense", worst, "relative", goal=goal, met=worst <= 1e-4)


def timing(vocab: int, plan: Plan, device: torch.device) -> list[Measure]:
    """Ours against the fastest peer, and against dense."""
    x = inputs(vocab, plan.tokens, plan.width, device)
    functions: dict[str, Callable[[Inputs], float]] = {
        "ours": ours,
        "ours, w = 1": partial(ours, soft_weight=1.0),
        "dense": dense,
        "trl": trl,
        **({"ours, eager": eager} if fused.worth_fusing(device) else {}),
        **peers(device, plan.tokens),
    }
    seconds = interleaved(
        {name: partial(function, x) for name, function in functions.items()},
        repeats=plan.rounds,
        budget_seconds=plan.seconds_per_vocabulary,
    )
    fastest = min((n for n in seconds if n.startswith("liger")), key=lambda n: median(seconds[n]))
    goal = f"≤ {GOAL_TIME} × the fastest chunked peer"
    pairs = [("", "ours", fastest, goal), ("", "ours", "dense", "")]
    if fused.worth_fusing(device):
        pairs.append(("", "ours", "ours, eager", ""))
    pairs.append((", soft term alone", "ours, w = 1", "trl", f"≤ {GOAL_TIME} × TRL's"))
    return [
        _time(f"time{part}, V={vocab}", seconds[mine], peer, seconds[peer], goal)
        for part, mine, peer, goal in pairs
    ]


def _time(name: str, mine: list[float], peer: str, theirs: list[float], goal: str) -> Measure:
    ratio, value = paired_ratio(mine, theirs), 1e3 * median(mine)
    # So that value / peer_value is the median of the rounds' ratios.
    judged = (goal, ratio <= GOAL_TIME) if goal else ()
    return Measure(name, value, "ms", peer, value / ratio, *judged)


def memory(vocab: int, plan: Plan, device: torch.device) -> tuple[Measure, float]:
    """Peak beside Liger's (its smallest chunk), and the peak without the head's gradient."""
    x = inputs(vocab, plan.memory_tokens, plan.width, device)
    peak = peak_bytes(partial(ours, x), device)
    name, peer = next(iter(peers(device, plan.memory_tokens).items()))
    peer_peak = peak_bytes(partial(peer, x), device)
    x.reset()
    own = peak - vocab * plan.width * 4
    return Measure(f"peak memory, V={vocab}", peak / MIB, "MiB", name, peer_peak / MIB), own / MIB


def against_dense(vocab: int, plan: Plan, device: torch.device) -> list[Measure]:
    x = inputs(vocab, plan.memory_tokens, plan.width, device)
    peak, dense_peak = (peak_bytes(partial(f, x), device) for f in (ours, dense))
    times = dense_peak / peak
    outputs = (vocab + plan.memory_tokens) * plan.width * 4
    return [
        Measure(
            f"peak memory, V={vocab}, {plan.memory_tokens} tokens, with both gradients",
            peak / MIB,
            "MiB",
            "dense",
            dense_peak / MIB,
            f"dense takes ≥ {GOAL_MEMORY:g} times as much",
            times >= GOAL_MEMORY,
        ),
        Measure(
            f"peak memory, V={vocab}, {plan.memory_tokens} tokens, without the gradients",
            (peak - outputs) / MIB,
            "MiB",
            "dense",
            (dense_peak - outputs) / MIB,
        ),
    ]


def flatness(own: dict[int, float]) -> Measure:
    least, most = min(own.values()), max(own.values())
    return Measure(
        f"peak memory less the head's gradient, over V={min(own)}…{max(own)}",
        most,
        "MiB",
        "least",
        least,
        f"most / least ≤ {GOAL_FLAT}",
        most / least <= GOAL_FLAT,
    )


def main() -> None:
    options = arguments(__doc__ or "")
    plan = QUICK if options.quick else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    note(
        f"{name}, {torch.get_num_threads()} threads, {plan.tokens} tokens, H={plan.width}, "
        f"fp32, T={TEMPERATURE:g}, w={SOFT_WEIGHT:g}",
        as_json=options.json,
    )
    measures = [agreement(device)]
    own: dict[int, float] = {}
    for vocab in plan.vocabularies:
        measures += timing(vocab, plan, device)
        measure, own[vocab] = memory(vocab, plan, device)
        measures.append(measure)
    measures += [flatness(own), *against_dense(128_256, plan, device)]
    report(measures, as_json=options.json)
    note(f"{time.perf_counter() - start:.0f} s", as_json=True)


if __name__ == "__main__":
    main()

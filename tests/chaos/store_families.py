"""Families of faults between the trainer and its store."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from signal import Signals

from kubedistill_api.exit_codes import ExitCode

from chaos.faults import PASS, At, Call, Fault, Kind
from chaos.figures import Family, Run
from chaos.store_bench import StoreBench, promised_step
from chaos.store_judge import (
    KILLS,
    disturbed,
    drawn_for,
    expect_unavailable,
    fault_at,
    kill_at,
    met,
    name_of,
    targets,
)
from chaos.store_parts import PARTS, parts_families
from chaos.store_resume import RESUME, resume_families
from chaos.store_run import RANKS, ZERO1, ZERO2, ZERO3, Job, rank_name
from chaos.store_service import service_families
from chaos.store_term import term_family

_PART = 4
"""Of the calls under ZeRO-2 and -3, which differ little from those under ZeRO-1, one in so many."""


def store_families(bench: StoreBench, asked: str = "") -> list[Family]:
    """All of them; or enough, where one of this name or some with this beginning are asked for.

    Making them runs the calm jobs that they are measured by.
    """
    families = call_families(bench)
    for names, make in ((RESUME, resume_families), (PARTS, parts_families)):
        exact = asked in {family.name for family in families}
        if not exact and any(name.startswith(asked) for name in names):
            families += make(bench)
    return families


def call_families(bench: StoreBench) -> list[Family]:
    """Those of a first attempt whose uploads are small."""
    families = []
    for job, suffix, stride in ((ZERO1, "", 1), (ZERO2, "-zero2", _PART), (ZERO3, "-zero3", _PART)):
        calls = targets(bench, job)
        kills = [(*target, kill) for target in calls for kill in KILLS]
        kill = partial(_kill, bench, job, kills, stride)
        families.append(Family(f"store-kill{suffix}", len(kills) // stride, kill, least_met=1.0))
        fault = partial(_one_fault, bench, job, calls, stride)
        cases = (2 if job == ZERO1 else 1) * len(calls) // stride
        families.append(
            Family(f"store-fault{suffix}", cases, fault, least_met=1.0, least_absorbed=1.0)
        )
    return [
        *families,
        Family("store-weather", 40, partial(_weather, bench), least_met=1.0, least_absorbed=0.75),
        Family("store-zombie", 40, partial(_zombie, bench), least_met=1.0),
        term_family(bench),
        *service_families(bench),
    ]


def _kill(
    bench: StoreBench,
    job: Job,
    kills: Sequence[tuple[int, int, Fault]],
    stride: int,
    run: Run,
    draw: random.Random,
) -> None:
    """kill −9 before and after each call, or at one that is drawn from every `stride` of these."""
    promised = kill_at(bench, run, job, kills[run.index * stride + draw.randrange(stride)])
    bench.conclude(run, name_of(run), 2, job, promised)


def _one_fault(
    bench: StoreBench,
    job: Job,
    calls: Sequence[tuple[int, int]],
    stride: int,
    run: Run,
    draw: random.Random,
) -> None:
    """One fault at one call: at each, round by round, or at one that is drawn of every `stride`."""
    number = (run.index * stride + draw.randrange(stride)) % len(calls)
    ended = fault_at(bench, run, job, calls[number], draw)
    bench.conclude(run, name_of(run), 2, job, promised_step(ended))


def _weather(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """Each call meets a fault with a probability of 1 in 8. What is too much is told, and harms nothing."""
    name, job = name_of(run), draw.choice((ZERO1, ZERO2, ZERO3))
    ended = disturbed(bench, run, job, _Weather(bench.gang.prefix(name), run.seed, 0.125))
    run.faults += met(bench)
    run.told["absorbed"] = ended.codes == [0] * RANKS
    if not run.told["absorbed"]:
        expect_unavailable(run, ended)
    run.violations += bench.check(name)
    bench.conclude(run, name, 2, job, promised_step(ended))


def _zombie(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """Attempt 1 is stopped at a call of rank 0, attempt 2 runs to its end, attempt 1 wakes."""
    number = draw.choice(bench.calm(ZERO1).of(0)).number
    wake_late(bench, run, number, draw.choice((Kind.SIGNAL_BEFORE, Kind.SIGNAL_AFTER)))


def wake_late(bench: StoreBench, run: Run, number: int, kind: Kind, job: Job = ZERO1) -> None:
    """The zombie that was stopped at call `number` of rank 0 changes nothing, and ends as fenced."""
    script = At(rank_name(0), number, Fault(kind, signal=Signals.SIGSTOP))
    name = name_of(run)
    with bench.attempt(name, 1, job, script) as zombie:
        stopped = bench.proxy.stopped.wait(60)
        if not stopped:
            run.violations.append(f"rank 0 made no call {number}")
            return
        for other in zombie.ranks:
            other.send_signal(Signals.SIGSTOP)
        assert script.met is not None
        run.faults.append(f"SIGSTOP at {script.met.method} {script.met.path} ({kind})")
        calls = bench.proxy.log
        bench.pass_a_second(name)
        with bench.second(name, 2, job) as newer:
            second = newer.wait()
        before = bench.log_of(name)
        bench.proxy.release()
        for other in zombie.ranks:
            other.send_signal(Signals.SIGCONT)
        first = zombie.wait()
        after = bench.log_of(name)
        written = [c for c in calls if c.call.method == "PUT" and "/log/" in c.call.path]
    run.lives += 2
    run.told["codes"] = [first.codes, second.codes]
    if second.codes != [0] * RANKS:
        run.violations.append(f"attempt 2 ended with {second.codes}: {second.tail}")
    if after != before:
        changed = sorted(key for key in after if after[key] != before.get(key))
        run.violations.append(f"the woken attempt wrote {changed}")
    fenced = [int(ExitCode.FENCED)] * RANKS
    # What only rank 0 writes, a RETIRE, only rank 0 is fenced by: its peer then loses it.
    fit = [fenced, [int(ExitCode.FENCED), int(ExitCode.PEER_LOST)]]
    if not _logs_again(bench, number, kind, job):
        fit.append([0] * RANKS)
    if first.codes not in fit:
        run.violations.append(
            f"the woken attempt ended with {first.codes}, expected one of {fit} "
            f"(it had written {len(written)} records): {first.tail}"
        )
    bench.conclude(run, name, 3, job, promised_step(second))


def _logs_again(bench: StoreBench, number: int, kind: Kind, job: Job) -> bool:
    """Whether the calm run's rank 0 writes to the log at this call or later."""
    first = number if kind == Kind.SIGNAL_BEFORE else number + 1
    return any(
        call.number >= first and call.method == "PUT" and "/log/" in call.path
        for call in bench.calm(job).of(0)
    )


@dataclass
class _Weather:
    """Any fault at any call."""

    own: str
    """The run's prefix."""
    seed: str
    share: float

    def __call__(self, call: Call) -> Fault:
        # By its own numbers: the order in which two ranks' calls come is not the seed's.
        draw = random.Random(f"{self.seed}/{call.client}/{call.number}")
        return drawn_for(call, self.own, draw) if draw.random() < self.share else PASS

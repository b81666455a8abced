"""Families of what a whole service does: it is away, silent, too busy, late, refuses, or lives in
another hour."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from signal import Signals

from chaos.faults import PASS, At, Call, Fault, Kind
from chaos.figures import Family, Run
from chaos.store_bench import StoreBench, promised_step
from chaos.store_judge import (
    AWAY,
    Again,
    From,
    disturbed,
    expect_declared,
    expect_unavailable,
    expect_unharmed,
    name_of,
    targets,
    undisturbed,
)
from chaos.store_run import RANKS, ZERO1, rank_name

_HOUR = 3600.0
_REFUSED = (
    Fault(Kind.ANSWER, 403, "AccessDenied"),
    Fault(Kind.ANSWER, 403, "InvalidAccessKeyId"),
    Fault(Kind.ANSWER, 403, "RequestTimeTooSkewed"),
    Fault(Kind.ANSWER, 404, "NoSuchBucket"),
)
_CONFLICT = Fault(Kind.ANSWER, 409, "ConditionalRequestConflict")
_IMPATIENT = {
    "KUBEDISTILL_STORE_READ_TIMEOUT_SECONDS": "0.8",
    "KUBEDISTILL_STORE_CONNECT_TIMEOUT_SECONDS": "0.8",
    "KUBEDISTILL_STORE_ATTEMPTS": "3",
}
_SILENCE = Fault(Kind.STALL, seconds=1.6)
"""Longer than `_IMPATIENT` waits."""


def service_families(bench: StoreBench) -> list[Family]:
    """All of them."""
    return [
        Family("store-outage", 20, partial(_outage, bench), least_met=1),
        Family("store-stall", 24, partial(_stall, bench), least_met=1),
        Family(
            "store-conflict", 3 * len(_conditional(bench)), partial(_conflict, bench), least_met=1
        ),
        Family("store-late", 40, partial(_late, bench), least_met=1),
        Family("store-refused", 24, partial(_refused, bench), least_met=0.9),
        Family("store-clock", 16, partial(_clock, bench), least_met=1),
    ]


def _conditional(bench: StoreBench) -> list[Call]:
    return [call for call in bench.calm(ZERO1).of(0) if call.conditional]


def _outage(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """From one call on the store is away: the attempt ends and says so, and the next one goes on."""
    rank, number = draw.choice(targets(bench, ZERO1))
    script = From(rank_name(rank), number, draw.choice(AWAY))
    # Three tries wait for seconds where five wait for a minute.
    ended = disturbed(bench, run, ZERO1, script, env={"KUBEDISTILL_STORE_ATTEMPTS": "3"})
    if script.count:
        run.faults.append(f"{script.count} × {script.fault} from {script.first}")
    expect_declared(run, ended)
    run.violations += bench.check(name_of(run))
    bench.conclude(run, name_of(run), 2, ZERO1, promised_step(ended))


def _stall(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """Silence beyond the client's patience: at one call, which is repeated; or at all from one on."""
    rank, number = draw.choice(targets(bench, ZERO1))
    if run.index % 3:
        once = Again(rank_name(rank), number, _SILENCE)
        ended = disturbed(bench, run, ZERO1, once, env=_IMPATIENT)
        if once.met is not None:
            run.faults.append(f"{_SILENCE} {once.met.method} {once.met.path}")
            _expect_repeated(bench, run, once.met)
        expect_unharmed(run, ended)
    else:
        script = From(rank_name(rank), number, _SILENCE)
        ended = disturbed(bench, run, ZERO1, script, env=_IMPATIENT)
        if script.count:
            run.faults.append(f"{script.count} × {_SILENCE} from {script.first}")
            expect_unavailable(run, ended, ("imeout", "imed out", "not done after"))
    run.violations += bench.check(name_of(run))
    bench.conclude(run, name_of(run), 2, ZERO1, promised_step(ended))


def _expect_repeated(bench: StoreBench, run: Run, met: Call) -> None:
    calls = [entry.call for entry in bench.proxy.log if entry.call.client == met.client]
    same = [call for call in calls if (call.method, call.target) == (met.method, met.target)]
    if not any(call.number > met.number for call in same):
        run.violations.append(f"{met.method} {met.path} was not repeated")


def _conflict(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """409 to a conditional PUT, which S3 says to repeat: once, more often, and for ever."""
    call = _conditional(bench)[run.index // 3]
    times = (1, 3, 1000)[run.index % 3]
    script = Again(rank_name(0), call.number, _CONFLICT, times)
    ended = disturbed(bench, run, ZERO1, script)
    if script.met is not None:
        run.faults.append(f"{script.count} × {_CONFLICT} {script.met.method} {script.met.path}")
    if times <= 3:
        expect_unharmed(run, ended)
    expect_declared(run, ended)
    run.violations += bench.check(name_of(run))
    bench.conclude(run, name_of(run), 2, ZERO1, promised_step(ended))


@dataclass
class _GoneAndLate:
    """A client is killed while its request is on its way."""

    bench: StoreBench
    inner: Again

    def __call__(self, call: Call) -> Fault:
        fault = self.inner(call)
        if fault != PASS:
            self.bench.proxy.signaller(call.client, Signals.SIGKILL)
        return fault


def _late(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """A write is applied when its client has given it up: it asked again, or it is dead."""
    writes = [
        (rank, call.number)
        for rank in range(RANKS)
        for call in bench.calm(ZERO1).of(rank)
        if call.method != "GET"
        and call.method != "HEAD"
        and call.conditional == (run.index % 4 < 2)
    ]
    rank, number = draw.choice(writes)
    # Before the next attempt, into its middle, and behind its end.
    fault = Fault(Kind.LATE, seconds=draw.choice((0.05, 0.4, 1.0, 2.5)))
    once = Again(rank_name(rank), number, fault)
    dies = run.index % 2 == 0
    ended = disturbed(bench, run, ZERO1, _GoneAndLate(bench, once) if dies else once)
    if once.met is not None:
        run.faults.append(f"{'death, ' * dies}{fault} {once.met.method} {once.met.path}")
    promised, number = promised_step(ended), 2
    if dies:
        expect_declared(run, ended, killed={rank, *ended.left_alone})
        promised, number = undisturbed(bench, run, 2, promised), 3
    else:
        expect_unharmed(run, ended)
    bench.proxy.settle()
    run.violations += bench.check(name_of(run))
    bench.conclude(run, name_of(run), number, ZERO1, promised)


def _refused(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """Keys are revoked or the bucket vanishes, for both ranks, in a run's first or second attempt."""
    rank, number = draw.choice(targets(bench, ZERO1))
    fault = _REFUSED[run.index % len(_REFUSED)]
    name, attempt, promised = name_of(run), 1, 0
    if run.index // len(_REFUSED) % 2:
        records = _conditional(bench)
        first = disturbed(
            bench, run, ZERO1, At(rank_name(0), records[3].number, Fault(Kind.SIGNAL_AFTER))
        )
        attempt, promised, number = 2, promised_step(first), number * 2 // 3
    script = From(rank_name(rank), number, fault, everybody=True)
    ended = disturbed(bench, run, ZERO1, script, attempt)
    if script.count:
        run.faults.append(f"{script.count} × {fault} from {script.first}")
        expect_unavailable(run, ended, ("refuses these credentials", "does not exist", "the clock"))
    else:
        run.told["not met"] = "the call was not made"
    run.violations += bench.check(name)
    bench.conclude(run, name, attempt + 1, ZERO1, max(promised, promised_step(ended)))


@dataclass
class _Clock:
    """All answers come from a server whose clock is ahead; one call may be a client's last."""

    fault: Fault
    end: At | None = None
    count: int = 0

    def __call__(self, call: Call) -> Fault:
        self.count += 1
        last = self.end(call) if self.end is not None else PASS
        return self.fault if last == PASS else last


def _clock(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """The store's clock is an hour ahead or behind in one attempt, and otherwise in the next one."""
    ahead = _HOUR if run.index % 2 else -_HOUR
    name, promised = name_of(run), 0
    for attempt, seconds in enumerate((ahead, draw.choice((-ahead, ahead))), 1):
        rank, number = draw.choice(targets(bench, ZERO1))
        killed = attempt == 1 and run.index % 4 < 3
        end = At(
            rank_name(rank), number, Fault(draw.choice((Kind.SIGNAL_BEFORE, Kind.SIGNAL_AFTER)))
        )
        script = _Clock(Fault(Kind.SKEW, seconds=seconds), end if killed else None)
        ended = disturbed(bench, run, ZERO1, script, attempt)
        run.faults.append(f"{script.count} × {script.fault}")
        if killed:
            expect_declared(run, ended, killed={rank, *ended.left_alone})
        else:
            expect_unharmed(run, ended)
        promised = max(promised, promised_step(ended))
        run.violations += bench.check(name)
    bench.conclude(run, name, 3, ZERO1, promised)

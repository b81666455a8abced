"""Families of faults between the trainer and its store."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from signal import Signals

from kubedistill_api.exit_codes import ExitCode

from chaos.faults import PASS, At, Call, Fault, Kind, Script
from chaos.figures import Family, Run
from chaos.store_bench import DECLARED, StoreBench, promised_step
from chaos.store_run import RANKS, Ended, rank_name

_KILLS = (Fault(Kind.SIGNAL_BEFORE), Fault(Kind.SIGNAL_AFTER))
_FAULTS = (
    Fault(Kind.ANSWER, 500, "InternalError"),
    Fault(Kind.ANSWER, 503, "SlowDown"),
    Fault(Kind.ANSWER, 429, "TooManyRequests"),
    Fault(Kind.RESET_BEFORE),
    Fault(Kind.RESET_AFTER),
    Fault(Kind.TRUNCATE),
    Fault(Kind.STALL, seconds=0.3),
    Fault(Kind.DELAY, seconds=0.3),
    Fault(Kind.SKEW, seconds=3600),
    Fault(Kind.SKEW, seconds=-3600),
    Fault(Kind.TRUNCATE_REQUEST),
    Fault(Kind.GARBLE_REQUEST),
    Fault(Kind.GARBLE),
)


def store_families(bench: StoreBench) -> list[Family]:
    """All of them; asking for them runs the calm jobs that they are measured by."""
    calls = {zero: _targets(bench, zero) for zero in (1, 2, 3)}
    return [
        Family("store-kill", 2 * len(calls[1]), partial(_kill, bench, 1, calls[1])),
        Family("store-kill-zero2", 2 * len(calls[2]), partial(_kill, bench, 2, calls[2])),
        Family("store-kill-zero3", 2 * len(calls[3]), partial(_kill, bench, 3, calls[3])),
        Family("store-fault", 3 * len(calls[1]), partial(_one_fault, bench)),
        Family("store-weather", 40, partial(_weather, bench)),
        Family("store-outage", 20, partial(_outage, bench)),
        Family("store-zombie", 40, partial(_zombie, bench)),
        Family("store-term", 40, partial(_term, bench)),
    ]


def _targets(bench: StoreBench, zero: int) -> list[tuple[int, int]]:
    """(rank, number) of every call of the calm run."""
    return [(rank, call.number) for rank in range(RANKS) for call in bench.calm(zero).of(rank)]


def _name(run: Run) -> str:
    return f"{run.family}-{run.index}"


def _kill(
    bench: StoreBench,
    zero: int,
    targets: Sequence[tuple[int, int]],
    run: Run,
    draw: random.Random,
) -> None:
    """kill −9 before and after each call."""
    rank, number = targets[run.index // 2]
    script = At(rank_name(rank), number, _KILLS[run.index % 2])
    ended = _disturbed(bench, run, zero, script)
    if script.met is None:
        run.told["not met"] = f"{rank_name(rank)} made no call {number}"
    else:
        run.faults.append(f"{_KILLS[run.index % 2]} {script.met.method} {script.met.path}")
        if ended.codes[rank] != -Signals.SIGKILL:
            run.violations.append(f"rank {rank} was killed and ended with {ended.codes[rank]}")
    # Which pod's kubelet ends the others is not the trainer's affair: that they end is.
    _declared(run, ended, killed={rank, *ended.left_alone})
    run.violations += bench.check(_name(run))
    bench.conclude(run, _name(run), 2, zero, promised_step(ended))


def _one_fault(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """One fault at one call: the attempt goes on as if nothing had been."""
    zero = draw.choice((1, 1, 2, 3))
    targets = _targets(bench, zero)
    rank, number = targets[run.index % len(targets)]
    fault = draw.choice(_FAULTS)
    script = _Checked(bench, run, {(rank_name(rank), number): fault})
    _expect_same(bench, run, zero, script)


def _weather(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """Each call meets a fault with a probability of 1 in 8."""
    script = _Weather(bench, run, draw, 0.125)
    _expect_same(bench, run, draw.choice((1, 2, 3)), script)


def _outage(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """From one call on the store is away: the attempt ends and says so, and the next one goes on."""
    rank, number = draw.choice(_targets(bench, 1))
    fault = draw.choice((_FAULTS[0], _FAULTS[1], _FAULTS[2], _FAULTS[3], _FAULTS[4]))
    script = _From(rank_name(rank), number, fault)
    ended = _disturbed(bench, run, 1, script)
    if script.count:
        run.faults.append(f"{script.count} × {fault} from {script.first}")
    _declared(run, ended)
    run.violations += bench.check(_name(run))
    bench.conclude(run, _name(run), 2, 1, promised_step(ended))


def _zombie(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """Attempt 1 is stopped at a call of rank 0, attempt 2 runs to its end, attempt 1 wakes."""
    number = draw.choice(bench.calm(1).of(0)).number
    wake_late(bench, run, number, draw.choice((Kind.SIGNAL_BEFORE, Kind.SIGNAL_AFTER)))


def wake_late(bench: StoreBench, run: Run, number: int, kind: Kind) -> None:
    """The zombie that was stopped at call `number` of rank 0 changes nothing, and ends as fenced."""
    script = At(rank_name(0), number, Fault(kind, signal=Signals.SIGSTOP))
    name = _name(run)
    with bench.attempt(name, 1, 1, script) as zombie:
        stopped = bench.proxy.stopped.wait(60)
        if not stopped:
            run.violations.append(f"rank 0 made no call {number}")
            return
        for other in zombie.ranks:
            other.signal(Signals.SIGSTOP)
        assert script.met is not None
        run.faults.append(f"SIGSTOP at {script.met.method} {script.met.path} ({kind})")
        calls = bench.proxy.log
        bench.pass_a_second(name)
        with bench.second(name, 2) as newer:
            second = newer.wait()
        before = bench.log_of(name)
        bench.proxy.release()
        for other in zombie.ranks:
            other.signal(Signals.SIGCONT)
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
    expected = (
        {int(ExitCode.FENCED)} if _logs_again(bench, number, kind) else {0, int(ExitCode.FENCED)}
    )
    if not set(first.codes) <= expected:
        run.violations.append(
            f"the woken attempt ended with {first.codes}, expected {sorted(expected)} "
            f"(it had written {len(written)} records): {first.tail}"
        )
    bench.conclude(run, name, 3, 1, promised_step(second))


def _logs_again(bench: StoreBench, number: int, kind: Kind) -> bool:
    """Whether the calm run's rank 0 writes to the log at this call or later."""
    first = number if kind == Kind.SIGNAL_BEFORE else number + 1
    return any(
        call.number >= first and call.method == "PUT" and "/log/" in call.path
        for call in bench.calm(1).of(0)
    )


def _term(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """SIGTERM at a call, and once more, with much grace or with one second of it."""
    rank, number = draw.choice(_targets(bench, 1))
    grace = draw.choice((1, 30))
    kind = draw.choice((Kind.SIGNAL_BEFORE, Kind.SIGNAL_AFTER))
    script = _Both(bench, rank, number, Fault(kind, signal=Signals.SIGTERM), draw.randint(0, 12))
    ended = _disturbed(bench, run, 1, script, grace_seconds=grace)
    run.told["grace"] = grace
    run.faults += script.told
    allowed = {0, int(ExitCode.GRACEFUL_CHECKPOINT), int(ExitCode.INTERRUPTED)}
    if grace == 1 or int(ExitCode.INTERRUPTED) in ended.codes:
        # A rank whose grace is over does not wait for its peers, who then lose it.
        allowed |= {int(ExitCode.PEER_LOST)}
    if not set(ended.codes) <= allowed:
        run.violations.append(f"ended with {ended.codes} after SIGTERM: {ended.tail}")
    if ended.left_alone:
        run.violations.append(f"ranks {ended.left_alone} went on after SIGTERM: {ended.tail}")
    run.violations += bench.check(_name(run))
    bench.conclude(run, _name(run), 2, 1, promised_step(ended))


def _disturbed(
    bench: StoreBench, run: Run, zero: int, script: Script, grace_seconds: int = 30
) -> Ended:
    with bench.attempt(_name(run), 1, zero, script, grace_seconds=grace_seconds) as attempt:
        ended = attempt.wait()
    run.lives += 1
    run.told.setdefault("codes", []).append(ended.codes)
    if ended.left_alone:
        run.told["left alone"] = ended.left_alone
    return ended


def _declared(run: Run, ended: Ended, killed: Collection[int] = ()) -> None:
    """Who was not killed has ended with a code that says why."""
    for rank, code in enumerate(ended.codes):
        if rank not in killed and code not in DECLARED:
            run.violations.append(f"rank {rank} ended with {code}: {ended.logs[rank][-1500:]}")


def _expect_same(bench: StoreBench, run: Run, zero: int, script: _Checked | _Weather) -> None:
    """Bounded retries are to be enough; an attempt that gives up says so, and is counted."""
    ended = _disturbed(bench, run, zero, script)
    if not run.faults:
        run.told["not met"] = "the call was not made"
    _declared(run, ended)
    run.told["absorbed"] = ended.codes == [0] * RANKS
    run.violations += bench.check(_name(run))
    bench.conclude(run, _name(run), 2, zero, promised_step(ended))


def _applies(bench: StoreBench, run: Run, call: Call, fault: Fault) -> bool:
    """Garbled answers only where our own hashes guard the content: that of a user's data is TLS's."""
    return fault.kind != Kind.GARBLE or f"{bench.gang.prefix(_name(run))}/" in call.path


@dataclass
class _Checked:
    """Faults at given calls."""

    bench: StoreBench
    run: Run
    at: dict[tuple[str, int], Fault]

    def __call__(self, call: Call) -> Fault:
        fault = self.at.get((call.client, call.number), PASS)
        if fault == PASS:
            return PASS
        if not _applies(self.bench, self.run, call, fault):
            fault = _FAULTS[0]
        self.run.faults.append(f"{fault} {call.method} {call.path}")
        return fault


@dataclass
class _Weather:
    """Any fault at any call."""

    bench: StoreBench
    run: Run
    draw: random.Random
    share: float

    def __call__(self, call: Call) -> Fault:
        # By its own numbers: the order in which two ranks' calls come is not the seed's.
        own = random.Random(f"{self.run.seed}/{call.client}/{call.number}")
        fault = own.choice(_FAULTS)
        if own.random() > self.share or not _applies(self.bench, self.run, call, fault):
            return PASS
        self.run.faults.append(f"{fault} {call.method} {call.path}")
        return fault


@dataclass
class _From:
    """One client's calls all meet a fault from one of them on."""

    client: str
    number: int
    fault: Fault
    count: int = 0
    first: str = ""

    def __call__(self, call: Call) -> Fault:
        if call.client != self.client or call.number < self.number:
            return PASS
        self.first = self.first or f"{call.method} {call.path}"
        self.count += 1
        return self.fault


class _Both:
    """A signal to every rank at one call, and again some calls later."""

    def __init__(self, bench: StoreBench, rank: int, number: int, fault: Fault, later: int) -> None:
        self._bench = bench
        self._client = rank_name(rank)
        self._numbers = (number, number + later)
        self._fault = fault
        self.told: list[str] = []

    def __call__(self, call: Call) -> Fault:
        if call.client != self._client or call.number not in self._numbers:
            return PASS
        for rank in range(RANKS):
            if rank_name(rank) != self._client:
                self._bench.proxy.signaller(rank_name(rank), self._fault.signal)
        self.told.append(f"{self._fault} {call.method} {call.path}")
        return self._fault

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
from chaos.store_judge import began, disturbed, expect_declared, name_of, targets
from chaos.store_run import RANKS, rank_name
from chaos.store_service import AWAY, service_families

_PART = 4
"""Of the kills under ZeRO-2 and -3 one in so many is tried."""
_KILLS = (Fault(Kind.SIGNAL_BEFORE), Fault(Kind.SIGNAL_AFTER))
_FAULTS = (
    *AWAY,
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
    kills = {
        zero: [(*target, kill) for target in targets(bench, zero) for kill in _KILLS]
        for zero in (1, 2, 3)
    }
    # What is called differs little between the stages: of the others a part tells.
    parts = {zero: len(kills[zero]) // _PART for zero in (2, 3)}
    return [
        Family("store-kill", len(kills[1]), partial(_kill, bench, 1, kills[1], 1)),
        Family("store-kill-zero2", parts[2], partial(_kill, bench, 2, kills[2], _PART)),
        Family("store-kill-zero3", parts[3], partial(_kill, bench, 3, kills[3], _PART)),
        Family("store-fault", 2 * len(targets(bench, 1)), partial(_one_fault, bench)),
        Family("store-weather", 40, partial(_weather, bench)),
        Family("store-zombie", 40, partial(_zombie, bench)),
        Family("store-term", 40, partial(_term, bench)),
        *service_families(bench),
    ]


def _kill(
    bench: StoreBench,
    zero: int,
    kills: Sequence[tuple[int, int, Fault]],
    stride: int,
    run: Run,
    draw: random.Random,
) -> None:
    """kill −9 before and after each call, or at one that is drawn from every `stride` of these."""
    rank, number, kill = kills[run.index * stride + draw.randrange(stride)]
    script = At(rank_name(rank), number, kill)
    ended = disturbed(bench, run, zero, script)
    if script.met is None:
        run.told["not met"] = f"{rank_name(rank)} made no call {number}"
    else:
        run.faults.append(f"{kill} {script.met.method} {script.met.path}")
        if ended.codes[rank] != -Signals.SIGKILL:
            run.violations.append(f"rank {rank} was killed and ended with {ended.codes[rank]}")
    # Which pod's kubelet ends the others is not the trainer's affair: that they end is.
    expect_declared(run, ended, killed={rank, *ended.left_alone})
    run.violations += bench.check(name_of(run)) + bench.check_models(name_of(run), zero)
    bench.conclude(run, name_of(run), 2, zero, promised_step(ended))


def _one_fault(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """One fault at one call: the attempt goes on as if nothing had been."""
    zero = draw.choice((1, 1, 2, 3))
    calls = targets(bench, zero)
    rank, number = calls[run.index % len(calls)]
    fault = draw.choice(_FAULTS)
    script = _Checked(bench, run, {(rank_name(rank), number): fault})
    _expect_same(bench, run, zero, script)


def _weather(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """Each call meets a fault with a probability of 1 in 8."""
    script = _Weather(bench, run, draw, 0.125)
    _expect_same(bench, run, draw.choice((1, 2, 3)), script)


def _zombie(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """Attempt 1 is stopped at a call of rank 0, attempt 2 runs to its end, attempt 1 wakes."""
    number = draw.choice(bench.calm(1).of(0)).number
    wake_late(bench, run, number, draw.choice((Kind.SIGNAL_BEFORE, Kind.SIGNAL_AFTER)))


def wake_late(bench: StoreBench, run: Run, number: int, kind: Kind) -> None:
    """The zombie that was stopped at call `number` of rank 0 changes nothing, and ends as fenced."""
    script = At(rank_name(0), number, Fault(kind, signal=Signals.SIGSTOP))
    name = name_of(run)
    with bench.attempt(name, 1, 1, script) as zombie:
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
        with bench.second(name, 2) as newer:
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
    if not _logs_again(bench, number, kind):
        fit.append([0] * RANKS)
    if first.codes not in fit:
        run.violations.append(
            f"the woken attempt ended with {first.codes}, expected one of {fit} "
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
    rank, number = draw.choice(targets(bench, 1))
    grace = draw.choice((1, 30))
    kind = draw.choice((Kind.SIGNAL_BEFORE, Kind.SIGNAL_AFTER))
    script = _Both(bench, rank, number, Fault(kind, signal=Signals.SIGTERM), draw.randint(0, 12))
    ended = disturbed(bench, run, 1, script, grace_seconds=grace)
    run.told["grace"] = grace
    run.faults += script.told
    allowed = {0, int(ExitCode.GRACEFUL_CHECKPOINT), int(ExitCode.INTERRUPTED)}
    if grace == 1 or int(ExitCode.INTERRUPTED) in ended.codes:
        # A rank whose grace is over does not wait for its peers, who then lose it.
        allowed |= {int(ExitCode.PEER_LOST)}
    for code, log in zip(ended.codes, ended.logs, strict=True):
        if code == -Signals.SIGTERM and not began(log):
            # Nothing to commit yet: it ends as any process does, and its peer may lose it.
            allowed |= {-int(Signals.SIGTERM), int(ExitCode.PEER_LOST)}
    if not set(ended.codes) <= allowed:
        run.violations.append(f"ended with {ended.codes} after SIGTERM: {ended.tail}")
    if ended.left_alone:
        run.violations.append(f"ranks {ended.left_alone} went on after SIGTERM: {ended.tail}")
    run.violations += bench.check(name_of(run))
    bench.conclude(run, name_of(run), 2, 1, promised_step(ended))


def _expect_same(bench: StoreBench, run: Run, zero: int, script: _Checked | _Weather) -> None:
    """Bounded retries are to be enough; an attempt that gives up says so, and is counted."""
    ended = disturbed(bench, run, zero, script)
    if not run.faults:
        run.told["not met"] = "the call was not made"
    expect_declared(run, ended)
    run.told["absorbed"] = ended.codes == [0] * RANKS
    run.violations += bench.check(name_of(run))
    bench.conclude(run, name_of(run), 2, zero, promised_step(ended))


def _applies(bench: StoreBench, run: Run, call: Call, fault: Fault) -> bool:
    """Garbled answers only where our own hashes guard the content: that of a user's data is TLS's."""
    return fault.kind != Kind.GARBLE or f"{bench.gang.prefix(name_of(run))}/" in call.path


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

"""Families of faults between the operator and the API server."""

from __future__ import annotations

import random
import time
from functools import partial
from signal import Signals

from devcluster.node.api import ApiError

from chaos.api_proxy import Event, Seen, is_write
from chaos.faults import PASS, Call, Fault, Kind, calm
from chaos.figures import Family, Run
from chaos.operator_bench import CHANGING_LEADERS, OperatorBench, World, scenario
from chaos.operator_judge import AT_ONCE, Judge

_ERRORS = (
    Fault(Kind.ANSWER, 409),
    Fault(Kind.ANSWER, 410),
    Fault(Kind.ANSWER, 429),
    Fault(Kind.ANSWER, 500),
    Fault(Kind.ANSWER, 503),
    Fault(Kind.ANSWER, 504),
    Fault(Kind.RESET_BEFORE),
    Fault(Kind.RESET_AFTER),
    Fault(Kind.DELAY, seconds=1),
)
_EVENTS = (Event.DROP, Event.DOUBLE, Event.LATE, Event.SWAP, Event.CUT, Event.GONE)


def operator_families(bench: OperatorBench) -> list[Family]:
    """All of them."""
    judge = Judge(bench, scenario, 4)
    return [
        Family("operator-kill", 36, partial(_kill, judge), AT_ONCE),
        Family("operator-http", 24, partial(_http, judge), AT_ONCE),
        Family("operator-watch", 18, partial(_watch, judge), AT_ONCE),
        Family("operator-pause", 6, partial(_pause, judge), AT_ONCE),
        Family("operator-two", 4, partial(_two, judge), AT_ONCE),
        # Every world feels it.
        Family("operator-api-restart", 4, partial(_restart, judge)),
    ]


def _kill(judge: Judge, run: Run, draw: random.Random) -> None:
    """Every operator dies at a write of its own: so that each write is met, before or after it.

    Case 0: after the first one, always. Case 1: before it, and the next one after it. Others: at a
    seeded one of the first two (odd cases) or four, before or after.
    """
    script = _Killer(run.index, draw)

    def each(world: World) -> None:
        # The next life begins when the one before has ended, and not in between.
        if not world.lives[-1].process.running:
            script.struck()

    judge.judge(run, script, each=each)


class _Killer:
    """A kill in each life.

    A write that says "already there" (409) changed nothing, and the next life makes it again: so
    "after" is after one that did change something.
    """

    def __init__(self, case: int, draw: random.Random) -> None:
        self._case = case
        self._draw = draw
        self._lives = 0
        self._left = 0
        self._fault = PASS
        self._next()

    def _next(self) -> None:
        after = Fault(Kind.SIGNAL_AFTER, only_success=True)
        before = Fault(Kind.SIGNAL_BEFORE)
        if self._case == 0:
            self._left, self._fault = 1, after
        elif self._case == 1:
            self._left, self._fault = 1, before if self._lives % 2 == 0 else after
        else:
            self._left = self._draw.randint(1, 2 if self._case % 2 else 4)
            self._fault = after if self._left == 1 else self._draw.choice((before, after))
        self._lives += 1

    def __call__(self, call: Call) -> Fault:
        if not is_write(call):
            return PASS
        if self._left > 1:
            self._left -= 1
            return PASS
        return self._fault

    def struck(self) -> None:
        """The operator was killed: the next life has a fault of its own."""
        self._next()


def _http(judge: Judge, run: Run, draw: random.Random) -> None:
    """Calls meet errors with a probability of 1 in 6; the Lease's are left alone."""

    def script(call: Call) -> Fault:
        own = random.Random(f"{run.seed}/{call.number}")
        if "/leases" in call.path or own.random() > 1 / 6:
            return PASS
        fault = own.choice(_ERRORS)
        if fault.kind == Kind.ANSWER and fault.status in (409, 410) and not is_write(call):
            return Fault(Kind.ANSWER, 503)
        return fault

    judge.judge(run, script, errors=True)


def _watch(judge: Judge, run: Run, draw: random.Random) -> None:
    """Events of watches are dropped, doubled, late, reordered, cut or answered with 410."""
    kinds = _EVENTS if run.index % 3 == 0 else (draw.choice(_EVENTS),)
    share = draw.choice((0.2, 0.5))

    def watch(seen: Seen) -> Event:
        own = random.Random(f"{run.seed}/{seen.number}")
        return own.choice(kinds) if own.random() < share else Event.PASS

    judge.judge(run, calm, watch=watch, errors=True)


def _restart(judge: Judge, run: Run, draw: random.Random) -> None:
    """The API server, or etcd below it, is killed and comes back."""
    part = ("kube-apiserver", "etcd")[run.index % 2]
    at = time.monotonic() + draw.uniform(1.0, 5.0)

    def each(world: World) -> None:
        if not run.faults and time.monotonic() > at:
            run.faults.append(f"{part} restarted")
            world.bench.cluster.control_plane.restart(part)
            # It is ready before it serves what CRDs define.
            world.bench.handle.wait("our objects are served", lambda: _served(world))

    judge.judge(run, calm, each=each, errors=True, settings=CHANGING_LEADERS)


def _served(world: World) -> bool:
    try:
        return bool(world.objects())
    except ApiError:
        return False


def _pause(judge: Judge, run: Run, draw: random.Random) -> None:
    """The leader is stopped at a write, another takes over, the first one wakes and must not write."""
    script = _StopOnce(draw.randint(1, 30))
    woken: list[float] = []

    def each(world: World) -> None:
        if not script.stopped:
            return
        if len(world.lives) == 1:
            world.start(identity="second", **CHANGING_LEADERS)
        elif not woken and '"leading"' in world.lives[1].log.read_text():
            world.lives[0].process.send_signal(Signals.SIGCONT)
            world.bench.proxy.wake(world.namespace)
            woken.append(time.monotonic())
            code = world.lives[0].process.wait(60)
            if code != 1:
                run.violations.append(f"the woken leader ended with {code}, expected 1")

    judge.judge(run, script, each=each, errors=True, settings=CHANGING_LEADERS)
    if not woken:
        run.told["not met"] = "the scenario ended before the write, or before the other one led"


class _StopOnce:
    """SIGSTOP before the n-th write; it is held until the leader wakes."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.stopped = False

    def __call__(self, call: Call) -> Fault:
        if not is_write(call) or self.stopped:
            return PASS
        self._left -= 1
        self.stopped = self._left == 0
        return Fault(Kind.SIGNAL_BEFORE, signal=Signals.SIGSTOP) if self.stopped else PASS


def _two(judge: Judge, run: Run, draw: random.Random) -> None:
    """Two operators from the beginning; the leader is killed now and then, the other takes over."""
    at = [time.monotonic() + draw.uniform(1, 4), 0.0]

    def each(world: World) -> None:
        while len([life for life in world.lives if life.process.running]) < 2:
            world.start(identity=f"one-of-two-{len(world.lives)}", **CHANGING_LEADERS)
        if len(run.faults) < 2 and time.monotonic() > at[0]:
            at[0] = time.monotonic() + draw.uniform(8, 12)
            for life in world.lives:
                if life.process.running and '"leading"' in life.log.read_text():
                    life.process.end()
                    run.faults.append("SIGKILL of the leader")
                    break

    judge.judge(run, calm, each=each, settings=CHANGING_LEADERS)

"""Families of faults between the operator and the API server."""

from __future__ import annotations

import random
import time
from functools import partial
from signal import Signals

from devcluster.node.api import ApiError

from chaos.api_proxy import Event, Seen, is_write
from chaos.faults import PASS, Call, Entry, Fault, Kind, calm
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
    Fault(Kind.TRUNCATE),
    # Longer than the client waits (operator_bench: 10 s, of a watch 20 s).
    Fault(Kind.STALL, seconds=25),
    Fault(Kind.SKEW, seconds=3600),
    Fault(Kind.SKEW, seconds=-3600),
)
_KILLED = frozenset({-Signals.SIGKILL})
_EVENTS = (
    Event.DROP, Event.DOUBLE, Event.LATE, Event.SWAP, Event.CUT, Event.GONE, Event.STALL,
)  # fmt: skip


def operator_families(bench: OperatorBench) -> list[Family]:
    """All of them."""
    judge = Judge(bench, scenario, 4)
    return [
        Family("operator-kill", 36, partial(_kill, judge), AT_ONCE),
        Family("operator-http", 30, partial(_http, judge), AT_ONCE),
        Family("operator-watch", 21, partial(_watch, judge), AT_ONCE),
        Family("operator-pause", 8, partial(_pause, judge), AT_ONCE),
        Family("operator-two", 6, partial(_two, judge), AT_ONCE),
        # Every world feels it.
        Family("operator-api-restart", 6, partial(_restart, judge)),
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

    judge.judge(run, script, each=each, exits=_KILLED)


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
        # Nothing that is only asked for can be in conflict.
        return Fault(Kind.ANSWER, 503) if fault.status == 409 and not is_write(call) else fault

    judge.judge(run, script, errors=True)


def _watch(judge: Judge, run: Run, draw: random.Random) -> None:
    """Events of watches are dropped, doubled, late, reordered, cut, stalled or answered with 410."""
    kinds = _EVENTS if run.index % 3 == 0 else (draw.choice(_EVENTS),)
    share = draw.choice((0.2, 0.5))

    def watch(seen: Seen) -> Event:
        own = random.Random(f"{run.seed}/{seen.number}")
        return own.choice(kinds) if own.random() < share else Event.PASS

    judge.judge(run, calm, watch=watch, errors=True)


def _restart(judge: Judge, run: Run, draw: random.Random) -> None:
    """The API server, or etcd below it, is killed and comes back."""
    part = ("kube-apiserver", "etcd")[run.index % 2]
    moment = _Moment(draw.uniform(1.0, 5.0))

    def each(world: World) -> None:
        if moment.has_come() and not run.faults:
            run.faults.append(f"{part} restarted")
            world.bench.cluster.control_plane.restart(part)
            # It is ready before it serves what CRDs define.
            world.bench.handle.wait("our objects are served", lambda: _served(world))

    # A leader that cannot renew its Lease in time goes, and is started again.
    judge.judge(
        run, calm, each=each, errors=True, exits=frozenset({1}), leaders=True,
        settings=CHANGING_LEADERS,
    )  # fmt: skip


class _Moment:
    """So long after it is first asked for: a calm run before the case does not count."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due = float("inf")

    def has_come(self) -> bool:
        self._due = min(self._due, time.monotonic() + self._seconds)
        return time.monotonic() > self._due


def _served(world: World) -> bool:
    try:
        return bool(world.objects())
    except ApiError:
        return False


def _pause(judge: Judge, run: Run, draw: random.Random) -> None:
    """The leader is stopped at a write, another takes over, the first one wakes and must not write.

    The write at which it was stopped had left it, and comes late: the API server refuses it, or it
    does what the second leader does as well. The end state, and how often Jobs are made, tell.
    """
    script = _StopOnce(draw.randint(1, 15))
    woken: list[int] = []

    def each(world: World) -> None:
        if script.held is None:
            return
        if len(world.lives) == 1:
            world.start(f"{world.namespace}-second", identity="second", **CHANGING_LEADERS)
        elif not woken and world.lives[1].leads:
            woken.append(len(world.bench.proxy.log))
            world.lives[0].process.send_signal(Signals.SIGCONT)
            world.bench.proxy.wake(world.namespace)
            world.lives[0].process.wait(60)
            run.violations += _written_late(world, woken[0])
            run.told["held write"] = str(_entry(world, script.held))

    judge.judge(
        run, script, each=each, errors=True, exits=frozenset({1}), leaders=True,
        settings=CHANGING_LEADERS,
    )  # fmt: skip
    if not woken:
        run.violations.append("no leader was stopped and woke: the scenario ended before")


def _written_late(world: World, since: int) -> list[str]:
    """Calls by which the first operator of a world changed something, from a line of the log on."""
    return [
        f"the woken leader wrote: {entry}"
        for entry in world.bench.proxy.log[since:]
        if entry.call.client == world.namespace
        and (is_write(entry.call) or (entry.call.method != "GET" and 0 < entry.status < 400))
    ]


def _entry(world: World, call: Call) -> Entry:
    """What became of a call."""
    return next(entry for entry in world.bench.proxy.log if entry.call == call)


class _StopOnce:
    """SIGSTOP before the n-th write; it is held until the leader wakes."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.held: Call | None = None

    def __call__(self, call: Call) -> Fault:
        if not is_write(call) or self.held is not None:
            return PASS
        self._left -= 1
        if self._left:
            return PASS
        self.held = call
        return Fault(Kind.SIGNAL_BEFORE, signal=Signals.SIGSTOP)


def _two(judge: Judge, run: Run, draw: random.Random) -> None:
    """Two operators from the beginning; the leader is killed now and then, the other takes over."""
    moments = [_Moment(draw.uniform(1, 4)), _Moment(draw.uniform(8, 12))]
    killed: list[str] = []

    def each(world: World) -> None:
        while len([life for life in world.lives if life.process.running]) < 2:
            world.start(identity=f"one-of-two-{len(world.lives)}", **CHANGING_LEADERS)
        if not moments[0].has_come():
            return
        for life in world.lives:
            if life.process.running and life.leads:
                life.process.end()
                killed.append("SIGKILL of the leader")
                # The next one's time begins now; after the last there is none.
                moments[:] = [*moments[1:], _Moment(float("inf"))]
                break

    # The one that waits is as well as the leader: neither ends by itself.
    judge.judge(run, calm, each=each, exits=_KILLED, leaders=True, settings=CHANGING_LEADERS)
    run.faults += killed
    if not killed:
        run.violations.append("no leader was killed: the scenario ended before")

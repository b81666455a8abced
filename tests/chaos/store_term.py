"""SIGTERM at any moment, twice: the ranks are gone within their grace, and nothing half is left."""

from __future__ import annotations

import random
import threading
from functools import partial
from signal import Signals

from kubedistill_api.exit_codes import ExitCode

from chaos.faults import PASS, Call, Fault, Kind
from chaos.figures import Family, Run
from chaos.store_bench import StoreBench, promised_step
from chaos.store_judge import began, disturbed, name_of, targets
from chaos.store_run import RANKS, ZERO1, Ended, rank_name

_MARGIN_SECONDS = 2.0
"""What a loaded machine may take to run what was due, and this suite to see it."""
_STALL = Fault(Kind.STALL, seconds=60)
"""Longer than any grace here."""


def term_family(bench: StoreBench) -> Family:
    return Family("store-term", 48, partial(_term, bench), least_met=1.0)


def _term(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """SIGTERM at a call and once more, with much grace or with little; or while an upload stalls."""
    stalls = run.index % 6 == 5
    grace = draw.choice((1, 6)) if stalls else draw.choice((1, 30))
    rank, number = draw.choice(_uploads(bench) if stalls else targets(bench, ZERO1))
    kind = Kind.STALL if stalls else draw.choice((Kind.SIGNAL_BEFORE, Kind.SIGNAL_AFTER))
    script = _Twice(bench, rank, number, kind, draw.uniform(0, 0.3))
    ended = disturbed(bench, run, ZERO1, script, grace_seconds=grace)
    script.join()
    run.told |= {"grace": grace, "gone after": [round(seconds, 2) for seconds in ended.since_asked]}
    run.faults += script.told
    _expect_gone(run, ended, grace)
    run.violations += bench.check(name_of(run))
    bench.conclude(run, name_of(run), 2, ZERO1, promised_step(ended))


def _uploads(bench: StoreBench) -> list[tuple[int, int]]:
    """(rank, number) of the calls that upload a shard."""
    return [(int(call.client[-1]), call.number) for call in bench.calm().calls if _is_upload(call)]


def _is_upload(call: Call) -> bool:
    return call.method == "PUT" and "/data/e" in call.path


def _expect_gone(run: Run, ended: Ended, grace: int) -> None:
    """Each rank has ended by itself, within the grace, with a code that says so."""
    allowed = {0, int(ExitCode.GRACEFUL_CHECKPOINT), int(ExitCode.INTERRUPTED)}
    if grace < 30 or int(ExitCode.INTERRUPTED) in ended.codes:
        # A rank whose grace is over does not wait for its peers, who then lose it.
        allowed |= {int(ExitCode.PEER_LOST)}
    for code, log in zip(ended.codes, ended.logs, strict=True):
        if code == -Signals.SIGTERM and not began(log):
            # Nothing to commit yet: it ends as any process does, and its peer may lose it.
            allowed |= {-int(Signals.SIGTERM), int(ExitCode.PEER_LOST)}
    if not set(ended.codes) <= allowed:
        run.violations.append(f"ended with {ended.codes} after SIGTERM: {ended.tail}")
    late = [seconds for seconds in ended.since_asked if seconds > grace + _MARGIN_SECONDS]
    if late or ended.left_alone:
        run.violations.append(
            f"with {grace} s of grace ranks were gone {ended.since_asked} s after SIGTERM, "
            f"left alone: {ended.left_alone}: {ended.tail}"
        )


class _Twice:
    """A signal to every rank at one call of one of them, and again some time later.

    With STALL that call is the next upload of a shard, and every one from then on stalls.
    """

    def __init__(self, bench: StoreBench, rank: int, number: int, kind: Kind, pause: float) -> None:
        self._bench = bench
        self._signaller = bench.proxy.signaller
        self._client = rank_name(rank)
        self._number = number
        self._kind = kind
        self._pause = pause
        self._timers: list[threading.Timer] = []
        self.told: list[str] = []

    def __call__(self, call: Call) -> Fault:
        # The attempt's own: a later one has another.
        self._signaller = self._bench.proxy.signaller
        if call.client != self._client or call.number < self._number:
            return PASS
        if self._kind == Kind.STALL:
            return self._stalled(call)
        if call.number > self._number:
            return PASS
        self._strike_all(beside=self._client)
        self._later(self._pause)
        fault = Fault(self._kind, signal=Signals.SIGTERM)
        self.told.append(f"twice {fault} {call.method} {call.path}")
        return fault

    def _stalled(self, call: Call) -> Fault:
        if not _is_upload(call):
            return PASS
        if not self.told:
            self.told.append(f"twice SIGTERM, {_STALL} {call.method} {call.path}")
            self._later(self._pause)
            self._later(2 * self._pause)
        return _STALL

    def _later(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._strike_all)
        timer.start()
        self._timers.append(timer)

    def _strike_all(self, beside: str = "") -> None:
        for rank in range(RANKS):
            if rank_name(rank) != beside:
                self._signaller(rank_name(rank), Signals.SIGTERM)

    def join(self) -> None:
        """No signal is to come any more."""
        for timer in self._timers:
            timer.join()

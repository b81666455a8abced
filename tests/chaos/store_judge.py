"""What the store families share: an attempt that a script disturbs, and what is expected of its end."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from signal import Signals
from typing import Any

from kubedistill_api.exit_codes import ExitCode

from chaos.damage import Commit
from chaos.faults import OF_ANSWER_BODY, OF_REQUEST_BODY, PASS, At, Call, Fault, Kind, Script, calm
from chaos.figures import Run
from chaos.store_bench import StoreBench, promised_step, resumed_step
from chaos.store_run import RANKS, ZERO1, Ended, Job, rank_name

_GIVEN_UP = {0, int(ExitCode.STORAGE_UNAVAILABLE), int(ExitCode.PEER_LOST)}
AWAY = (
    Fault(Kind.ANSWER, 500, "InternalError"),
    Fault(Kind.ANSWER, 503, "SlowDown"),
    Fault(Kind.ANSWER, 429, "TooManyRequests"),
    Fault(Kind.RESET_BEFORE),
    Fault(Kind.RESET_AFTER),
)
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
KILLS = (Fault(Kind.SIGNAL_BEFORE), Fault(Kind.SIGNAL_AFTER))


def targets(bench: StoreBench, job: Job) -> list[tuple[int, int]]:
    """(rank, number) of every call of the calm run."""
    return [(rank, call.number) for rank in range(RANKS) for call in bench.calm(job).of(rank)]


def name_of(run: Run) -> str:
    """The job of a case."""
    return f"{run.family}-{run.index}"


def disturbed(
    bench: StoreBench, run: Run, job: Job, script: Script, number: int = 1, **options: Any
) -> Ended:
    """An attempt with faults, to its end; `options` are of `Gang.start`."""
    with bench.attempt(name_of(run), number, job, script, **options) as attempt:
        ended = attempt.wait()
    run.lives += 1
    run.told.setdefault("codes", []).append(ended.codes)
    if ended.left_alone:
        run.told["left alone"] = ended.left_alone
    return ended


def undisturbed(bench: StoreBench, run: Run, number: int, promised: int) -> int:
    """An attempt without faults that is not the last one; the newest step committed after it.

    `promised` is the newest step that was committed before it.
    """
    ended = disturbed(bench, run, ZERO1, calm, number)
    if ended.codes != [0] * RANKS:
        run.violations.append(f"attempt {number} ended with {ended.codes}: {ended.tail}")
    if resumed_step(ended) < promised:
        run.lost.append(
            f"step {promised} was committed, and attempt {number} began at {resumed_step(ended)}"
        )
    return max(promised, promised_step(ended))


def met(bench: StoreBench) -> list[str]:
    """What the attempt of now has met, by the proxy: a fault that could do nothing is none."""
    return [
        f"{entry.fault} {entry.call.method} {entry.call.path}"
        for entry in list(bench.proxy.log)
        if entry.fault != PASS
    ]


def drawn_for(call: Call, own: str, draw: random.Random) -> Fault:
    """A fault that can do something to a call; `own` is the run's prefix."""
    return draw.choice([fault for fault in _FAULTS if fits(fault, call, own)])


def fits(fault: Fault, call: Call, own: str) -> bool:
    """Whether a fault can do something to a call; `own` is the run's prefix, or its end."""
    if fault.kind in OF_REQUEST_BODY:
        return call.body_bytes > 0
    if fault.kind == Kind.GARBLE:
        # Only where our own hashes guard the content: that of lists and a user's data is TLS's.
        return call.method == "GET" and f"{own}/" in call.path
    return fault.kind not in OF_ANSWER_BODY or call.method in ("GET", "POST")


def kill_at(
    bench: StoreBench,
    run: Run,
    job: Job,
    target: tuple[int, int, Fault],
    attempt: int = 1,
    promised: int = 0,
    harmed: str = "",
) -> int:
    """A rank of an attempt is killed at its call; the newest step that is committed after it.

    What we harmed ourselves below the prefix `harmed` may not have been rejected yet.
    """
    rank, number, kill = target
    script = At(rank_name(rank), number, kill)
    ended = disturbed(bench, run, job, script, attempt)
    if script.met is None:
        run.told["not met"] = f"{rank_name(rank)} made no call {number}"
    else:
        run.faults.append(f"{kill} {script.met.method} {script.met.path}")
        if ended.codes[rank] != -Signals.SIGKILL:
            run.violations.append(f"rank {rank} was killed and ended with {ended.codes[rank]}")
    # Which pod's kubelet ends the others is not the trainer's affair: that they end is.
    expect_declared(run, ended, killed={rank, *ended.left_alone})
    found = bench.check(name_of(run)) + bench.check_models(name_of(run), job)
    run.violations += [
        text for text in found if not harmed or f" is live and {harmed}/" not in text
    ]
    return max(promised, promised_step(ended))


def fault_at(
    bench: StoreBench,
    run: Run,
    job: Job,
    target: tuple[int, int],
    draw: random.Random,
    attempt: int = 1,
) -> Ended:
    """One fault at one call of an attempt, which goes on as if nothing had been."""
    rank, number = target
    script = Drawn(bench.gang.prefix(name_of(run)), draw, rank_name(rank), number)
    return absorbed(bench, run, job, script, attempt)


def absorbed(
    bench: StoreBench, run: Run, job: Job, script: Script, attempt: int = 1, **options: Any
) -> Ended:
    """An attempt that takes what the script does to it, and ends with success."""
    ended = disturbed(bench, run, job, script, attempt, **options)
    run.faults += met(bench)
    if not run.faults:
        run.told["not met"] = "the call was not made"
    run.told["absorbed"] = ended.codes == [0] * RANKS
    expect_unharmed(run, ended)
    run.violations += bench.check(name_of(run))
    return ended


def expect_declared(run: Run, ended: Ended, killed: Collection[int] = ()) -> None:
    """Who was not killed has ended with a code that fits, and by itself once it has trained.

    Nobody is fenced out here, and nothing is wrong with the job: a rank gives up for its store or for
    its peer, or not at all. Before it has trained it may wait for its peer in a rendezvous, which says
    nothing of the dead: the pod ends with the attempt.
    """
    for rank in ended.left_alone:
        if began(ended.logs[rank]):
            run.violations.append(f"rank {rank} did not notice its peer's end: {ended.tail}")
    for rank, code in enumerate(ended.codes):
        if rank not in killed and code not in _GIVEN_UP:
            run.violations.append(f"rank {rank} ended with {code}: {ended.logs[rank][-1500:]}")


def expect_unavailable(run: Run, ended: Ended, words: tuple[str, ...] = ("",)) -> None:
    """Who met the fault ends by it and says so; its peer with it, or before it with success."""
    unavailable = int(ExitCode.STORAGE_UNAVAILABLE)
    fit = set(_GIVEN_UP)
    if not any(began(ended.logs[rank]) for rank in ended.left_alone):
        fit.add(-int(Signals.SIGKILL))
    if unavailable not in ended.codes or not set(ended.codes) <= fit:
        run.violations.append(f"ended with {ended.codes}: {ended.tail}")
        return
    told = [
        outcome.message
        for code, outcome in zip(ended.codes, ended.outcomes, strict=True)
        if code == unavailable and outcome is not None
    ]
    if not told or not any(word in message for message in told for word in words):
        run.violations.append(f"the outcome does not say what was met: {told}")


def expect_rejected(run: Run, ended: Ended, commit: Commit, *, unreadable: bool = False) -> None:
    """The outcome tells of one commit that was passed over, and it is this one."""
    outcome = ended.outcomes[0]
    told = outcome.progress.rejected_checkpoints if outcome and outcome.progress else []
    slot = "/".join(commit.slot.rsplit("/", 2)[-2:])
    begins = "unreadable record, " if unreadable else f"step {commit.step}, "
    if len(told) != 1 or not told[0].startswith(begins) or f"/{slot}: " not in told[0]:
        run.violations.append(
            f"step {commit.step} in {slot} was damaged, and the outcome tells of {told}"
        )


def began(log: str) -> bool:
    """Whether a rank has trained, by its log."""
    return any(f'"event": "{event}"' in log for event in ("step", "committed"))


def expect_unharmed(run: Run, ended: Ended) -> None:
    """Both ranks have ended with success."""
    if ended.codes != [0] * RANKS:
        run.violations.append(f"ended with {ended.codes}: {ended.tail}")


@dataclass
class Drawn:
    """One call of a client meets a fault that is drawn when it is known what call it is."""

    own: str
    """The run's prefix."""
    draw: random.Random
    client: str
    number: int

    def __call__(self, call: Call) -> Fault:
        if (call.client, call.number) != (self.client, self.number):
            return PASS
        return drawn_for(call, self.own, self.draw)


@dataclass
class From:
    """From one call of a client on all its calls meet a fault; with `everybody` all others' too."""

    client: str
    number: int
    fault: Fault
    everybody: bool = False
    count: int = 0
    first: str = ""

    def __call__(self, call: Call) -> Fault:
        begun = bool(self.first) and (self.everybody or call.client == self.client)
        if not begun and (call.client != self.client or call.number < self.number):
            return PASS
        self.first = self.first or f"{call.client} {call.method} {call.path}"
        self.count += 1
        return self.fault


@dataclass
class Again:
    """One call of a client and the next ones of the same kind and key meet a fault, `times` in all."""

    client: str
    number: int
    fault: Fault
    times: int = 1
    met: Call | None = None
    count: int = 0

    def __call__(self, call: Call) -> Fault:
        if call.client != self.client or call.number < self.number or self.count == self.times:
            return PASS
        if self.met is None:
            self.met = call
        if (call.method, call.target) != (self.met.method, self.met.target):
            return PASS
        self.count += 1
        return self.fault

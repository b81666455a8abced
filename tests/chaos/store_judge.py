"""What the store families share: an attempt that a script disturbs, and what is expected of its end."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from chaos.faults import PASS, Call, Fault, Script, calm
from chaos.figures import Run
from chaos.store_bench import DECLARED, StoreBench, promised_step, resumed_step
from chaos.store_run import RANKS, Ended


def targets(bench: StoreBench, zero: int) -> list[tuple[int, int]]:
    """(rank, number) of every call of the calm run."""
    return [(rank, call.number) for rank in range(RANKS) for call in bench.calm(zero).of(rank)]


def name_of(run: Run) -> str:
    """The job of a case."""
    return f"{run.family}-{run.index}"


def disturbed(
    bench: StoreBench, run: Run, zero: int, script: Script, number: int = 1, **options: Any
) -> Ended:
    """An attempt with faults, to its end; `options` are of `Gang.start`."""
    with bench.attempt(name_of(run), number, zero, script, **options) as attempt:
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
    ended = disturbed(bench, run, 1, calm, number)
    if ended.codes != [0] * RANKS:
        run.violations.append(f"attempt {number} ended with {ended.codes}: {ended.tail}")
    if resumed_step(ended) < promised:
        run.lost.append(
            f"step {promised} was committed, and attempt {number} began at {resumed_step(ended)}"
        )
    return max(promised, promised_step(ended))


def expect_declared(run: Run, ended: Ended, killed: Collection[int] = ()) -> None:
    """Who was not killed has ended with a code that says why, and by itself once it has trained.

    Before that it may wait for its peer in a rendezvous, which says nothing of the dead: the pod ends
    with the attempt.
    """
    for rank in ended.left_alone:
        if began(ended.logs[rank]):
            run.violations.append(f"rank {rank} did not notice its peer's end: {ended.tail}")
    for rank, code in enumerate(ended.codes):
        if rank not in killed and code not in DECLARED:
            run.violations.append(f"rank {rank} ended with {code}: {ended.logs[rank][-1500:]}")


def began(log: str) -> bool:
    """Whether a rank has trained, by its log."""
    return any(f'"event": "{event}"' in log for event in ("step", "committed"))


def expect_unharmed(run: Run, ended: Ended) -> None:
    """Both ranks have ended with success."""
    if ended.codes != [0] * RANKS:
        run.violations.append(f"ended with {ended.codes}: {ended.tail}")


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

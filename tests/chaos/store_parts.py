"""Families of faults in uploads of many parts, and in what reads them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from chaos.faults import PASS, Call, Fault, Kind
from chaos.figures import Family, Run
from chaos.store_bench import StoreBench, promised_step
from chaos.store_judge import KILLS, absorbed, fault_at, kill_at, name_of
from chaos.store_resume import behind_of, faulted, killed, rank_of
from chaos.store_run import IN_PARTS, rank_name

PARTS = (
    "store-kill-parts", "store-fault-parts", "store-lost-parts", "store-kill-parts-resume",
    "store-fault-parts-resume",
)  # fmt: skip
"""The families' names."""
_FORGOTTEN = Fault(Kind.ANSWER, 404, "NoSuchUpload")
_KILLS, _LATER_KILLS, _FAULTS = 4, 2, 2
"""Of these one in so many is tried, as each takes some seconds."""
Target = tuple[int, int]
"""Rank, and the number of its call."""


def parts_families(bench: StoreBench) -> list[Family]:
    """All of them."""
    behind = behind_of(bench, IN_PARTS)
    first = [call for call in bench.calm(IN_PARTS).calls if _of_an_upload(call)]
    later = [call for call in behind.calls if _of_an_abort_or_a_load(call)]
    uploads, loads = ([(rank_of(call), call.number) for call in part] for part in (first, later))
    ends = [(rank_of(call), call.number) for call in first if _completes(call)]
    kills, later_kills = (
        [(*target, kill) for target in part for kill in KILLS] for part in (uploads, loads)
    )
    return [
        Family(
            "store-kill-parts", len(kills) // _KILLS, partial(_killed, bench, kills), least_met=1
        ),
        Family(
            "store-fault-parts",
            len(uploads) // _FAULTS,
            partial(_faulted, bench, uploads),
            least_met=1,
            least_absorbed=1,
        ),
        Family(
            "store-lost-parts",
            len(ends),
            partial(_forgotten, bench, ends),
            least_met=1,
            least_absorbed=1,
        ),
        Family(
            "store-kill-parts-resume",
            len(later_kills) // _LATER_KILLS,
            partial(killed, bench, behind, later_kills, _LATER_KILLS),
            least_met=1,
        ),
        Family(
            "store-fault-parts-resume",
            len(loads),
            partial(faulted, bench, behind, loads),
            least_met=1,
            least_absorbed=1,
        ),
    ]


def _of_an_upload(call: Call) -> bool:
    """Its begin, a part, its completion."""
    return call.method in ("POST", "PUT") and (
        call.target.endswith("?uploads") or "uploadId=" in call.target
    )


def _completes(call: Call) -> bool:
    return call.method == "POST" and "uploadId=" in call.target


def _of_an_abort_or_a_load(call: Call) -> bool:
    return call.method == "DELETE" or (call.method == "GET" and "/data/e" in call.path)


def _killed(
    bench: StoreBench,
    kills: Sequence[tuple[int, int, Fault]],
    run: Run,
    draw: random.Random,
) -> None:
    """kill −9 before or after a call of an upload in parts."""
    promised = kill_at(bench, run, IN_PARTS, kills[run.index * _KILLS + draw.randrange(_KILLS)])
    bench.conclude(run, name_of(run), 2, IN_PARTS, promised)


def _faulted(bench: StoreBench, targets: Sequence[Target], run: Run, draw: random.Random) -> None:
    """One fault at a call of an upload in parts."""
    ended = fault_at(
        bench, run, IN_PARTS, targets[run.index * _FAULTS + draw.randrange(_FAULTS)], draw
    )
    bench.conclude(run, name_of(run), 2, IN_PARTS, promised_step(ended))


@dataclass
class _Forgetful:
    """The answer to a completion is lost, and the store does not know the upload when asked again."""

    client: str
    number: int
    target: str = ""
    done: bool = False

    def __call__(self, call: Call) -> Fault:
        if (call.client, call.number) == (self.client, self.number):
            self.target = call.target
            return Fault(Kind.RESET_AFTER)
        if call.client == self.client and call.target == self.target and not self.done:
            self.done = True
            return _FORGOTTEN
        return PASS


def _forgotten(bench: StoreBench, targets: Sequence[Target], run: Run, draw: random.Random) -> None:
    """Each upload lands, its client never hears of it, and there is nothing left to ask about."""
    rank, number = targets[run.index]
    ended = absorbed(bench, run, IN_PARTS, _Forgetful(rank_name(rank), number))
    bench.conclude(run, name_of(run), 2, IN_PARTS, promised_step(ended))

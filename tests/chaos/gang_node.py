"""Faults of the node below a gang of real ranks: no bit differs, and no commit is lost."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
from kubedistill_api import reasons

from chaos.figures import Family, Run
from chaos.gang_bench import NAME, GangBench, GangWorld
from chaos.node_strikes import End

_CHARGED, _FREE = (reasons.ERROR, True), (reasons.GRACEFUL_CHECKPOINT, False)
_INTERRUPTED = (reasons.INTERRUPTED, False)
_STALLED, _DISRUPTED = (reasons.STALLED, True), (reasons.DISRUPTED, False)
_BACK_SECONDS = 5.0


@dataclass(frozen=True)
class Case:
    """A fault, the index of its victim (None: drawn), and the true ends of the attempt that met it.

    No end at all: the ranks come back in their pods, and the attempt goes on.
    """

    fault: str
    ends: frozenset[End]
    index: int | None = None


CASES = (
    Case("killed", frozenset({_CHARGED}), 0),
    Case("killed", frozenset({_CHARGED}), 1),
    Case("frozen", frozenset({_STALLED}), 0),
    Case("frozen", frozenset({_STALLED}), 1),
    Case("evicted", frozenset({_DISRUPTED})),
    Case("pressed out", frozenset({_DISRUPTED})),
    Case("SIGTERM twice", frozenset({_FREE})),
    # Its processes get a second. What they make of it is theirs; what they say of it must be true.
    Case("deleted with 1 s", frozenset({_FREE, _INTERRUPTED, _CHARGED})),
    Case("deleted by force", frozenset({_CHARGED, _FREE, _INTERRUPTED})),
    Case("rank killed", frozenset()),
    Case("node without power", frozenset({_CHARGED, _STALLED, _DISRUPTED})),
    Case("node cut off, its pod wakes late", frozenset({_STALLED, _DISRUPTED})),
)


def gang_families(bench: GangBench) -> list[Family]:
    """All of them."""
    return [Family("gang-node", len(CASES), partial(_case, bench))]


def _case(bench: GangBench, run: Run, draw: random.Random) -> None:
    calm = bench.calm
    with bench.world() as world:
        struck = _Struck(world, CASES[run.index], draw)
        world.apply()
        status = world.until_done(struck.each)
        run.faults += struck.faults
        attempts = status["attempts"]
        run.lives += len(attempts)
        run.violations += struck.problems(status)
        run.lost += world.lost(attempts)
        if status.get("model") is None or (weights := world.weights()) != calm:
            found = weights if status.get("model") else "missing"
            run.wrong.append(f"weights {found}, calm run {calm}")
        run.violations += world.log_problems()
        run.commits += world.commits()
        run.told["attempts"] = [[a["reason"], a.get("resumedFromStep", 0)] for a in attempts]
        struck.end()
        run.violations += [f"left behind: {name}" for name in world.delete()]
        run.violations += world.watched.broken + world.watched.made_too_often(lambda name: 1)


class _Struck:
    """Strikes a pod once a seeded commit is there."""

    def __init__(self, world: GangWorld, case: Case, draw: random.Random) -> None:
        self._world = world
        self._case = case
        self._step = draw.randint(4, 30)
        self._index = draw.randint(0, 1) if case.index is None else case.index
        self.faults: list[str] = []
        self._node = self._pod = ""

    def each(self, status: dict[str, Any]) -> None:
        attempts = status.get("attempts") or []
        if not self.faults:
            committed = (status.get("checkpoint") or {}).get("step", 0)
            if committed >= self._step and self._strike():
                self.faults.append(f"{self._case.fault}: pod {self._pod}, step {committed}")
        elif self._node and len(attempts) > 1:
            # The next attempt has committed something of its own: now the lost one may come back.
            committed = (status.get("checkpoint") or {}).get("step", 0)
            if committed > self._world.committed.get(1, 0):
                self._return()

    def _strike(self) -> bool:
        team = self._world.team
        try:
            pod = team.get("pod", team.pod(NAME, self._index))
        except IndexError:
            return False
        self._pod = pod["metadata"]["name"]
        node = pod["spec"]["nodeName"]
        at = (team.namespace, self._pod)
        match self._case.fault:
            case "rank killed":
                pids = team.handle.node(node).pids(*at)
                for child in psutil.Process(pids["trainer"]).children(recursive=True):
                    child.send_signal(signal.SIGKILL)
            case "node without power":
                self._node = node
                team.handle.node(node).lose(kill=True)
            case "node cut off, its pod wakes late":
                self._node = node
                team.handle.node(node).lose()
                team.handle.node(node).freeze(*at)
            case fault:
                return self._world.striker.strike(fault, pod)
        return True

    def _return(self) -> None:
        node = self._world.team.handle.node(self._node)
        if "wakes" in self._case.fault:
            node.thaw(self._world.team.namespace, self._pod)
        node.come_back()
        self.faults.append(f"node {self._node} is back")
        self._node = ""

    def end(self) -> None:
        """A node that is still lost comes back: what is to go from it can go."""
        if self._node:
            self._return()

    def problems(self, status: dict[str, Any]) -> list[str]:
        """What is told wrongly."""
        if not self.faults:
            return [f"step {self._step} was not struck"]
        attempts, ends = status["attempts"], self._case.ends
        found = []
        if status.get("fence") != len(attempts):
            found.append(f"fence {status.get('fence')} after {len(attempts)} attempts")
        if len(attempts) != 1 + bool(ends):
            told = [(a["reason"], a.get("message")) for a in attempts]
            found.append(f"{len(attempts)} attempts after {self.faults}: {told}")
        first = attempts[0]
        if ends and (first["reason"], bool(first.get("charged"))) not in ends:
            found.append(f"attempt 1 is told to have ended by {first}, expected {sorted(ends)}")
        if not ends and not first.get("rankRestarts"):
            found.append(f"no restart of ranks is told of: {first}")
        return found

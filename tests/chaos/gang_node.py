"""Faults of the node below a gang of real ranks: no bit differs, and no commit is lost."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
from kubedistill_api import reasons

from chaos.figures import Family, Run
from chaos.gang_bench import NAME, Calm, GangBench, GangWorld
from chaos.node_strikes import End
from chaos.operator_judge import differences
from chaos.operator_node import normal

_CHARGED, _FREE = (reasons.ERROR, True), (reasons.GRACEFUL_CHECKPOINT, False)
_INTERRUPTED = (reasons.INTERRUPTED, False)
_STALLED, _DISRUPTED = (reasons.STALLED, True), (reasons.DISRUPTED, False)
_SETTLED_SECONDS = 20.0


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
        if status.get("model") is None or (weights := world.weights()) != calm.weights:
            found = weights if status.get("model") else "missing"
            run.wrong.append(f"weights {found}, calm run {calm.weights}")
        run.wrong += unlike(world, calm)
        run.lost += struck.lost_from(world.log())
        run.violations += world.log_problems()
        run.commits += world.commits()
        run.told["attempts"] = [[a["reason"], a.get("resumedFromStep", 0)] for a in attempts]
        struck.end()
        run.violations += [f"left behind: {name}" for name in world.delete()]
        run.violations += world.watched.broken + world.watched.made_too_often(lambda name: 1)


def unlike(world: GangWorld, calm: Calm) -> list[str]:
    """What of the end state is not as in the calm run; last words may come after the success."""
    expected = _normal(calm.state)
    deadline = time.monotonic() + _SETTLED_SECONDS
    while found := list(differences(expected, _normal(world.space.state()))):
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return found


def _normal(state: dict[str, Any]) -> dict[str, Any]:
    """Beside what attempts add: the newest commit's place, which names its fence, and the digest of
    it, which is of the place too. What is in it is read by who looks at the log."""
    result = normal(state, NAME)
    status = result[f"DistillationJob/{NAME}"]["status"]
    if commit := status.get("checkpoint"):
        place = re.sub(r"/data/e\d+/", "/data/e*/", commit["uri"])
        status["checkpoint"] = commit | {"uri": place, "digest": "set"}
    # Measured, and of the machine.
    status["progress"] = {k: v for k, v in status["progress"].items() if k != "straggler"}
    # The preflight's pod goes with the node that it ran on.
    pods = {key: n for key, n in result["pods"].items() if key.startswith(f"{NAME}-a*")}
    return result | {"pods": pods}


class _Struck:
    """Strikes a pod once a seeded commit is there."""

    def __init__(self, world: GangWorld, case: Case, draw: random.Random) -> None:
        self._world = world
        self._case = case
        self._step = draw.randint(4, 30)
        self._index = draw.randint(0, 1) if case.index is None else case.index
        self.faults: list[str] = []
        self._node = self._pod = ""
        self._log: dict[str, bytes] = {}

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
        self._log = self._world.log()
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

    def lost_from(self, log: dict[str, bytes]) -> list[str]:
        """What was in the log as the fault came, and is another one in the end; and whether what
        followed it, be it in the same pods, went on behind the newest commit."""
        changed = [
            f"{slot} of the log was another one before {self.faults}"
            for slot, body in self._log.items()
            if log.get(slot) != body
        ]
        later = [record for slot, record in _records(log) if slot not in self._log]
        began = next((n for n, record in enumerate(later) if record["kind"] == "FENCE"), len(later))
        # Until the next FENCE the struck one may have gone on for a while.
        before = [record for _, record in _records(self._log)] + later[:began]
        newest = max((r["step"] for r in before if r["kind"] == "COMMIT"), default=0)
        following = [r["step"] for r in later[began:] if r["kind"] == "COMMIT"]
        if following and following[0] <= newest:
            changed.append(f"step {newest} was committed, and the next commit is {following[0]}")
        return changed

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


def _records(log: dict[str, bytes]) -> list[tuple[str, dict[str, Any]]]:
    return [(slot, json.loads(body)) for slot, body in log.items()]

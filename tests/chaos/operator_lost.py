"""A family in which a whole node is lost, and comes back. A stand-in trains."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from kubedistill_api import names, reasons

from chaos.figures import Family, Run
from chaos.node_strikes import STUDENT, End
from chaos.operator_bench import OperatorBench, World
from chaos.operator_judge import Judge, State
from chaos.operator_node import NAME, normal, scenario

_STEPS = 600
"""A minute: Kubernetes takes half of it to give up a node's pods."""
_MOMENT_SECONDS = 6.0
_STALLED, _DISRUPTED = (reasons.STALLED, True), (reasons.DISRUPTED, False)


@dataclass(frozen=True)
class Loss:
    """How a node is lost, and the true ends of the attempt that had a pod on it.

    No end at all: the node is back before anybody had to notice.
    """

    name: str
    ends: frozenset[End]
    index: int | None = None
    """Of the pod whose node it is; None: drawn. A stand-in that is rank 0 does not miss its peer."""


LOSSES = (
    # A node that has power again says at once how its containers ended.
    Loss("without power", frozenset({_STALLED, _DISRUPTED, (reasons.ERROR, True)}), 0),
    Loss("cut off with rank 0, which wakes late", frozenset({_STALLED, _DISRUPTED}), 0),
    Loss("silent", frozenset({_DISRUPTED})),
    Loss("silent for a moment", frozenset()),
)


def lost_families(bench: OperatorBench) -> list[Family]:
    """A node is lost for all worlds on it: one case after the other."""
    judge = Judge(bench, partial(scenario, steps=_STEPS), 1)
    return [Family("operator-node-lost", len(LOSSES), partial(_lost, judge))]


def _lost(judge: Judge, run: Run, draw: random.Random) -> None:
    struck = _Lost(LOSSES[run.index % len(LOSSES)], draw)
    try:
        judge.judge(run, each=struck.each, normal=_normal, found=struck.found)
    finally:
        struck.end(judge.bench)
    run.faults += struck.faults


def _normal(state: State) -> State:
    """Beside what attempts add: pods that have ended, which go with the node that they ran on."""
    result = normal(state)
    pods = {key: n for key, n in result["pods"].items() if key.startswith(f"{NAME}-a*")}
    return result | {"pods": pods}


class _Lost:
    """Loses the node of one of the gang's pods once a seeded step is done."""

    def __init__(self, loss: Loss, draw: random.Random) -> None:
        self._loss = loss
        self._step = draw.randint(5, 40)
        self._index = draw.randint(0, 1) if loss.index is None else loss.index
        self._node = ""
        self._since = 0.0
        self._frozen: list[str] = []
        self.faults: list[str] = []

    def each(self, world: World) -> None:
        status = world.objects()[0].get("status") or {}
        attempts = status.get("attempts") or [{}]
        if not self.faults:
            if attempts[-1].get("lastStep", 0) >= self._step:
                self._lose(world)
        elif self._node and self._may_return(attempts):
            self._return(world.bench, world.namespace)

    def _may_return(self, attempts: list[dict[str, Any]]) -> bool:
        if not self._loss.ends:
            return time.monotonic() - self._since > _MOMENT_SECONDS
        # The next attempt trains: what comes back now is late.
        return len(attempts) > 1 and bool(attempts[-1].get("lastStep"))

    def _lose(self, world: World) -> None:
        pods = [pod for pod in world.found("pods") if _is_running_student(pod)]
        victim = next((pod for pod in pods if _index(pod) == self._index), None)
        if victim is None:
            return
        self._node, self._since = victim["spec"]["nodeName"], time.monotonic()
        node = world.bench.handle.node(self._node)
        node.lose(kill=self._loss.name == "without power")
        if "cut off" in self._loss.name:
            self._frozen = [
                pod["metadata"]["name"] for pod in pods if pod["spec"]["nodeName"] == self._node
            ]
            for name in self._frozen:
                node.freeze(world.namespace, name)
        self.faults.append(f"{self._node} {self._loss.name}")

    def _return(self, bench: OperatorBench, namespace: str) -> None:
        node = bench.handle.node(self._node)
        for name in self._frozen:
            node.thaw(namespace, name)
        node.come_back()
        self.faults.append(f"{self._node} is back")
        self._node = ""

    def end(self, bench: OperatorBench) -> None:
        """The next case needs all nodes."""
        if self._node:
            bench.handle.node(self._node).come_back()
        bench.handle.wait("all nodes are ready", lambda: _ready(bench), 60)

    def found(self, world: World) -> Iterator[str]:
        attempts = world.objects()[0]["status"]["attempts"]
        told = [(a["reason"], bool(a.get("charged")), a.get("message")) for a in attempts]
        if len(self.faults) < 2:
            yield f"the node was not lost and back: {self.faults}, {told}"
        if len(attempts) != 1 + bool(self._loss.ends):
            yield f"{len(attempts)} attempts after {self.faults}: {told}"
        if self._loss.ends and told[0][:2] not in self._loss.ends:
            yield f"attempt 1 is told to have ended by {told[0]}, expected {sorted(self._loss.ends)}"


def _is_running_student(pod: dict[str, Any]) -> bool:
    labels = pod["metadata"]["labels"]
    of_it = labels[names.LABEL_ROLE] == STUDENT and labels[names.LABEL_JOB] == NAME
    return of_it and bool(pod["status"]["phase"] == "Running")


def _index(pod: dict[str, Any]) -> int:
    return int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])


def _ready(bench: OperatorBench) -> bool:
    """Whether pods may go to every node again."""
    nodes = bench.handle.api.get("/api/v1/nodes")["items"]
    return not any(node["spec"].get("taints") for node in nodes)

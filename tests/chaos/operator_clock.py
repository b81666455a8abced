"""A family in which operators' clocks are an hour off. A stand-in trains."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

from kubedistill_api import names, reasons
from operator_kit import job, template

from chaos.figures import Family, Run
from chaos.operator_bench import OperatorBench, World
from chaos.operator_judge import AT_ONCE, Judge
from chaos.operator_node import NAME, normal

_HOUR = 3600.0
_LOOK_SECONDS = 2.0
CLOCKS = (
    (_HOUR,), (-_HOUR,), (0.0, _HOUR), (0.0, -_HOUR), (_HOUR, -_HOUR), (-_HOUR, _HOUR),
    (0.0, _HOUR, 0.0), (0.0, -_HOUR, 0.0),
)  # fmt: skip
"""By how much the clock of each operator is ahead, one after the other."""
_ENDS = [(reasons.OUT_OF_MEMORY, True), (reasons.COMPLETED, False)]


def scenario(book: Path) -> list[dict[str, Any]]:
    """A job with limits of less than an hour, of which the first attempt fails, and whose pods take a
    while to end."""
    pods = template(
        book, "fail-once", STEPS="12", STEP_SECONDS="1", END_SECONDS="3", TEACHER_QUIET="1"
    )
    workers = {"nodes": 2, "gpusPerNode": 0, "template": pods}
    limits = {
        "activeDeadlineSeconds": 1200, "ttlSecondsAfterFinished": 1800, "stallTimeoutSeconds": 60,
    }  # fmt: skip
    return [job(NAME, pods, workers=workers, checkpoint={"interval": 5}, **limits)]


def clock_families(bench: OperatorBench) -> list[Family]:
    """One case for each row of clocks."""
    judge = Judge(bench, scenario, 1)
    return [Family("operator-clock", len(CLOCKS), partial(_clock, judge), AT_ONCE)]


def _clock(judge: Judge, run: Run, draw: random.Random) -> None:
    """Operators follow each other; one of them ends an attempt, and another one may have begun it."""
    first, *others = CLOCKS[run.index % len(CLOCKS)]
    clocks = _Clocks(others, draw)
    run.faults.append(f"clock {first:+g} s")
    judge.judge(
        run, each=clocks.each, settings=_off(first), exits=frozenset({-Signals.SIGKILL}),
        normal=normal, found=clocks.found,
    )  # fmt: skip
    run.faults += clocks.faults


def _off(seconds: float) -> dict[str, str]:
    return {"clock_off_seconds": str(seconds)}


class _Clocks:
    """Replaces the operator, and looks whether two attempts have pods at once."""

    def __init__(self, others: list[float], draw: random.Random) -> None:
        self._others = others
        self._draw = draw
        self._due = float("inf")
        self._broken: dict[str, None] = {}
        self.faults: list[str] = []

    def each(self, world: World) -> None:
        self._look(world)
        if not self._others:
            return
        self._due = min(self._due, time.monotonic() + self._draw.uniform(5, 12))
        if time.monotonic() > self._due:
            world.lives[-1].process.end()
            world.start(**_off(self._others[0]))
            self.faults.append(f"clock {self._others.pop(0):+g} s")
            self._due = float("inf")

    def _look(self, world: World) -> None:
        live = {
            pod["metadata"]["labels"][names.LABEL_ATTEMPT]
            for pod in world.found("pods")
            if pod["metadata"]["labels"][names.LABEL_ROLE] == names.ROLE_STUDENT
            and pod["status"]["phase"] not in ("Succeeded", "Failed")
        }
        if len(live) > 1:
            self._broken[f"attempts {', '.join(sorted(live))} had pods at once"] = None

    def _stays(self, world: World) -> bool:
        """Whether the job, whose time is not over, is there after another one has looked at it."""
        world.lives[-1].process.end()
        since = len(world.bench.proxy.log)
        life = world.start(**_off(_HOUR))
        self.faults.append(f"clock {_HOUR:+g} s after the end")

        def looked() -> bool:
            calls = [entry.call for entry in world.bench.proxy.log[since:]]
            return life.leads and any(
                call.client == world.namespace and call.path.endswith("/distillationchains")
                for call in calls
            )

        # The last of what it lists before it decides; the look at the job follows at once.
        world.until(looked)
        time.sleep(_LOOK_SECONDS)
        return bool(world.objects())

    def found(self, world: World) -> Iterator[str]:
        yield from self._broken
        attempts = world.objects()[0]["status"]["attempts"]
        ends = [(a["reason"], bool(a.get("charged"))) for a in attempts]
        if ends != _ENDS:
            yield f"attempts ended by {ends}, expected {_ENDS}"
        if not self._stays(world):
            yield "the job was deleted before its ttlSecondsAfterFinished"
        if self._others:
            yield f"the scenario ended before clocks {self._others}"

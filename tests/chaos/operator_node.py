"""Families of faults of the node below the operator's pods. A stand-in trains."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kubedistill_api import names
from kubedistill_operator.plan.views import TRY_ANNOTATION
from operator_kit import job, template

from chaos.figures import Family, Run
from chaos.node_strikes import PREFLIGHT, STRIKES, STUDENT, Strike, Striker, true_ends
from chaos.operator_bench import OperatorBench, World
from chaos.operator_judge import AT_ONCE, Judge, State

NAME = "one"
_STEPS = 70
_BEGIN_SECONDS = 0.7
_OF_ATTEMPTS = (
    "attempt", "fence", "failuresSeen", "meanSecondsBetweenFailures", "saveSeconds", "committedStep",
)  # fmt: skip
"""Fields of an attempt's run spec."""


def scenario(book: Path, steps: int = _STEPS) -> list[dict[str, Any]]:
    """A job with a preflight and a teacher that live long enough to be struck, and a gang of two."""
    # The gang begins when the teacher has ended: its retry must not race with the gang's end.
    pods = template(
        book, STEPS=str(steps), STEP_SECONDS="0.1", PREFLIGHT_SECONDS="3", TEACHER_SECONDS="3",
        TEACHER_QUIET="1",
    )  # fmt: skip
    workers = {"nodes": 2, "gpusPerNode": 0, "template": pods}
    spec = {"workers": workers, "checkpoint": {"interval": 5}, "stallTimeoutSeconds": 10}
    return [job(NAME, pods, **spec)]


def node_families(bench: OperatorBench) -> list[Family]:
    """Faults of single pods."""
    judge = Judge(bench, scenario, 1)
    return [Family("operator-node", 2 * len(STRIKES), partial(_node, judge), AT_ONCE)]


def _node(judge: Judge, run: Run, draw: random.Random) -> None:
    """Each kind of fault in turn; in the second round one of the gang's follows it."""
    plan = [STRIKES[run.index % len(STRIKES)]]
    if run.index >= len(STRIKES):
        plan.append(draw.choice([strike for strike in STRIKES if strike.role == STUDENT]))
    struck = _Struck(plan, draw)
    judge.judge(
        run,
        each=struck.each,
        normal=normal,
        made=partial(_made, plan),
        found=struck.found,
    )
    run.faults += struck.faults
    if struck.left:
        run.told["not met"] = "; ".join(map(str, struck.left))


class _Struck:
    """Strikes pods one after the other, each at a seeded moment of its victim's life."""

    def __init__(self, plan: list[Strike], draw: random.Random) -> None:
        self.left = list(plan)
        self.done: list[Strike] = []
        self.faults: list[str] = []
        self._seen: dict[str, float] = {}
        self._draw = draw
        self._striker: Striker | None = None
        self._next()

    def _next(self) -> None:
        # A gang's process that has begun to train handles SIGTERM; rank 0 is whose silence counts.
        self._step = self._draw.randint(1, _STEPS - 45)
        frozen = bool(self.left) and self.left[0].fault == "frozen"
        self._index = 0 if frozen else self._draw.randint(0, 1)

    def each(self, world: World) -> None:
        self._striker = self._striker or Striker(world.bench.handle, world.namespace)
        self._striker.tick()
        if not self.left or (pod := self._victim(world)) is None:
            return
        strike = self.left[0]
        if self._striker.strike(strike.fault, pod, self._draw.uniform(1, 4)):
            self.left.pop(0)
            self.done.append(strike)
            self.faults.append(f"{strike} ({pod['metadata']['name']})")
            self._next()

    def _victim(self, world: World) -> dict[str, Any] | None:
        role = self.left[0].role
        status = world.objects()[0].get("status") or {}
        attempts = status.get("attempts") or [{}]
        number = len(attempts)
        if role == STUDENT:
            # A strike is of an attempt that no other one has struck.
            struck = sum(strike.role == STUDENT for strike in self.done)
            reached = attempts[-1].get("lastStep", 0) - attempts[-1].get("resumedFromStep", 0)
            if number != struck + 1 or attempts[-1].get("reason") or reached < min(self._step, 5):
                return None
            if attempts[-1].get("lastStep", 0) < self._step:
                return None
        for pod in world.found("pods"):
            labels = pod["metadata"]["labels"]
            index = labels.get("batch.kubernetes.io/job-completion-index", "0")
            attempt = labels.get(names.LABEL_ATTEMPT)
            of_it = role != STUDENT or (int(index) == self._index and attempt == str(number))
            if labels[names.LABEL_ROLE] == role and of_it and _runs(pod):
                # A process has no handlers as it begins, and no signal gets through to it.
                begun = self._seen.setdefault(pod["metadata"]["name"], time.monotonic())
                return pod if time.monotonic() - begun > _BEGIN_SECONDS else None
        return None

    def found(self, world: World) -> Iterator[str]:
        status = world.objects()[0]["status"]
        attempts = status["attempts"]
        yield from true_ends(attempts, [s for s in self.done if s.role == STUDENT])
        if status.get("fence") != len(attempts) or status.get("restarts", 0) != len(attempts) - 1:
            yield f"fence {status.get('fence')}, restarts {status.get('restarts')} after {attempts}"
        charged = sum(bool(attempt.get("charged")) for attempt in attempts)
        if status.get("failures", 0) > charged:
            yield f"failures {status['failures']} after {charged} that count"
        resumed = [attempt.get("resumedFromStep", 0) for attempt in attempts]
        if resumed != sorted(resumed):
            yield f"a commit was lost: resumed from {resumed}"
        tries = 1 + sum(strike.charged for strike in self.done if strike.role == PREFLIGHT)
        [tried] = [
            one["metadata"]["annotations"][TRY_ANNOTATION]
            for one in world.found("jobs")
            if one["metadata"]["labels"][names.LABEL_ROLE] == PREFLIGHT
        ]
        if int(tried) != tries:
            yield f"the preflight's try is {tried} after {list(map(str, self.done))}"


def _runs(pod: dict[str, Any]) -> bool:
    return pod["status"]["phase"] == "Running" and not pod["metadata"].get("deletionTimestamp")


def _made(plan: list[Strike], name: str) -> int:
    """A preflight that was struck is made anew under its name; nothing else is."""
    lasting = ("frozen for a while",)
    struck = sum(s.role == PREFLIGHT and s.fault not in lasting for s in plan)
    return 1 + struck * bool(re.fullmatch(rf"{NAME}-p[0-9a-f]{{6}}", name))


def normal(state: State, name: str = NAME) -> State:
    """An end state without what attempts of the job honestly add: their number and history, and what
    is left of ended ones. Who asks looks at these by itself."""
    attempt = re.compile(rf"\b{name}-a(\d+)\b")
    newest = max([int(n) for key in state for n in attempt.findall(key)], default=1)

    def old(key: str) -> bool:
        match = attempt.search(key)
        return match is not None and int(match.group(1)) < newest

    def renamed(text: str) -> str:
        return re.sub(rf"\b{name}-a{newest}\b", f"{name}-a*", text)

    result: State = {}
    for key, value in state.items():
        if not old(key):
            result[renamed(key)] = value
        elif "Complete" in value:
            # The last ended one's Job is kept for its logs; it must not say that it succeeded.
            result[f"{key} succeeded"] = value
    result["configmaps"] = {
        renamed(key): _of_any_attempt(json.loads(renamed(json.dumps(files))))
        for key, files in state.get("configmaps", {}).items()
        if not old(key)
    }
    result["pods"] = {
        renamed(key): count
        for key, count in state.get("pods", {}).items()
        # Failed pods of the gang that ended, and of a teacher whose Job tried again.
        if not (old(key) or key == f"{names.teacher_name(name)} Failed")
    }
    whole = f"DistillationJob/{name}"
    status = dict(state.get(whole, {}).get("status", {}))
    last = (status.pop("attempts", None) or [{}])[-1]
    for key in ("fence", "restarts", "failures"):
        status.pop(key, None)
    told = {key: last.get(key) for key in ("reason", "message", "charged", "lastStep")}
    result[whole] = state.get(whole, {}) | {"status": _unnumbered(status), "last": told}
    return result


def _of_any_attempt(files: State) -> State:
    """Run specs without what attempts before it add."""
    return {
        file: {key: part for key, part in run.items() if key not in _OF_ATTEMPTS}
        for file, run in files.items()
    }


def _unnumbered(status: dict[str, Any]) -> dict[str, Any]:
    """Conditions name the attempt that they are of."""
    conditions = [
        c | {"message": re.sub(r"attempt \d+(, resumed from step \d+)?", "attempt *", c["message"])}
        if c.get("message")
        else c
        for c in status.get("conditions", [])
    ]
    return status | {"conditions": conditions}

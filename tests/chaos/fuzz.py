"""Objects of all kinds, given to the real API server while the real operator runs."""

from __future__ import annotations

import copy
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from devcluster.node.api import ApiError
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from operator_kit import ONLINE, job, template

from chaos.figures import FUZZ, Family, Run
from chaos.operator_bench import OperatorBench, World, cleaned
from chaos.operator_judge import AT_ONCE, differences
from chaos.schema import edited, edits, spec_schema

_JOBS = "/apis/kubedistill.dev/v1alpha1/namespaces/{}/distillationjobs"
_CASES = 8
_BATCH = 8
_SECONDS = 240.0
_SAYS_WHY = {
    "SecretNotFound", "DependencyNotFound", "WaitingForDependency", "DependencyCycle",
    "DependencyFailed", "Suspended", "Queued", "Unschedulable", "ManagedElsewhere",
}  # fmt: skip
"""Reasons for not being validated yet that tell the user what is waited for."""
_STANDS = _SAYS_WHY | {"PodNotStarting", "CreationRefused"}
"""Reasons with which an object may stay as it is."""
_SOON_SECONDS = 300
"""A shorter deadline ends a job by the clock, at any point of its life: two of them end differently."""
_SLOW = re.compile(r"^([\w.]+\.)?\w*(Timeout\w*|ServerDisconnectedError)\b")
"""Last line of a traceback that tells of a machine with too much to do."""
_NONCE = re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
"""Of a key that a preflight of the trainer's own tried the store with, in its message."""
_DRAWING = threading.Lock()
"""Of hypothesis, whose state is the process's."""
State = dict[str, Any]


def fuzz_family(bench: OperatorBench, objects: int) -> Family:
    """So many objects, in cases that run side by side."""
    cases = min(_CASES, max(1, objects // (2 * _BATCH)))

    def run_all(run: Run, draw: Any) -> None:
        share = -(-objects // cases)
        with bench.world("fuzz") as world:
            world.start()
            _Fuzz(run, world).go(share, draw.getrandbits(32))
            run.lives += len(world.lives)
            # The API server is well: even an object that goes while it is looked at is no error.
            run.violations += [
                f"in the log: {last}"[:400] for last in world.failures() if not _SLOW.match(last)
            ]

    return Family(FUZZ, cases, run_all, AT_ONCE)


@dataclass
class _Object:
    """A spec as it is to be, and an edit of it that is made and taken back."""

    name: str
    way: str
    spec: State
    edits: list[Any]
    edit: Any = None

    def __post_init__(self) -> None:
        self.edit = self.edits[0]

    @property
    def first(self) -> State:
        """What is created. A job that has started refuses edits, so most have not when they come."""
        if self.way == "suspended":
            return self.spec | {"suspend": True}
        return self.changed if self.way == "mended" else self.spec

    @property
    def changed(self) -> State:
        suspended = {"suspend": True} if self.way == "suspended" else {}
        return edited(self.spec, self.edit) | suspended


_WAYS = ("suspended", "mended", "suspended", "mended", "suspended", "mended", "suspended", "ended")
"""Half of the objects train to their end; of the others the preflight finds bad data, and an edit makes
it look again. What the pods say is the same for an object and its twin."""


class _Fuzz:
    """Makes objects in batches: most of their time is the operator's and the pods'."""

    def __init__(self, run: Run, world: World) -> None:
        self._run = run
        self._world = world
        self._api = world.bench.handle.api
        self._count = 0
        self._path = _JOBS.format(world.namespace)
        times = {"STEPS": "3", "STEP_SECONDS": "0.01", "TEACHER_SECONDS": "0.1"}
        trains = job("x", template(world.book, **times))["spec"]
        trains["teacher"] = ONLINE
        ends = job("x", template(world.book, "bad-data"))["spec"]
        self._bases = {way: trains if way == "suspended" else ends for way in _WAYS}
        run.told |= dict.fromkeys(("accepted", "refused", "edited and repaired", "by the clock"), 0)

    def go(self, objects: int, number: int) -> None:
        for batch in _batches(-(-objects // _BATCH), number):
            self._batch(batch)

    def _batch(self, batch: list[Any]) -> None:
        made = []
        for first, second in batch:
            self._count += 1
            way = _WAYS[self._count % len(_WAYS)]
            one = _Object(f"f{self._count}", way, edited(self._bases[way], first), second)
            if self._create(one):
                made.append(one)
        for one in made:
            self._verdict(one)
        through = [one for one in made if self._edit_and_repair(one)]
        # The same object, never edited. It may begin later: an end does not tell of its beginning.
        twins = [one for one in through if self._twin(one)]
        for one in twins:
            self._compare(one)
        for one in made:
            for name in (one.name, _twin(one.name)):
                self._gone_or(partial(self._api.delete, f"{self._path}/{name}", {}))

    def _create(self, one: _Object) -> bool:
        self._run.faults.append(one.name)
        accepted = not self._refusal(one.name, one.first)
        if one.way == "mended":
            for edit in one.edits:
                if accepted:
                    break
                one.edit = edit
                accepted = not self._refusal(one.name, one.first)
        self._run.told["accepted" if accepted else "refused"] += 1
        return accepted

    def _twin(self, one: _Object) -> bool:
        if refusal := self._refusal(_twin(one.name), one.spec):
            self._run.wrong.append(f"{one.name}: what was repaired is refused anew: {refusal}")
        return not refusal

    def _refusal(self, name: str, spec: State) -> str:
        """Why the API server does not take a new object; empty when it does."""
        try:
            self._api.post(self._path, job(name) | {"spec": spec})
        except (ApiError, ValueError) as error:
            # A 500 is a mistake in our schema or its rules, whatever was sent.
            if isinstance(error, ApiError) and error.code >= 500:
                self._run.violations.append(f"{error}: {json.dumps(spec)[:500]}")
            return str(error)
        return ""

    def _status(self, name: str) -> State | None:
        """None once it is deleted: ttlSecondsAfterFinished may be short."""
        whole = self._gone_or(partial(self._api.get, f"{self._path}/{name}"))
        return None if whole is None else whole.get("status") or {}

    @staticmethod
    def _gone_or(ask: Callable[[], State]) -> State | None:
        try:
            return ask()
        except ApiError as error:
            if error.code != 404:
                raise
            return None

    def _verdict(self, one: _Object) -> None:
        """Whether the operator says something of an object."""
        found: tuple[str, str] = ("", "")

        def said() -> bool:
            nonlocal found
            status = self._status(one.name)
            if status is None:
                return True
            found = _condition(status, "Validated")["status"], _condition(status)["reason"]
            return found[0] in ("True", "False") or found[1] in _SAYS_WHY

        if not _until(said):
            self._run.violations.append(
                f"{one.name} has no verdict, but {found}: {self._difference(one)}"
            )

    def _edit_and_repair(self, one: _Object) -> bool:
        """Whether both were taken, and the edit was looked at in between."""
        if one.way != "mended" and not self._changed(one):
            return False
        if one.way == "suspended" and not self._seen(one, one.first):
            return False
        if not self._put(one.name, one.spec):
            return False
        self._run.told["edited and repaired"] += 1
        return True

    def _changed(self, one: _Object) -> bool:
        """Make the first of the edits that is taken."""
        for edit in one.edits:
            one.edit = edit
            if self._seen(one, one.changed):
                return True
        return False

    def _seen(self, one: _Object, spec: State) -> bool:
        """Put a spec; False where it is refused. The operator has looked at it then."""
        if not self._put(one.name, spec):
            return False

        def looked() -> bool:
            whole = self._gone_or(partial(self._api.get, f"{self._path}/{one.name}"))
            return whole is None or (
                whole["metadata"]["generation"]
                == (whole.get("status") or {}).get("observedGeneration")
            )

        if not _until(looked):
            self._run.violations.append(f"{one.name}: an edit is not looked at: {one.edit}")
        return True

    def _compare(self, one: _Object) -> None:
        """An edit and its repair leave no trace in the end."""
        if (one.spec.get("activeDeadlineSeconds") or _SOON_SECONDS) < _SOON_SECONDS:
            self._run.told["by the clock"] += 1
            return
        states: list[State] = [{}, {}]

        def same() -> bool:
            statuses = [self._status(name) for name in (one.name, _twin(one.name))]
            states[:] = [_end(status, one.name) for status in statuses]
            return states[0] == states[1] and all(map(_stands, statuses))

        if not _until(same) and states[0] != states[1]:
            self._run.wrong.append(
                f"{one.name} ({one.way}) is another one after an edit and its repair: "
                f"{list(differences(states[1], states[0]))}; {self._difference(one)}, "
                f"edit {json.dumps(one.edit)[:300]}"
            )

    def _put(self, name: str, spec: State) -> bool:
        for _ in range(20):
            try:
                whole = self._api.get(f"{self._path}/{name}")
                self._api.put(f"{self._path}/{name}", whole | {"spec": spec})
            except ApiError as error:
                if error.code == 409:
                    continue
                return False
            except ValueError:
                return False
            return True
        return False

    def _difference(self, one: _Object) -> str:
        base = self._bases[one.way]
        parts = {key: part for key, part in one.spec.items() if part != base.get(key)}
        return json.dumps(parts)[:500]


def _batches(count: int, number: int) -> list[list[Any]]:
    """What makes an object another one than the base, and edits to choose one from to take back."""
    schema, found = spec_schema(), list[list[Any]]()
    # Most of what is hostile is refused at once: of four objects one begins with it. Of some edits
    # the first that the API server takes is made.
    fits = edits(schema, fitting=True)
    first = st.one_of(edits(schema), fits, fits, fits)
    one = st.tuples(first, st.lists(st.one_of(edits(schema), fits), min_size=6, max_size=6))

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(one, min_size=_BATCH, max_size=_BATCH))
    def collect(batch: list[Any]) -> None:
        found.append(copy.deepcopy(batch))

    with _DRAWING:
        collect()
    return found


def _twin(name: str) -> str:
    return f"{name}-twin"


def _condition(status: State, kind: str = "Succeeded") -> State:
    for condition in status.get("conditions") or []:
        if condition["type"] == kind:
            return dict(condition)
    return {"status": "", "reason": ""}


def _stands(status: State | None) -> bool:
    """Whether an object will not change by itself, or not soon."""
    if status is None:
        return True
    found = _condition(status)
    return found["status"] in ("True", "False") or found["reason"] in _STANDS


def _end(status: State | None, name: str) -> State:
    """All of a status that does not differ between two objects with one spec."""
    if status is None:
        return {"deleted": True}
    text = _NONCE.sub("", json.dumps(cleaned(status)).replace(_twin(name), name))
    found: State = json.loads(text)
    return found


def _until(said: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _SECONDS
    while not said():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True

"""Objects of all kinds, given to the real API server while the real operator runs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from devcluster.node.api import ApiError
from operator_kit import ONLINE, chain, job, template

from chaos.draw import BATCH, batches
from chaos.figures import FUZZ, Family, Run
from chaos.fuzz_states import State, condition, end, has_verdict, looked_at, stands
from chaos.operator_bench import OperatorBench, Trouble, World
from chaos.operator_judge import AT_ONCE, RETRIED, differences, ends
from chaos.operator_state import GROUP, children
from chaos.schema import CHAIN, JOB, edited

_CASES = 8
_SECONDS = 240.0
_PUTS = 20
_LEAST_REPAIRED = 1 / 4
"""Of all objects: below it, a case has not looked at what it is for."""
_SOON_SECONDS = 300
"""A shorter deadline ends a job by the clock, at any point of its life: two of them end differently."""
_SLOW = re.compile(r"^([\w.]+\.)?\w*(Timeout\w*|ServerDisconnectedError)\b")
"""Last line of a traceback that tells of a machine with too much to do."""
_REFUSED = "refused"
"""The API server's answer to a child that a mutated spec asks for: the object's state has it too."""


def fuzz_family(bench: OperatorBench, objects: int) -> Family:
    """So many objects, in cases that run side by side."""
    cases = min(_CASES, max(1, objects // (2 * BATCH)))

    def run_all(run: Run, draw: Any) -> None:
        share = -(-objects // cases)
        with bench.world("fuzz") as world:
            world.start()
            _Fuzz(run, world).go(share, draw.getrandbits(32))
            run.lives += len(world.lives)
            run.violations += ends(run, world)
            # The API server is well: even an object that goes while it is looked at is no error.
            run.violations += [
                f"in the log: {trouble}"[:400]
                for trouble in world.troubles()
                if not (trouble.message == _REFUSED or _slow(trouble))
            ]
        if run.told["edited and repaired"] < share * _LEAST_REPAIRED:
            run.violations.append(f"too few of {share} were edited and repaired: {run.told}")

    return Family(FUZZ, cases, run_all, AT_ONCE)


def _slow(trouble: Trouble) -> bool:
    """Whether a call timed out, or met a connection that was closed as it was used again."""
    return bool(_SLOW.match(trouble.error) or RETRIED.match(trouble.message))


@dataclass(frozen=True)
class _Way:
    """A kind of object, and what is done to it."""

    name: str
    kind: str = JOB

    @property
    def path(self) -> str:
        return f"{self.kind.lower()}s"


_SUSPENDED, _MENDED, _ENDED = _Way("suspended"), _Way("mended"), _Way("ended")
# A stage that has begun with an edit keeps it: chains are edited while nothing of them has begun.
_CHAIN = _Way("suspended", CHAIN)
_WAYS = (_SUSPENDED, _MENDED, _SUSPENDED, _MENDED, _SUSPENDED, _CHAIN, _SUSPENDED, _ENDED)
"""Half of the objects train to their end; of the others the preflight finds bad data, and an edit makes
it look again. What the pods say is the same for an object and its twin."""


@dataclass
class _Object:
    """A spec as it is to be, and an edit of it that is made and taken back."""

    stem: str
    way: _Way
    spec: State
    edits: list[Any]
    edit: Any = None

    def __post_init__(self) -> None:
        self.edit = self.edits[0]

    @property
    def name(self) -> str:
        return f"{self.stem}-once"

    @property
    def twin(self) -> str:
        """The same object, never edited. Its name is as long: names of its parts are bounded."""
        return f"{self.stem}-twin"

    @property
    def first(self) -> State:
        """What is created. A job that has started refuses edits, so most have not when they come."""
        if self.way.name == "suspended":
            return self.spec | {"suspend": True}
        return self.changed if self.way == _MENDED else self.spec

    @property
    def changed(self) -> State:
        suspended = {"suspend": True} if self.way.name == "suspended" else {}
        return edited(self.spec, self.edit) | suspended

    @property
    def may_vanish(self) -> bool:
        """Whether it may be deleted once it has ended: as it is, or as it was edited."""
        return any(spec.get("ttlSecondsAfterFinished") is not None
                   for spec in (self.spec, self.changed))  # fmt: skip


class _Fuzz:
    """Makes objects in batches: most of their time is the operator's and the pods'."""

    def __init__(self, run: Run, world: World) -> None:
        self._run = run
        self._world = world
        self._api = world.bench.handle.api
        self._count = 0
        self._bases = _bases(world)
        figures = ("accepted", "refused", "edited and repaired", "chains", "by the clock")
        run.told |= dict.fromkeys(figures, 0)

    def go(self, objects: int, number: int) -> None:
        for batch in batches(objects, number):
            self._batch(batch)
        left: list[str] = []

        def gone() -> bool:
            left[:] = children(self._api, self._world.namespace)
            left.extend(one["metadata"]["name"] for one in self._world.objects())
            return not left

        if not _until(gone):
            self._run.violations += [f"left behind: {name}" for name in left]

    def _batch(self, batch: list[Any]) -> None:
        made = []
        for drawn in batch:
            self._count += 1
            way = _WAYS[self._count % len(_WAYS)]
            first, second = drawn[way.kind]
            one = _Object(f"f{self._count}", way, edited(self._bases[way], first), second)
            if self._create(one):
                made.append(one)
        for one in made:
            self._verdict(one)
        through = [one for one in made if self._edit_and_repair(one)]
        # A twin may begin later: an end does not tell of its beginning.
        twins = [one for one in through if self._has_twin(one)]
        for one in twins:
            self._compare(one)
        for one in made:
            if one not in twins:
                self._comes_to_rest(one)
        for one in made:
            for name in (one.name, one.twin):
                self._gone_or(partial(self._api.delete, self._path(one, name), {}))

    def _path(self, one: _Object, name: str = "") -> str:
        path = f"{GROUP}/namespaces/{self._world.namespace}/{one.way.path}"
        return f"{path}/{name}" if name else path

    def _create(self, one: _Object) -> bool:
        self._run.faults.append(one.name)
        accepted = not self._refusal(one, one.name, one.first)
        if one.way == _MENDED:
            for edit in one.edits:
                if accepted:
                    break
                one.edit = edit
                accepted = not self._refusal(one, one.name, one.first)
        self._run.told["accepted" if accepted else "refused"] += 1
        return accepted

    def _has_twin(self, one: _Object) -> bool:
        if refusal := self._refusal(one, one.twin, one.spec):
            self._run.wrong.append(f"{one.name}: what was repaired is refused anew: {refusal}")
        return not refusal

    def _refusal(self, one: _Object, name: str, spec: State, tried: str = "") -> str:
        """Why the API server does not take a new object; empty when it does. `tried`: a query."""
        body = {**job(name), "kind": one.way.kind, "spec": spec}
        return self._asked(partial(self._api.post, self._path(one) + tried, body), spec)

    def _asked(self, ask: Callable[[], Any], spec: State) -> str:
        """Why the API server does not do something with a spec; empty when it does."""
        try:
            ask()
        except (ApiError, ValueError) as error:
            # A 500 is a mistake in our schema or its rules, whatever was sent.
            if isinstance(error, ApiError) and error.code >= 500:
                self._run.violations.append(f"{error}: {json.dumps(spec)[:500]}")
            return str(error) or type(error).__name__
        return ""

    def _whole(self, one: _Object, name: str) -> State | None:
        """None once it is deleted: ttlSecondsAfterFinished may be short."""
        whole = self._gone_or(partial(self._api.get, self._path(one, name)))
        if whole is None and not one.may_vanish:
            told = f"{name} is gone, and nobody deleted it: {self._difference(one)}"
            if told not in self._run.violations:
                self._run.violations.append(told)
        return whole

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

        def said() -> bool:
            whole = self._whole(one, one.name)
            return whole is None or has_verdict(whole)

        if not _until(said):
            self._run.violations.append(
                f"{one.name} has no verdict, but {self._standing(one)}: {self._difference(one)}"
            )

    def _edit_and_repair(self, one: _Object) -> bool:
        """Whether both were taken, and the edit was looked at in between."""
        if one.way != _MENDED and not self._changed(one):
            return False
        if one.way.name == "suspended" and not self._seen(one, one.first):
            return False
        if refusal := self._put(one, one.spec):
            # What nobody could have created is no repair.
            fits = not self._refusal(one, one.twin, one.spec, tried="?dryRun=All")
            if fits and self._whole(one, one.name) is not None:
                self._run.violations.append(
                    f"{one.name}: an edit was taken that nobody can take back: {refusal}; "
                    f"{self._difference(one)}, edit {json.dumps(one.edit)[:300]}"
                )
            return False
        self._run.told["edited and repaired"] += 1
        self._run.told["chains"] += one.way == _CHAIN
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
        if self._put(one, spec):
            return False

        def looked() -> bool:
            whole = self._whole(one, one.name)
            return whole is None or looked_at(whole)

        if not _until(looked):
            self._run.violations.append(f"{one.name}: an edit is not looked at: {one.edit}")
        return True

    def _compare(self, one: _Object) -> None:
        """An edit and its repair leave no trace in the end, and there is an end."""
        if (one.spec.get("activeDeadlineSeconds") or _SOON_SECONDS) < _SOON_SECONDS:
            self._run.told["by the clock"] += 1
            self._comes_to_rest(one)
            return
        states: list[State] = [{}, {}]

        def same() -> bool:
            both = [self._whole(one, name) for name in (one.name, one.twin)]
            states[:] = [end(whole, (one.name, one.twin)) for whole in both]
            return states[0] == states[1] and all(map(stands, both))

        if _until(same):
            return
        told = f"{self._difference(one)}, edit {json.dumps(one.edit)[:300]}"
        if states[0] == states[1]:
            self._run.violations.append(
                f"{one.name} ({one.way}) and its twin are stuck: {self._standing(one)}; {told}"
            )
        else:
            self._run.wrong.append(
                f"{one.name} ({one.way}) is another one after an edit and its repair: "
                f"{list(differences(states[1], states[0]))}; {told}"
            )

    def _comes_to_rest(self, one: _Object) -> None:
        """An object without a twin, which has one of its specs for good, is not stuck either."""
        if not _until(lambda: stands(self._whole(one, one.name))):
            self._run.violations.append(
                f"{one.name} ({one.way}) is stuck: {self._standing(one)}; {self._difference(one)}"
            )

    def _standing(self, one: _Object) -> str:
        whole = self._whole(one, one.name) or {}
        kinds = ("Succeeded", "Validated")
        return str([(c["reason"], c.get("message")) for c in (condition(whole, k) for k in kinds)])

    def _put(self, one: _Object, spec: State) -> str:
        """Why a spec is not taken; empty when it is. Who wrote in between is written over."""
        path, refusal = self._path(one, one.name), ""

        def put() -> None:
            self._api.put(path, self._api.get(path) | {"spec": spec})

        for _ in range(_PUTS):
            refusal = self._asked(put, spec)
            if not refusal.startswith("409"):
                break
        return refusal

    def _difference(self, one: _Object) -> str:
        base = self._bases[one.way]
        parts = {key: part for key, part in one.spec.items() if part != base.get(key)}
        return json.dumps(parts)[:500]


def _bases(world: World) -> dict[_Way, State]:
    """The spec that an object's is an edit of. Of writers that fail each retry waits twice as long: with
    the default limit, longer than anybody looks."""
    limit = {"backoffLimit": 1}
    times = {"STEPS": "3", "STEP_SECONDS": "0.01", "TEACHER_SECONDS": "0.1"}
    trains = job("x", template(world.book, **times))["spec"]
    trains |= {"teacher": ONLINE, **limit}
    ends_soon = job("x", template(world.book, "bad-data"))["spec"] | limit
    stages = chain("x", template(world.book, **times), {"name": "m"}, {"name": "s"})["spec"]
    stages["template"] |= limit
    return {_SUSPENDED: trains, _MENDED: ends_soon, _ENDED: ends_soon, _CHAIN: stages}


def _until(said: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _SECONDS
    while not said():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True

"""An explicit-state model checker for programs that share a store.

An actor is ordinary code that calls a store. It is run from its start with the answers that it got
so far; the first call without an answer ends the run. So what an actor does next is a function of
its answers, a state of the whole is the store's content plus every actor's answers, and states can
be kept, compared and branched without threads. Every call is a scheduling point, at which it may
also meet each fault of `_outcomes`.

Calls of which no other actor can change the answer are no scheduling points: a read of a log slot
that is written (it is never written again), and a note.
"""

from __future__ import annotations

import random
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from kubedistill_trainer.checkpoint import log as log_module
from kubedistill_trainer.checkpoint import pins as pins_module
from kubedistill_trainer.store import (
    NotFound,
    ObjectInfo,
    PreconditionFailed,
    StoreUnavailable,
)

Objects = frozenset[tuple[str, bytes, int]]
"""Key, content, and when it was written, counted in FENCEs (`_now`)."""
Note = tuple[Any, ...]
_START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Call:
    """What an actor asks of the store."""

    method: str
    key: str = ""
    """Of a list: the prefix."""
    data: bytes = b""
    only_if_absent: bool = False
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.method} {self.key or ' '.join(self.keys)}"


class _Unanswered(BaseException):
    def __init__(self, call: Call) -> None:
        self.call = call


class ActorStore:
    """The store as one actor has it: what was answered is answered again, and then the run ends."""

    uri = "s3://model"

    def __init__(self, answers: Sequence[Any], ask: Callable[[Call], Any] | None = None) -> None:
        self._answers = iter(answers)
        self._ask = ask

    def uri_of(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def get(self, key: str) -> bytes:
        return bytes(self._call(Call("get", key)))

    def put(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        self._call(Call("put", key, data, only_if_absent))

    def head(self, key: str) -> ObjectInfo | None:
        found = self._call(Call("head", key))
        return None if found is None else _info(key, found)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter([_info(key, time) for key, time in self._call(Call("list", prefix))])

    def delete(self, keys: Any) -> None:
        if keys := tuple(keys):
            self._call(Call("delete", keys=keys))

    def uploads(self, prefix: str = "") -> tuple[Any, ...]:
        return ()

    def _call(self, call: Call) -> Any:
        answer = self._ask(call) if self._ask is not None else next(self._answers, _Unanswered)
        if answer is _Unanswered:
            raise _Unanswered(call)
        if isinstance(answer, type) and issubclass(answer, Exception):
            raise answer(call.method, self.uri_of(call.key), "by the model")
        return answer


def _info(key: str, time: int) -> ObjectInfo:
    return ObjectInfo(key, 1, "", _START + timedelta(seconds=time))


Actor = Callable[[ActorStore, Callable[..., None]], None]


@dataclass(frozen=True)
class World:
    """One state."""

    objects: Objects
    answers: tuple[tuple[Any, ...], ...]
    """Of each actor."""
    crashed: frozenset[int] = frozenset()
    in_flight: frozenset[Call] = frozenset()
    """Requests that their client gave up, and that may still land."""
    faults_left: int = 0


@dataclass
class Found:
    """What a search saw."""

    states: int = 0
    steps: int = 0
    ends: int = 0
    """States in which every actor had ended."""
    complete: bool = True
    violation: str = ""
    schedule: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        what = "complete" if self.complete else "cut off"
        text = f"{self.states} states, {self.steps} steps, {self.ends} ends, {what}"
        if self.violation:
            text += f"\n{self.violation}\n  " + "\n  ".join(self.schedule)
        return text


Check = Callable[[World, list[list[Note]], bool], str]
"""World, every actor's notes, whether all have ended → what is violated, or nothing."""


class Explorer:
    """Searches the states that actors on one store can reach."""

    def __init__(
        self,
        actors: Sequence[Actor],
        check: Check,
        *,
        objects: Objects = frozenset(),
        faults: int = 0,
        ignores_conditions: bool = False,
    ) -> None:
        self._actors = actors
        self._check = check
        self._start = World(objects, tuple(() for _ in actors), faults_left=faults)
        self._ignores_conditions = ignores_conditions
        self._runs: dict[tuple[int, tuple[Any, ...]], tuple[list[Note], Call | None]] = {}

    def search(self, most_states: int = sys.maxsize) -> Found:
        """Depth first through all states; ends at the first violation."""
        found = Found()
        start = self._settle(self._start)
        seen = {start}
        stack: list[tuple[World, Any]] = [(start, None)]
        while stack and not found.violation:
            world, path = stack.pop()
            self._look(world, path, found)
            for step, following in self._following(world):
                found.steps += 1
                if following not in seen:
                    seen.add(following)
                    stack.append((following, (step, path)))
            if found.states >= most_states:
                found.complete = not stack
                break
        return found

    def walk(self, seed: int, walks: int) -> Found:
        """Random schedules from the start to their ends, for shapes too large to search."""
        found, chance = Found(complete=False), random.Random(seed)
        for _ in range(walks):
            world, path = self._settle(self._start), None
            while True:
                self._look(world, path, found)
                options = list(self._following(world))
                if found.violation or not options:
                    break
                # Faults are many and calls are few: a fault is drawn where a coin says so.
                faulty = [o for o in options if " ! " in o[0]]
                calm = [o for o in options if " ! " not in o[0]]
                step, world = chance.choice(
                    faulty if faulty and (not calm or chance.random() < 0.1) else calm
                )
                path = (step, path)
                found.steps += 1
            if found.violation:
                break
        return found

    def _look(self, world: World, path: Any, found: Found) -> None:
        found.states += 1
        runs = [self._run(n, world.answers[n]) for n in range(len(self._actors))]
        ended = all(call is None or n in world.crashed for n, (_, call) in enumerate(runs))
        found.ends += ended
        if problem := self._check(world, [notes for notes, _ in runs], ended):
            found.violation, found.complete = problem, False
            while path is not None:
                step, path = path
                found.schedule.insert(0, step)

    def _run(self, actor: int, answers: tuple[Any, ...]) -> tuple[list[Note], Call | None]:
        """The actor's notes so far and its next call; None when it has ended."""
        if (actor, answers) not in self._runs:
            notes: list[Note] = []
            with _deterministic(actor):
                try:
                    self._actors[actor](ActorStore(answers), lambda *note: notes.append(note))
                    call = None
                except _Unanswered as unanswered:
                    call = unanswered.call
            self._runs[actor, answers] = notes, call
        return self._runs[actor, answers]

    def _following(self, world: World) -> Iterator[tuple[str, World]]:
        for request in world.in_flight:
            objects, _ = self._apply(world.objects, request)
            yield (
                f"in flight: {request} lands",
                self._settle(_with(world, objects=objects, in_flight=world.in_flight - {request})),
            )
        for actor in range(len(self._actors)):
            _, call = self._run(actor, world.answers[actor])
            if call is None or actor in world.crashed:
                continue
            for what, following in self._outcomes(world, actor, call):
                yield f"{actor}: {call}{what}", self._settle(following)

    def _outcomes(self, world: World, actor: int, call: Call) -> Iterator[tuple[str, World]]:
        """The call done well, and done with each fault that it may meet."""
        objects, answer = self._apply(world.objects, call)
        yield "", _answered(world, actor, answer, objects=objects)
        if not world.faults_left:
            return
        less = _with(world, faults_left=world.faults_left - 1)
        crashed = _with(less, crashed=world.crashed | {actor})
        yield " ! unavailable", _answered(less, actor, StoreUnavailable)
        yield " ! crash before", crashed
        if call.method == "list":
            for missing in range(1, min(2, len(answer)) + 1):
                newest = sorted(answer, key=lambda found: found[::-1])[-missing:]
                stale = tuple(found for found in answer if found not in newest)
                yield f" ! stale by {missing}", _answered(less, actor, stale)
        if call.method not in ("put", "delete"):
            return
        flying = world.in_flight | {call}
        yield " ! crash after", _with(crashed, objects=objects)
        yield " ! crash, in flight", _with(crashed, in_flight=flying)
        yield " ! given up, applied", _answered(less, actor, StoreUnavailable, objects=objects)
        yield " ! given up, in flight", _answered(less, actor, StoreUnavailable, in_flight=flying)
        if call.only_if_absent:
            # The client repeats it, and the repetition meets what the first one wrote.
            yield " ! answer lost", _answered(less, actor, PreconditionFailed, objects=objects)
        else:
            yield (
                " ! twice, one in flight",
                _answered(less, actor, None, objects=objects, in_flight=flying),
            )
        if len(call.keys) > 1:
            part, _ = self._apply(world.objects, Call("delete", keys=call.keys[:1]))
            yield " ! crash half-way", _with(crashed, objects=part)

    def _settle(self, world: World) -> World:
        """Answer the calls that are no scheduling points."""
        for actor in range(len(self._actors)):
            while actor not in world.crashed:
                _, call = self._run(actor, world.answers[actor])
                if call is None or call.method not in ("get", "head"):
                    break
                _, answer = self._apply(world.objects, call)
                if not call.key.startswith("log/") or answer in (None, NotFound):
                    break
                world = _answered(world, actor, answer)
        return world

    def _apply(self, objects: Objects, call: Call) -> tuple[Objects, Any]:
        return apply(objects, call, ignores_conditions=self._ignores_conditions)


def apply(objects: Objects, call: Call, *, ignores_conditions: bool = False) -> tuple[Objects, Any]:
    """The store after a call, and its answer; an answer that is an exception's class is raised."""
    match call.method:
        case "get" | "head":
            for key, data, time in objects:
                if key == call.key:
                    return objects, data if call.method == "get" else time
            return objects, NotFound if call.method == "get" else None
        case "list":
            found = sorted((k, time) for k, _, time in objects if k.startswith(call.key))
            return objects, tuple(found)
        case "delete":
            return frozenset(o for o in objects if o[0] not in call.keys), None
    held = [o for o in objects if o[0] == call.key]
    if held and call.only_if_absent and not ignores_conditions:
        return objects, PreconditionFailed
    return objects.difference(held) | {(call.key, call.data, _now(objects, call))}, None


def _now(objects: Objects, call: Call) -> int:
    """The server's clock. Times are compared with those of FENCEs only, so it counts those."""
    fences = sum(b'"kind":"FENCE"' in data for key, data, _ in objects if key.startswith("log/"))
    return 2 * fences + (b'"kind":"FENCE"' in call.data)


def directly(objects: Objects, actor: Actor, number: int) -> tuple[Objects, list[Note]]:
    """Run an actor alone and without faults; the store afterwards and its notes."""
    held, notes = [objects], list[Note]()

    def ask(call: Call) -> Any:
        held[0], answer = apply(held[0], call)
        return answer

    with _deterministic(number):
        actor(ActorStore((), ask), lambda *note: notes.append(note))
    return held[0], notes


def _with(world: World, **changes: Any) -> World:
    return World(**(vars(world) | changes))


def _answered(world: World, actor: int, answer: Any, **changes: Any) -> World:
    answers = list(world.answers)
    answers[actor] = (*answers[actor], answer)
    return _with(world, answers=tuple(answers), **changes)


class _Inline:
    """A pool that works when it is asked, so that calls come in one order."""

    def __init__(self, _workers: int) -> None: ...

    def __enter__(self) -> _Inline:
        return self

    def __exit__(self, *_error: object) -> None: ...

    map = staticmethod(map)


@contextmanager
def _deterministic(actor: int) -> Iterator[None]:
    """Nonces by number, and a clock that is wrong by hours, differently in each actor."""
    count = 0

    def nonce() -> uuid.UUID:
        nonlocal count
        count += 1
        return uuid.UUID(int=(actor + 1) * 1000 + count)

    class Clock:
        @staticmethod
        def now(_zone: object) -> datetime:
            return _START + timedelta(hours=(-1) ** actor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_module.uuid, "uuid4", nonce)
        patch.setattr(log_module, "datetime", Clock)
        patch.setattr(log_module, "ThreadPoolExecutor", _Inline)
        patch.setattr(pins_module, "datetime", Clock)
        yield

"""Runs a scenario under faults, and compares its end with that of a calm run."""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from chaos import faults
from chaos.api_proxy import Event, Seen
from chaos.faults import PASS, Script
from chaos.figures import Run
from chaos.operator_bench import OperatorBench, Trouble, World

AT_ONCE = 4
"""Worlds at the same time: most of a case is waiting for pods, leases and the collector."""
DECLARED = re.compile(
    r"^(kubedistill_operator\.cluster\.\w+|aiohttp\.[\w.]+|kopf[\w.]*\.\w+|TimeoutError|"
    r"asyncio\.[\w.]*TimeoutError|Connection\w*Error|OSError)\b"
)
"""The error of a pass, or last line of a traceback, that tells of the API server.

Such a pass is made again, and people have to see that it was the server. NotFound is among them: a
409 that lies says that something is there which is not. Without lies it is none (`errors`, the fuzzer).
"""
_BORNE = frozenset({
    "refused", "event not posted", "the Lease was not renewed", "the Lease was not given back",
})  # fmt: skip
"""Lines that give the API server's words alone."""
RETRIED = re.compile(
    r"^Request attempt #\d+(/\d+)? failed; (TCP closed; )?will re(try|-authenticate): "
)
"""kopf's, of a call that it makes again."""
_OF_LEASE = (
    "the Lease is lost", "the Lease was not renewed", "the Lease was not given back",
    "Error retrieving resource lock", "failed to create lock", "failed to acquire lease",
)  # fmt: skip
"""In lines of those who want the Lease and do not get it."""
CASE_SECONDS = 240.0
_SETTLED_SECONDS = 30.0
_REST_SECONDS = 2.0
State = dict[str, Any]


class Judge:
    """Runs the scenario in a new namespace, and compares its end with the calm one."""

    def __init__(
        self, bench: OperatorBench, scenario: Callable[[Path], list[State]], objects: int
    ) -> None:
        """`objects`: those of ours that there are in the end, the jobs of chains included."""
        self.bench = bench
        self._scenario = scenario
        self._objects = objects
        self._lock = threading.Lock()

    @property
    def calm(self) -> State:
        """The end of a run without faults, made by whoever asks first."""
        with self._lock:
            return self._calm

    @functools.cached_property
    def _calm(self) -> State:
        run = Run("operator-calm", 0, "")
        with self.bench.world("calm") as world:
            world.start()
            world.apply(*self._scenario(world.book))
            self._until_done(run, world, lambda: None, world.start)
            state = _at_rest(world)
            run.violations += troubles(world, errors=False, leaders=False) + ends(run, world)
        if run.violations:
            raise RuntimeError(f"the calm run: {run.violations}")
        return state

    def judge(
        self,
        run: Run,
        script: Script = faults.calm,
        *,
        watch: Callable[[Seen], Event] | None = None,
        each: Callable[[World], None] | None = None,
        errors: bool = False,
        exits: frozenset[int] = frozenset(),
        leaders: bool = False,
        settings: Mapping[str, str] = MappingProxyType({}),
        normal: Callable[[State], State] = lambda state: state,
        made: Callable[[str], int] = lambda name: 1,
        found: Callable[[World], Iterable[str]] = lambda world: (),
    ) -> None:
        """The scenario under a script. `each` is called again and again while it runs.

        `settings` are of its operators. With `errors` the log
        may hold tracebacks that tell of the API server, with `leaders` it may say that the Lease was
        lost; `exits` are the codes with which operators may end. `normal` takes out of
        an end state what the faults honestly add to it, `made` says how often a Job of that name is
        made, `found` says what else is wrong with the end.
        """
        expected = normal(self.calm)
        with self.bench.world(run.family, script, watch) as world:
            begin = partial(world.start, **settings)
            begin()
            world.apply(*self._scenario(world.book))
            self._until_done(run, world, partial(each, world) if each else lambda: None, begin)
            self.bench.proxy.scripts[world.namespace] = faults.calm
            self.bench.proxy.watches.pop(world.namespace, None)
            if not run.violations:
                if not world.lives[-1].process.running:
                    begin()
                self._settled(run, world, expected, normal)
                run.violations += found(world)
                run.violations += [f"left behind: {name}" for name in world.delete()]
            run.violations += world.watched.broken + world.watched.made_too_often(made)
            run.violations += troubles(world, errors=errors, leaders=leaders)
            run.violations += ends(run, world, exits)
            run.lives += len(world.lives)
            run.faults += _met(self.bench, world.namespace)

    def _until_done(
        self, run: Run, world: World, each: Callable[[], None], begin: Callable[[], Any]
    ) -> None:
        deadline = time.monotonic() + CASE_SECONDS
        while not world.done(self._objects):
            if time.monotonic() > deadline:
                run.violations.append(f"stuck after {CASE_SECONDS:.0f} s: {world.story()}")
                return
            each()
            if not world.lives[-1].process.running:
                begin()
            time.sleep(0.05)

    def _settled(
        self, run: Run, world: World, expected: State, normal: Callable[[State], State]
    ) -> None:
        """The last words may come after the success: the end state is waited for, not taken."""
        deadline = time.monotonic() + _SETTLED_SECONDS
        while (state := normal(world.state())) != expected:
            if time.monotonic() > deadline:
                run.wrong += list(differences(expected, state))
                return
            time.sleep(0.2)


def _at_rest(world: World) -> State:
    """A state that is the same a while later: last words may come after the success."""
    before = world.state()
    while True:
        time.sleep(_REST_SECONDS)
        now = world.state()
        if now == before:
            return now
        before = now


def troubles(world: World, *, errors: bool, leaders: bool) -> list[str]:
    """What the operators' logs tell and nothing explains."""

    def explained(trouble: Trouble) -> bool:
        if leaders and any(mark in trouble.message for mark in _OF_LEASE):
            return True
        of_server = trouble.message in _BORNE or DECLARED.match(trouble.error)
        return errors and bool(of_server or RETRIED.match(trouble.message))

    return [f"in the log: {t}"[:400] for t in world.troubles() if not explained(t)]


def ends(run: Run, world: World, exits: frozenset[int] = frozenset()) -> list[str]:
    """Operators that ended by themselves, or in another way than the faults end them."""
    codes = [life.code for life in world.lives]
    run.told["exit codes"] = {str(code): codes.count(code) for code in dict.fromkeys(codes)}
    return [
        f"operator {number} ended with {code}, expected {sorted(exits) or 'that it goes on'}"
        for number, code in enumerate(codes)
        if code is not None and code not in exits
    ]


def _met(bench: OperatorBench, client: str) -> list[str]:
    """The faults that a client met at the proxy."""
    calls = [
        f"{entry.fault} {entry.call.method} {entry.call.path}"
        for entry in bench.proxy.log
        if entry.call.client == client and entry.fault != PASS
    ]
    events = [
        f"{fate} {seen.kind} {seen.path}"
        for seen, fate in bench.proxy.events
        if seen.client == client
    ]
    return calls + events


def differences(expected: Any, found: Any, path: str = "") -> Iterator[str]:
    """A sentence for each field that is another one."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            yield from differences(expected.get(key), found.get(key), f"{path}.{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (wanted, is_there) in enumerate(zip(expected, found, strict=True)):
            yield from differences(wanted, is_there, f"{path}[{index}]")
    elif expected != found:
        yield f"{path}: {json.dumps(found)[:300]}, calm run {json.dumps(expected)[:300]}"

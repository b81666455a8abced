"""Objects of all kinds, given to the real API server while the real operator runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from devcluster.node.api import ApiError
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from operator_kit import job, template

from chaos.figures import Family, Run
from chaos.operator_bench import OperatorBench, World
from chaos.operator_judge import DECLARED
from chaos.schema import edited, edits, spec_schema

_JOBS = "/apis/kubedistill.dev/v1alpha1/namespaces/{}/distillationjobs"
_BATCH = 8
_SECONDS = 60.0
_SAYS_WHY = {
    "SecretNotFound", "DependencyNotFound", "WaitingForDependency", "DependencyCycle",
    "DependencyFailed", "Suspended", "Queued", "Unschedulable", "ManagedElsewhere",
}  # fmt: skip
"""Reasons for not being validated yet that tell the user what is waited for."""


def fuzz_family(bench: OperatorBench, objects: int) -> Family:
    """One run of so many objects."""

    def run_all(run: Run, draw: Any) -> None:
        with bench.world("fuzz") as world:
            world.start()
            _Fuzz(run, world).go(objects, draw.getrandbits(32))
            run.lives += len(world.lives)
            # An object that is deleted while it is looked at ends a pass with a 404.
            run.violations += [
                f"in the log: {last}"[:400]
                for last in world.tracebacks()
                if not DECLARED.match(last)
            ]

    return Family("operator-fuzz", 1, run_all)


class _Fuzz:
    """Makes objects in batches: most of their time is the operator's and the pods'."""

    def __init__(self, run: Run, world: World) -> None:
        self._run = run
        self._world = world
        self._api = world.bench.handle.api
        self._count = 0
        self._path = _JOBS.format(world.namespace)
        pods = template(world.book, STEPS="3", STEP_SECONDS="0.01")
        self._base = job("x", pods)["spec"]
        run.told |= {"accepted": 0, "refused": 0, "edits": 0, "edits refused": 0}

    def go(self, objects: int, number: int) -> None:
        schema = spec_schema()
        one = st.tuples(edits(schema), edits(schema))

        @seed(number)
        @settings(
            max_examples=max(1, objects // _BATCH),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(one, min_size=_BATCH, max_size=_BATCH))
        def batches(batch: list[Any]) -> None:
            self._batch(batch)

        batches()

    def _batch(self, batch: list[Any]) -> None:
        accepted: dict[str, tuple[dict[str, Any], list[Any]]] = {}
        for first, second in batch:
            self._count += 1
            name = f"f{self._count}"
            spec = edited(self._base, first)
            if self._create(name, spec):
                accepted[name] = spec, second
        verdicts = {name: self._verdict(name, parts[0]) for name, parts in accepted.items()}
        for name, (spec, second) in accepted.items():
            self._edit_and_repair(name, spec, second, verdicts[name])
        for name in accepted:
            self._api.delete(f"{self._path}/{name}", {})

    def _create(self, name: str, spec: dict[str, Any]) -> bool:
        self._run.faults.append(name)
        body = job(name) | {"spec": spec}
        try:
            self._api.post(self._path, body)
        except (ApiError, ValueError) as error:
            # A 500 is a mistake in our schema or its rules, whatever was sent.
            if isinstance(error, ApiError) and error.code >= 500:
                self._run.violations.append(f"{error}: {json.dumps(spec)[:500]}")
            self._run.told["refused"] += 1
            return False
        self._run.told["accepted"] += 1
        return True

    def _verdict(self, name: str, spec: dict[str, Any]) -> tuple[str, str]:
        """(status, reason) of what the operator says of an object."""
        found: tuple[str, str] = ("", "")

        def said() -> bool:
            nonlocal found
            status = self._api.get(f"{self._path}/{name}").get("status") or {}
            conditions = {c["type"]: c for c in status.get("conditions") or []}
            validated = conditions.get("Validated", {})
            succeeded = conditions.get("Succeeded", {})
            found = validated.get("status", ""), succeeded.get("reason", "")
            return found[0] in ("True", "False") or found[1] in _SAYS_WHY

        if not _until(said):
            self._run.violations.append(
                f"{name} has no verdict, but {found}: {self._difference(spec)}"
            )
        return found

    def _edit_and_repair(
        self, name: str, spec: dict[str, Any], second: list[Any], before: tuple[str, str]
    ) -> None:
        """After an edit and its repair all is as it was. A started job refuses edits."""
        changed = edited(spec, second)
        self._run.told["edits"] += 1
        if not (self._put(name, changed) and self._put(name, spec)):
            self._run.told["edits refused"] += 1
            return
        # What had begun may have gone on meanwhile: only the verdict must be the same.
        if before[0] in ("True", "False") and not _until(
            lambda: self._validated(name) == before[0]
        ):
            self._run.wrong.append(
                f"{name}: Validated {before[0]} became {self._validated(name)} after an edit and its "
                f"repair: {self._difference(spec)}, edit {json.dumps(second)[:300]}"
            )

    def _validated(self, name: str) -> str:
        status = self._api.get(f"{self._path}/{name}").get("status") or {}
        for condition in status.get("conditions") or []:
            if condition["type"] == "Validated":
                return str(condition["status"])
        return ""

    def _put(self, name: str, spec: dict[str, Any]) -> bool:
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

    def _difference(self, spec: dict[str, Any]) -> str:
        parts = {key: part for key, part in spec.items() if part != self._base.get(key)}
        return json.dumps(parts)[:500]


def _until(said: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _SECONDS
    while not said():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True

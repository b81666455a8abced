"""A control plane, a store, two nodes and an operator for gangs with real ranks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from devcluster.fixtures import temporary_namespace
from e2e.gang import put_inputs
from e2e.kit import Team
from kubedistill_api.names import run_uri
from operator_kit import Operator, install_role

from chaos import reader
from chaos.node_strikes import Striker
from chaos.operator_bench import Watched, children, cluster_below

NAME = "struck"
SECONDS = 400.0
"""Until a job ends. It has to import torch for each of its attempts."""
_TRAINER = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


class GangWorld:
    """A namespace with one job in it."""

    def __init__(self, bench: GangBench, team: Team, watched: Watched) -> None:
        self.bench = bench
        self.team = team
        self.watched = watched
        self.striker = Striker(team.handle, team.namespace)
        self.committed: dict[int, int] = {}
        """Attempt → the newest step whose commit was told of while it ran."""

    def apply(self) -> None:
        self.team.apply(
            self.team.tuned(
                NAME,
                training={"maxSteps": 80},
                stallTimeoutSeconds=15,
                workers={"template": {"spec": {"terminationGracePeriodSeconds": 10}}},
            )
        )

    def until_done(self, each: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """The job's status once it has ended; `each` gets it again and again until then."""
        deadline = time.monotonic() + SECONDS
        while True:
            status = self.team.status(NAME)
            self._note(status)
            self.striker.tick()
            conditions = {c["type"]: c["status"] for c in status.get("conditions") or []}
            if conditions.get("Succeeded") in ("True", "False"):
                return status
            if time.monotonic() > deadline:
                raise TimeoutError(f"stuck: {self.team.story(NAME)}")
            each(status)
            time.sleep(0.1)

    def _note(self, status: dict[str, Any]) -> None:
        attempts = status.get("attempts") or []
        if attempts and not attempts[-1].get("endTime"):
            step = (status.get("checkpoint") or {}).get("step", 0)
            self.committed[attempts[-1]["number"]] = step

    def lost(self, attempts: list[dict[str, Any]]) -> list[str]:
        """Commits that were told of, and that the next attempt did not begin with."""
        return [
            f"attempt {last['number']} had committed step {self.committed.get(last['number'], 0)}, "
            f"and attempt {following['number']} began at {following.get('resumedFromStep', 0)}"
            for last, following in itertools.pairwise(attempts)
            if following.get("resumedFromStep", 0) < self.committed.get(last["number"], 0)
        ]

    def weights(self) -> str:
        """SHA-256 of the exported weights."""
        return hashlib.sha256(self.team.weights(NAME)).hexdigest()

    @property
    def _prefix(self) -> str:
        meta = self.team.get("dj", NAME)["metadata"]
        s3 = self.team.handle.s3
        uri = run_uri(f"s3://{s3.bucket}/runs", self.team.namespace, NAME, meta["uid"])
        return uri.removeprefix(f"s3://{s3.bucket}/")

    def log_problems(self) -> list[str]:
        """What the independent reader finds wrong with the run's log and shards."""
        s3 = self.team.handle.s3
        return list(reader.check(s3.client(), s3.bucket, self._prefix).violations)

    def commits(self) -> int:
        """Commits that were ever made."""
        s3 = self.team.handle.s3
        log = self.team.objects(f"s3://{s3.bucket}/{self._prefix}/log")
        return Counter(json.loads(body).get("kind") for body in log.values())["COMMIT"]

    def delete(self) -> list[str]:
        """Delete the job; what is left of its parts once the collector has had its time."""
        self.team.kubectl("delete", "dj", NAME, "--wait=false")
        deadline = time.monotonic() + 60
        while left := children(self.team.handle.api, self.team.namespace):
            if time.monotonic() > deadline:
                return left
            time.sleep(0.2)
        return []


class GangBench:
    """Use it as a context manager."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self._nodes = nodes
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> GangBench:
        cluster = cluster_below(self.folder, self._nodes)
        self.handle = self._stack.enter_context(cluster)
        put_inputs(self.handle.s3)
        self.operator = Operator(
            install_role(self.handle, self.folder),
            self.folder / "operator.log",
            trainer_env=json.dumps(_TRAINER),
            progress_poll_seconds="0.5",
        )
        self._stack.callback(self.operator.stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def world(self) -> Iterator[GangWorld]:
        """A namespace; what was done to nodes is undone afterwards."""
        with temporary_namespace(self.handle, "gang-node") as namespace:
            watched = Watched(self.handle, namespace)
            try:
                yield GangWorld(self, Team(self.handle, namespace), watched)
            finally:
                watched.stop()
                for node in self.nodes():
                    self.handle.node(node).come_back()

    def nodes(self) -> list[str]:
        return [one["metadata"]["name"] for one in self.handle.api.get("/api/v1/nodes")["items"]]

    @functools.cached_property
    def calm(self) -> str:
        """The weights of a run that nothing happens to."""
        with self.world() as world:
            world.apply()
            status = world.until_done(lambda status: None)
            if len(status["attempts"]) != 1 or world.log_problems():
                raise RuntimeError(f"the calm run: {world.team.story(NAME)}")
            return world.weights()

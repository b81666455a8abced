"""A control plane, a store, two nodes and an operator for gangs with real ranks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

from devcluster.fixtures import temporary_namespace
from e2e.gang import put_inputs
from e2e.kit import Team
from kubedistill_api.names import run_uri
from kubedistill_trainer.checkpoint.log import CommitLog
from kubedistill_trainer.checkpoint.retention import collect
from kubedistill_trainer.store import Store
from operator_kit import Operator, install_role

from chaos import reader
from chaos.node_strikes import Striker
from chaos.operator_bench import Watched, cluster_below
from chaos.operator_state import Space

NAME = "struck"
SECONDS = 400.0
"""Until a job ends. It has to import torch for each of its attempts."""
_TRAINER = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


class GangWorld:
    """A namespace with one job in it."""

    def __init__(self, bench: GangBench, team: Team, watched: Watched) -> None:
        self.bench = bench
        self.team = team
        self.space = Space(team.handle.api, team.namespace)
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

    def log(self) -> dict[str, bytes]:
        """The commit log as it is: name of the slot → record, in order."""
        return dict(sorted(self.team.objects(f"{self._uri}/log").items()))

    def commits(self) -> int:
        """Commits that were ever made."""
        return sum(record["kind"] == "COMMIT" for record in map(json.loads, self.log().values()))

    def log_problems(self) -> list[str]:
        """What the independent reader finds wrong with the run's log and shards.

        Bytes that no commit needs are left for an attempt after the last one where they were not
        older than its FENCE (docs/checkpoints.md): that they go then is seen.
        """
        found = self._check()
        younger = self._younger_than_last_fence()
        if not any(_of_data(sentence) in younger for sentence in found):
            return found
        older = [sentence for sentence in found if _of_data(sentence) not in younger]
        self._collect_later()
        return list(dict.fromkeys([*older, *self._check()]))

    def _check(self) -> list[str]:
        s3 = self.team.handle.s3
        prefix = self._uri.removeprefix(f"s3://{s3.bucket}/")
        return list(reader.check(s3.client(), s3.bucket, prefix, collected=True).violations)

    def _younger_than_last_fence(self) -> set[str]:
        """Prefixes of data that the last attempt's clean-up had to leave alone."""
        store = self._store()
        fences = [slot for slot, body in self.log().items() if json.loads(body)["kind"] == "FENCE"]
        written = {info.key.rpartition("/")[2]: info.last_modified for info in store.list("log/")}
        began = written[fences[-1]]
        return {
            "/".join(info.key.split("/")[:4])
            for info in store.list("data/")
            if info.last_modified >= began
        }

    def _collect_later(self) -> None:
        """What an attempt after the last one does as it begins, in a later second of the store's."""
        # The store counts whole seconds by this machine's clock.
        time.sleep(1.1)
        store, status = self._store(), self.team.status(NAME)
        fence, meta = status["fence"] + 1, self.team.get("dj", NAME)["metadata"]
        run = f"{self.team.namespace}/{NAME}/{meta['uid']}"
        log = CommitLog(store, fence=fence, attempt="after-the-last", run=run)
        log.take_over()
        collect(store, log, fence)

    def _store(self) -> Store:
        s3 = self.team.handle.s3
        keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
        with mock.patch.dict(os.environ, keys):
            return Store(self._uri, endpoint=s3.endpoint)

    @functools.cached_property
    def _uri(self) -> str:
        meta = self.team.get("dj", NAME)["metadata"]
        s3 = self.team.handle.s3
        return run_uri(f"s3://{s3.bucket}/runs", self.team.namespace, NAME, meta["uid"])

    def delete(self) -> list[str]:
        """Delete the job; what is left of its parts once the collector has had its time."""
        self.team.kubectl("delete", "dj", NAME, "--wait=false")
        return self.space.left()


def _of_data(sentence: str) -> str:
    """The prefix of data that a sentence of the reader's says is left; empty for another one."""
    prefix, left, _ = sentence.partition(" is left with ")
    return prefix if left else ""


@dataclass(frozen=True)
class Calm:
    """How a run ends that nothing happens to."""

    weights: str
    state: dict[str, Any]


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
    def calm(self) -> Calm:
        """A run that nothing happens to."""
        with self.world() as world:
            world.apply()
            status = world.until_done(lambda status: None)
            if len(status["attempts"]) != 1 or (found := world.log_problems()):
                raise RuntimeError(f"the calm run: {found} {world.team.story(NAME)}")
            return Calm(world.weights(), world.space.state())

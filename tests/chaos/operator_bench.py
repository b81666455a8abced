"""A control plane, a proxy before it, operators forked from a zygote: a scenario is run and judged."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import Any

from devcluster.cluster import DevCluster
from devcluster.fixtures import temporary_namespace
from devcluster.handle import Handle
from devcluster.zygote import KUBECONFIG, Forked, Zygote
from kubedistill_api import names
from operator_kit import install_role, job, template

from chaos import off_clock
from chaos.api_proxy import ApiProxy, WatchScript
from chaos.faults import Script, calm
from chaos.operator_state import GROUP, Space

TOLERATION_SECONDS = 5
"""From when a node is known to be lost until its pods are given up."""
CHANGING_LEADERS = {"lease_seconds": "6", "lease_renew_seconds": "4"}
"""Settings with which another operator takes over soon."""


def scenario(book: Path) -> list[dict[str, Any]]:
    """A job with a teacher and a gang of two, and a chain of two stages."""
    pods = template(book, STEPS="10", STEP_SECONDS="0.1")
    # A gang that ends before its teacher has the teacher's Job deleted: a race, and not the subject.
    slower = template(book, STEPS="40", STEP_SECONDS="0.1")
    workers = {"nodes": 2, "gpusPerNode": 0, "template": slower}
    shared = job("x", pods, checkpoint={"interval": 5})["spec"]
    shared["teacher"] = {"delivery": "Online"}
    chain = {
        "apiVersion": "kubedistill.dev/v1alpha1",
        "kind": "DistillationChain",
        "metadata": {"name": "two"},
        "spec": {
            "initialTeacher": {"model": {"uri": "s3://models/big"}},
            "template": shared,
            "stages": [{"name": "m"}, {"name": "s"}],
        },
    }
    return [job("one", pods, workers=workers, checkpoint={"interval": 5}), chain]


class Watched:
    """Watches a namespace's Jobs: how often each is made, and that no two gangs run at once."""

    def __init__(self, handle: Handle, namespace: str) -> None:
        self._stop = threading.Event()
        self._uids: dict[str, set[str]] = defaultdict(set)
        self._live: dict[str, dict[str, str]] = defaultdict(dict)
        self.broken: list[str] = []
        path = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        self._thread = threading.Thread(
            target=handle.api.watch, args=(path, self._on_change, self._stop), daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Not awaited: the thread sees it with the next event."""
        self._stop.set()

    def made_too_often(self, allowed: Callable[[str], int]) -> list[str]:
        """A sentence for each Job that was made more often than `allowed` says of its name."""
        return [
            f"Job {name} was made {len(uids)} times"
            for name, uids in self._uids.items()
            if len(uids) > allowed(name)
        ]

    def _on_change(self, kind: str, item: dict[str, Any]) -> None:
        if kind == "SYNC":
            for one in item["items"]:
                self._on_change("ADDED", one)
            return
        meta = item["metadata"]
        name, labels = meta["name"], meta.get("labels") or {}
        self._uids[name].add(meta["uid"])
        if labels.get(names.LABEL_ROLE) != names.ROLE_STUDENT:
            return
        live = self._live[labels[names.LABEL_JOB]]
        # With FailureTarget all of its pods are asked to go, and none is made any more: those of a lost
        # node cannot say that they went, and are waited for so long (docs/restarts.md).
        ended = {c["type"] for c in (item.get("status") or {}).get("conditions") or []}
        if (
            kind == "DELETED"
            or meta.get("deletionTimestamp")
            or ended & {"Complete", "Failed", "FailureTarget"}
        ):
            live.pop(name, None)
        elif name not in live:
            live[name] = meta["uid"]
            if len(live) > 1:
                self.broken.append(f"gangs live at once: {sorted(live)}")


@dataclass
class Life:
    """One operator process."""

    process: Forked
    log: Path

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self.process.poll()

    @property
    def leads(self) -> bool:
        """Whether it has ever led."""
        return '"leading"' in self.log.read_text(errors="replace")


@dataclass(frozen=True)
class Trouble:
    """A line of an operator's log that tells of something that went wrong."""

    message: str
    error: str = ""
    """The last line of its traceback, or what it says of the error; empty where it says nothing."""

    def __str__(self) -> str:
        return f"{self.message}: {self.error}" if self.error else self.message


@dataclass
class World(Space):
    """A namespace with the scenario in it, and the operators that look after it, one after another."""

    bench: OperatorBench
    book: Path
    watched: Watched
    lives: list[Life] = field(default_factory=list)

    def start(self, client: str = "", **settings: str) -> Life:
        """An operator of this namespace alone; `client` is its name at the proxy.

        With `clock_off_seconds` its clock is ahead by so much.
        """
        client = client or self.namespace
        log = self.bench.folder / f"{self.namespace}-{len(self.lives)}.log"
        # The fork makes it a moment later than it may be read here.
        log.touch()
        env = self.bench.environment(client, self.namespace) | {
            f"KUBEDISTILL_{name.upper()}": value for name, value in settings.items()
        }
        module = "chaos.off_clock" if off_clock.SECONDS in env else "kubedistill_operator.main"
        process = self.bench.zygote.fork(module, env=env, log=log, folder=Path(env["HOME"]))
        life = Life(process, log)
        self.lives.append(life)
        return life

    def strike(self, number: Signals) -> None:
        """The newest operator gets a signal."""
        if self.lives:
            self.lives[-1].process.send_signal(number)

    def apply(self, *objects: dict[str, Any]) -> None:
        for one in objects:
            plural = f"{one['kind'].lower()}s"
            self.api.post(f"{GROUP}/namespaces/{self.namespace}/{plural}", one)

    def done(self, objects: int) -> bool:
        """Whether so many objects have succeeded, the chain's jobs and reports included."""
        found = self.objects()
        reported = all(
            stage.get("report") in (None, "", "Written")
            for one in found
            for stage in (one.get("status") or {}).get("stages") or []
        )
        return (
            len(found) == objects and reported and all(_reason(one) == "Completed" for one in found)
        )

    def reasons(self) -> dict[str, str]:
        """Name → reason of Succeeded."""
        return {one["metadata"]["name"]: _reason(one) for one in self.objects()}

    def until(self, what: Callable[[], Any], seconds: float = 120) -> None:
        """TimeoutError with the state of things when it does not come."""
        deadline = time.monotonic() + seconds
        while not what():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s: {self.story()}")
            time.sleep(0.1)

    def story(self) -> str:
        """Why it is not done."""
        states = self.reasons()
        tail = self.lives[-1].log.read_text(errors="replace")[-1500:] if self.lives else ""
        return f"{states}\n{tail}"

    def delete(self) -> list[str]:
        """Delete our objects; what is left of their parts once the collector has had its time."""
        for plural in ("distillationchains", "distillationjobs"):
            self.api.delete(f"{GROUP}/namespaces/{self.namespace}/{plural}", {})
        return self.left()

    def troubles(self) -> list[Trouble]:
        """What the operators' logs tell that went wrong, in the order of their lives."""
        return [trouble for life in self.lives for trouble in _troubles(life.log)]


_SAID_OF_ERRORS = '"error": '
_ERRORS = ('"level": "ERROR"', '"level": "CRITICAL"')


def _troubles(log: Path) -> Iterator[Trouble]:
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("Traceback"):
            yield Trouble(f"{log.name}: a traceback outside of the log")
        elif line.startswith("{") and (_SAID_OF_ERRORS in line or any(e in line for e in _ERRORS)):
            # A line that a kill cut off is none.
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                last = str(told.get("error", "")).strip().splitlines()
                yield Trouble(told["message"], last[-1] if last else "")


def _reason(one: dict[str, Any]) -> str:
    for condition in (one.get("status") or {}).get("conditions") or []:
        if condition["type"] == "Succeeded":
            return str(condition["reason"])
    return ""


def cluster_below(folder: Path, nodes: int) -> DevCluster:
    """One whose containers, which run as other users, find their files below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for parent in (folder, folder.parent):
        parent.chmod(0o755)
    return DevCluster(
        folder / "cluster", nodes=nodes, toleration_seconds=TOLERATION_SECONDS, warm=True
    )


class OperatorBench:
    """Use it as a context manager."""

    def __init__(self, folder: Path, nodes: int = 1) -> None:
        self.folder = folder
        self._nodes = nodes
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> OperatorBench:
        self.cluster = cluster_below(self.folder, self._nodes)
        self.book = self.folder / "book"
        self.book.mkdir(exist_ok=True)
        self.book.chmod(0o777)
        self.handle = self._stack.enter_context(self.cluster)
        account = install_role(self.handle, self.folder)
        authority = self.cluster.control_plane.authority.path
        self.proxy = self._stack.enter_context(
            ApiProxy(self.cluster.control_plane.server, authority)
        )
        self.zygote = self._stack.enter_context(Zygote("operator", self.folder / "zygote.log"))
        self._account = json.dumps(_read_yaml(account))
        self._worlds: dict[str, World] = {}
        self.proxy.signaller = lambda client, number: self._worlds[client].strike(number)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def world(
        self, prefix: str, script: Script = calm, watch: WatchScript | None = None
    ) -> Iterator[World]:
        """A namespace with nothing in it yet; no operator of it is left afterwards."""
        with temporary_namespace(self.handle, prefix) as namespace:
            # One for all, for its path is in the digests of specs; a job's file bears its uid.
            world = World(
                self.handle.api, namespace, self, self.book, Watched(self.handle, namespace)
            )
            self._worlds[namespace] = world
            self.proxy.scripts[namespace] = script
            if watch is not None:
                self.proxy.watches[namespace] = watch
            try:
                yield world
            finally:
                for life in world.lives:
                    life.process.end()
                world.watched.stop()

    def environment(self, client: str, namespace: str) -> dict[str, str]:
        """Of an operator that looks after one namespace, by way of the proxy."""
        config = json.loads(self._account)
        config["clusters"] = [
            {"name": c["name"], "cluster": {"server": self.proxy.endpoint(client)}}
            for c in config["clusters"]
        ]
        home = self.folder / "homes" / client
        home.mkdir(parents=True, exist_ok=True)
        path = home / KUBECONFIG
        path.write_text(json.dumps(config))
        own = {
            "BIND_ADDRESS": "127.0.0.1", "HEALTH_PORT": "0", "NAMESPACE": "kubedistill-system",
            "WATCH_NAMESPACES": namespace, "LEASE_NAME": namespace,
            # As in a pod whose container starts again: its Lease is its own still.
            "IDENTITY": client,
            # The leader changes where that is the subject only, however busy the machine.
            "LEASE_SECONDS": "60", "LEASE_RENEW_SECONDS": "50", "LEASE_RETRY_SECONDS": "1",
            "PROGRESS_POLL_SECONDS": "0.5", "BACKOFF_BASE_SECONDS": "0.5", "RESYNC_SECONDS": "15",
            "TERMINATION_GRACE_SECONDS": "5", "TERMINATION_MARGIN_SECONDS": "10",
            "API_TIMEOUT_SECONDS": "10", "WATCH_INACTIVITY_SECONDS": "20",
        }  # fmt: skip
        return {
            "PATH": "/usr/bin:/bin", "HOME": str(home), "KUBECONFIG": str(path),
            **{f"KUBEDISTILL_{name}": value for name, value in own.items()},
        }  # fmt: skip


def _read_yaml(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text())

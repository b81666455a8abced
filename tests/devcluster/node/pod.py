"""The life of one pod on the node: volumes, init containers, containers, restarts, deletion."""

from __future__ import annotations

import copy
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from devcluster.node.container import Ended, Run
from devcluster.node.environment import ConfigError, Read
from devcluster.node.hooks import pre_stop
from devcluster.node.image import Image, ImageMissing
from devcluster.node.probes import Probes
from devcluster.node.recipe import recipe
from devcluster.node.status import EVICTED, ContainerState, pod_status
from devcluster.node.volumes import Tokens, Volumes
from devcluster.node.warm import Warm

_log = logging.getLogger(__name__)
_TICK_SECONDS = 0.1
_RETRY_SECONDS = 0.5
_BACKOFF_LIMIT_SECONDS = 30.0
_FORGIVEN_AFTER_SECONDS = 60.0
_REFRESH_SECONDS = 30.0
_EVICTION_GRACE_SECONDS = 1.0
Object = dict[str, Any]


@dataclass(frozen=True)
class Surroundings:
    """What a pod needs of its node."""

    read: Read
    tokens: Tokens
    images: Callable[[str], Image]
    """Raises ImageMissing."""
    report: Callable[[Object, Object], None]
    """(pod, status) → the API server."""
    forget: Callable[[Object], None]
    """Removes the object."""
    event: Callable[[Object, str, str, str], None]
    """(pod, Normal or Warning, reason, message) → an Event."""
    service: Mapping[str, str]
    allocatable: Mapping[str, str]
    start_delay: Callable[[], float]
    backoff_seconds: float
    warm: Warm | None


class PodWorker(threading.Thread):
    """Runs one pod from binding to removal."""

    def __init__(self, pod: Object, folder: Path, logs: Path, around: Surroundings) -> None:
        super().__init__(name=f"pod-{pod['metadata']['name']}", daemon=True)
        self.pod = pod
        self.hosts = folder / "hosts"
        self.stop_now = threading.Event()
        self._folder = folder
        self._logs = logs
        self._around = around
        self._volumes = Volumes(folder / "volumes", pod, around.read, around.tokens)
        self._prepared = False
        self._ending = False
        self._refresh_due = time.monotonic() + _REFRESH_SECONDS
        self._sent: Object | None = None
        self._told: set[tuple[str, str]] = set()
        self._verdict: tuple[str, str] | None = None
        self._grace_seconds: float | None = None
        spec = pod["spec"]
        self.policy = str(spec.get("restartPolicy", "Always"))
        self.init_states = [ContainerState(c, True) for c in spec.get("initContainers") or []]
        self.states = [ContainerState(c) for c in spec["containers"]]
        folder.mkdir(parents=True, exist_ok=True)
        self.hosts.touch()

    def run(self) -> None:
        try:
            self._sync()
            self.stop_now.wait(self._around.start_delay())
            if self._prepare() and self._run_init():
                self._run_main()
            self._end()
        except Exception:
            _log.exception("pod worker failed: %s", self.pod["metadata"]["name"])
            self.kill_all(signal.SIGKILL)
            raise

    # What others may ask of it.

    def kill_all(self, number: signal.Signals, container: str | None = None) -> None:
        """Send a signal to everything that runs in the pod, or in one container of it."""
        for state in self._all:
            if state.run is not None and container in (None, state.name):
                state.run.signal(number)

    def evict(self) -> None:
        """As a kubelet whose node is short of memory."""
        self._grace_seconds = _EVICTION_GRACE_SECONDS
        self._verdict = (EVICTED, "The node was low on resource: memory.")

    def is_running(self, container: str) -> bool:
        return any(s.run is not None for s in self._all if s.name == container)

    @property
    def deleting(self) -> bool:
        return bool(self.pod["metadata"].get("deletionTimestamp")) or self.stop_now.is_set()

    @property
    def _all(self) -> list[ContainerState]:
        return [*self.init_states, *self.states]

    # Phases.

    def _prepare(self) -> bool:
        """Volumes; waits for what is missing. False when the pod goes meanwhile."""
        while not self.deleting:
            try:
                self._volumes.prepare()
            except ConfigError as error:
                # The containers only wait: a kubelet says why in an Event.
                self._tell("Warning", "FailedMount", str(error))
                self.stop_now.wait(_RETRY_SECONDS)
            else:
                self._prepared = True
                return True
        return False

    def _run_init(self) -> bool:
        """Init containers and sidecars in order. False when the pod ends here."""
        for number, state in enumerate(self.init_states):
            while not state.initialized:
                if self._over():
                    return False
                for other in self.init_states[: number + 1]:
                    if other.sidecar or other is state:
                        self._step(other)
                if state.done(self.policy) and not state.initialized:
                    return False
                self._sync()
                time.sleep(_TICK_SECONDS)
        return True

    def _run_main(self) -> None:
        """All containers, until they are done for good or the pod is to end."""
        sidecars = [state for state in self.init_states if state.sidecar]
        while not self._over():
            for state in [*sidecars, *self.states]:
                self._step(state)
            if all(state.done(self.policy) for state in self.states):
                return
            self._sync()
            if time.monotonic() > self._refresh_due:
                self._refresh_due = time.monotonic() + _REFRESH_SECONDS
                self._volumes.refresh()
            time.sleep(_TICK_SECONDS)

    def _over(self) -> bool:
        """Whether the pod is to end: deleted, or past its own deadline."""
        limit = self.pod["spec"].get("activeDeadlineSeconds")
        if limit is not None and self._verdict is None:
            begun = datetime.fromisoformat(self.pod["status"]["startTime"])
            if (datetime.now(UTC) - begun).total_seconds() >= limit:
                text = "Pod was active on the node longer than the specified deadline"
                self._verdict = ("DeadlineExceeded", text)
        return self.deleting or self._verdict is not None

    def _step(self, state: ContainerState) -> None:
        """Move one container on: start, probe, take its end, restart."""
        if state.run is None or state.probes is None:
            if not state.done(self.policy) and time.monotonic() >= state.not_before:
                self._start(state)
            return
        state.run.check_memory()
        ended = state.run.ended()
        if ended is not None:
            self._take_end(state, ended)
            return
        state.probes.tick()
        failed = state.probes.failed
        if failed is not None:
            text = f"Container {state.name} failed {failed[0].lower()} probe, will be restarted"
            self._tell("Normal", "Killing", text)
            grace = failed[1]
            if grace is None:
                grace = float(self.pod["spec"].get("terminationGracePeriodSeconds", 30))
            self._terminate([state], lambda: grace)

    def _start(self, state: ContainerState) -> None:
        try:
            image = self._image(state)
            made = recipe(
                self.pod,
                state.spec,
                image,
                volumes=self._volumes,
                read=self._around.read,
                service=self._around.service,
                allocatable=self._around.allocatable,
            )
        except (ConfigError, ImageMissing) as error:
            if isinstance(error, ConfigError):
                state.waiting = ("CreateContainerConfigError", str(error))
                self._tell("Warning", "Failed", f"Error: {error}")
            state.not_before = time.monotonic() + _RETRY_SECONDS
            return
        if state.ended is not None:
            state.restarts += 1
        state.waiting = None
        log = self._logs / f"{state.name}.log"
        if log.exists():
            log.rename(self._logs / f"{state.name}.previous.log")
        group = f"kubedistill-{self.pod['metadata']['uid']}-{state.name}"
        folder = self._folder / "containers" / state.name
        state.run = Run(made, folder, log, self.hosts, group, self._around.warm)
        state.probes = Probes(state.spec, self.pod["status"]["podIP"], state.run.execute)
        self._tell("Normal", "Started", f"Started container {state.name}")

    def _image(self, state: ContainerState) -> Image:
        """The container's image; sets what it waits for and raises ImageMissing without one."""
        name = state.spec["image"]
        try:
            return self._around.images(name)
        except ImageMissing as error:
            reason = ("ErrImagePull", str(error))
            if state.spec.get("imagePullPolicy") == "Never":
                text = f'Container image "{name}" is not present with pull policy of Never'
                reason = ("ErrImageNeverPull", text)
            elif state.waiting is not None and "ImagePull" in state.waiting[0]:
                reason = (
                    "ImagePullBackOff",
                    f'Back-off pulling image "{name}": ErrImagePull: {error}',
                )
            state.waiting = reason
            self._tell("Warning", "Failed", f"Error: {reason[0]}")
            raise

    def _take_end(self, state: ContainerState, ended: Ended) -> None:
        assert state.run is not None
        if time.monotonic() - state.run.started_at > _FORGIVEN_AFTER_SECONDS:
            state.backoff = 0.0
        state.run.remove()
        state.run, state.probes, state.ended = None, None, ended
        if state.done(self.policy) or self._ending or self._over():
            return
        first = self._around.backoff_seconds
        state.backoff = min(_BACKOFF_LIMIT_SECONDS, max(first, state.backoff * 2))
        state.not_before = time.monotonic() + state.backoff
        meta = self.pod["metadata"]
        where = f"{meta['name']}_{meta['namespace']}({meta['uid']})"
        text = f"back-off {state.backoff:g}s restarting failed container={state.name} pod={where}"
        state.waiting = ("CrashLoopBackOff", text)
        self._tell("Warning", "BackOff", f"Back-off restarting failed container {state.name}")

    # The end.

    def _end(self) -> None:
        """Stop what runs, say so, and wait until the object may go."""
        self._ending = True
        for state in self._all:
            if state.run is not None:
                self._tell("Normal", "Killing", f"Stopping container {state.name}")
        begun = time.monotonic()

        def grace() -> float:
            # A second deletion may shorten it.
            given = self.pod["metadata"].get("deletionGracePeriodSeconds")
            if given is None:
                given = self.pod["spec"].get("terminationGracePeriodSeconds", 30)
            if self._grace_seconds is not None:
                given = min(float(given), self._grace_seconds)
            return begun + float(given) - time.monotonic()

        self._terminate([s for s in self.states if s.run is not None], grace)
        for state in reversed(self.init_states):
            if state.run is not None:
                self._terminate([state], lambda: max(grace(), 2.0))
        self._sync(final=True)
        while not self.deleting:
            self.stop_now.wait(_TICK_SECONDS)
        if not self.stop_now.is_set():
            self._around.forget(self.pod)
        self._volumes.remove()

    def _terminate(self, states: list[ContainerState], grace: Callable[[], float]) -> None:
        """preStop, SIGTERM to the main processes, SIGKILL to everything after the grace.

        `grace` says how many seconds are left from the call on.
        """
        begun, first = time.monotonic(), grace()
        hooks = {s.name: pre_stop(s, self.pod["status"]["podIP"], first) for s in states}
        asked: set[str] = set()
        while any(state.run is not None for state in states):
            late = min(begun + first - time.monotonic(), grace()) <= 0 or self.stop_now.is_set()
            for state in states:
                if state.run is None:
                    continue
                state.run.check_memory()
                if (ended := state.run.ended()) is not None:
                    self._take_end(state, ended)
                elif late:
                    state.run.signal(signal.SIGKILL)
                elif state.name not in asked and not hooks[state.name].is_alive():
                    state.run.signal(signal.SIGTERM, main_only=True)
                    asked.add(state.name)
            time.sleep(_TICK_SECONDS / 2)

    def _tell(self, kind: str, reason: str, message: str) -> None:
        """An Event, once for each text: a kubelet counts repeats."""
        if (reason, message) not in self._told:
            self._told.add((reason, message))
            self._around.event(self.pod, kind, reason, message)

    def _sync(self, *, final: bool = False) -> None:
        """Report the status when it changed."""
        status = pod_status(
            self.pod,
            self.init_states,
            self.states,
            sandbox=self._prepared,
            final=final,
            verdict=self._verdict,
        )
        if status != self._sent and not self.stop_now.is_set():
            self._around.report(self.pod, copy.deepcopy(status))
            self._sent = status

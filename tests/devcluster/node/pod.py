"""The life of one pod on the node: volumes, init containers, containers, restarts, deletion."""

from __future__ import annotations

import copy
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from devcluster.node.container import Ended, Recipe, Run
from devcluster.node.environment import ConfigError, Read, arguments, environment, quantity
from devcluster.node.image import Image, ImageMissing, image_of
from devcluster.node.probes import Probe
from devcluster.node.status import ContainerState, pod_status
from devcluster.node.volumes import Tokens, Volumes

_log = logging.getLogger(__name__)
_TICK_SECONDS = 0.1
_RETRY_SECONDS = 1.0
_BACKOFF_SECONDS = 1.0
_BACKOFF_LIMIT_SECONDS = 30.0
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class PodWorker(threading.Thread):
    """Runs one pod from binding to removal.

    `report` sends a status (pod object, status) to the API server; `forget` removes the object.
    """

    def __init__(
        self,
        pod: dict[str, Any],
        folder: Path,
        logs: Path,
        *,
        read: Read,
        tokens: Tokens,
        report: Callable[[dict[str, Any], dict[str, Any]], None],
        forget: Callable[[dict[str, Any]], None],
        base_env: dict[str, str],
        start_delay: Callable[[], float],
    ) -> None:
        super().__init__(name=f"pod-{pod['metadata']['name']}", daemon=True)
        self.pod = pod
        self.hosts = folder / "hosts"
        self.stop_now = threading.Event()
        self._folder = folder
        self._logs = logs
        self._read = read
        self._report = report
        self._forget = forget
        self._base_env = base_env
        self._start_delay = start_delay
        self._volumes = Volumes(folder / "volumes", pod, read, tokens)
        self._sent: dict[str, Any] | None = None
        spec = pod["spec"]
        self.init_states = [ContainerState(c, True) for c in spec.get("initContainers") or []]
        self.states = [ContainerState(c) for c in spec["containers"]]
        folder.mkdir(parents=True, exist_ok=True)
        self.hosts.touch()

    def run(self) -> None:
        try:
            self._sync()
            time.sleep(self._start_delay())
            if self._prepare() and self._run_init():
                self._run_main()
            self._end()
        except Exception:
            _log.exception("pod worker failed: %s", self.pod["metadata"]["name"])
            self.kill_all(signal.SIGKILL)
            raise

    # What others may ask of it.

    def kill_all(self, number: signal.Signals) -> None:
        """Send a signal to everything that runs in the pod."""
        for state in [*self.init_states, *self.states]:
            if state.run is not None:
                state.run.signal(number)

    @property
    def deleting(self) -> bool:
        return bool(self.pod["metadata"].get("deletionTimestamp")) or self.stop_now.is_set()

    # Phases.

    def _prepare(self) -> bool:
        """Images and volumes; waits for what is missing. False when the pod goes meanwhile."""
        while not self.deleting:
            waiting: tuple[str, str] | None = None
            try:
                for state in [*self.init_states, *self.states]:
                    image_of(state.spec["image"])
                self._volumes.prepare()
            except ImageMissing as error:
                waiting = ("ErrImagePull", str(error))
            except ConfigError as error:
                # A kubelet reports a missing volume source as an event and stays here.
                waiting = ("ContainerCreating", f"MountVolume.SetUp failed: {error}")
            if waiting is None:
                return True
            for state in [*self.init_states, *self.states]:
                state.waiting = waiting
            self._sync()
            self.stop_now.wait(_RETRY_SECONDS)
        return False

    def _run_init(self) -> bool:
        """Init containers, one after the other."""
        for state in self.init_states:
            while not self.deleting:
                self._step(state)
                if state.run is None and state.ended is not None:
                    if state.ended.exit_code == 0:
                        break
                    if self.pod["spec"].get("restartPolicy") == "Never":
                        return False
                self._sync()
                time.sleep(_TICK_SECONDS)
            else:
                return False
        return True

    def _run_main(self) -> None:
        """All containers, until they are done for good or the pod is deleted."""
        while not self.deleting:
            for state in self.states:
                self._step(state)
            self._sync()
            if all(
                state.done(self.pod["spec"].get("restartPolicy", "Always")) for state in self.states
            ):
                return
            time.sleep(_TICK_SECONDS)

    def _step(self, state: ContainerState) -> None:
        """Move one container on: start, probe, take its end, restart."""
        if state.run is None:
            if not state.done(self._restart_policy(state)) and time.monotonic() >= state.not_before:
                self._start_container(state)
            return
        state.run.check_memory()
        ended = state.run.ended()
        if ended is not None:
            self._take_end(state, ended)
            return
        for probe in state.probes.values():
            probe.tick()
        liveness = state.probes.get("liveness")
        if liveness is not None and liveness.failed:
            _log.info("liveness failed: %s", state.name)
            self._terminate(
                [state], float(self.pod["spec"].get("terminationGracePeriodSeconds", 30))
            )

    def _restart_policy(self, state: ContainerState) -> str:
        policy = str(self.pod["spec"].get("restartPolicy", "Always"))
        return "OnFailure" if state.init and policy == "Always" else policy

    def _take_end(self, state: ContainerState, ended: Ended) -> None:
        assert state.run is not None
        lived = time.monotonic() - state.run.started_at
        state.run.remove()
        state.run, state.ended, state.probes = None, ended, {}
        if lived > 60:
            state.backoff = 0.0
        state.backoff = min(_BACKOFF_LIMIT_SECONDS, max(_BACKOFF_SECONDS, state.backoff * 2))
        state.not_before = time.monotonic() + state.backoff

    def _start_container(self, state: ContainerState) -> None:
        try:
            recipe = self._recipe(state.spec, image_of(state.spec["image"]))
        except (ConfigError, ImageMissing) as error:
            reason = (
                "CreateContainerConfigError" if isinstance(error, ConfigError) else "ErrImagePull"
            )
            state.waiting = (reason, str(error))
            state.not_before = time.monotonic() + _RETRY_SECONDS
            return
        if state.ended is not None:
            state.restarts += 1
        state.waiting = None
        state.run = Run(
            recipe,
            self._folder / "containers" / state.name,
            self._logs / f"{state.name}.log",
            self.hosts,
        )
        ports = {
            p["name"]: p["containerPort"] for p in state.spec.get("ports") or [] if "name" in p
        }
        address = self.pod["status"]["podIP"]
        state.probes = {
            kind: Probe(state.spec[f"{kind}Probe"], address, ports)
            for kind in ("startup", "readiness", "liveness")
            if f"{kind}Probe" in state.spec
        }

    def _recipe(self, spec: dict[str, Any], image: Image) -> Recipe:
        security = {
            **(self.pod["spec"].get("securityContext") or {}),
            **(spec.get("securityContext") or {}),
        }
        base = {
            "PATH": f"{Path(sys.executable).parent}:{_SYSTEM_PATH}",
            "HOSTNAME": self.pod["spec"].get("hostname") or self.pod["metadata"]["name"],
            "HOME": "/tmp",
        }
        # The image's own PATH names places that are in the image only.
        of_image = {key: value for key, value in image.env.items() if key != "PATH"}
        env = environment(spec, self.pod, {**base, **of_image, **self._base_env}, self._read)
        user = int(security.get("runAsUser", image.user))
        if security.get("runAsNonRoot") and user == 0:
            raise ConfigError("container has runAsNonRoot and image will run as root")
        group = int(security.get("runAsGroup", image.group))
        limit = ((spec.get("resources") or {}).get("limits") or {}).get("memory")
        return Recipe(
            name=spec["name"],
            command=arguments(spec, image.entrypoint, image.command, env),
            env=env,
            mounts=self._volumes.mounts(spec),
            workdir=spec.get("workingDir") or image.workdir,
            user=user,
            group=group,
            groups=[int(security["fsGroup"])] if "fsGroup" in security else [],
            read_only_root=bool(security.get("readOnlyRootFilesystem")),
            termination_path=spec.get("terminationMessagePath") or "/dev/termination-log",
            log_as_message=spec.get("terminationMessagePolicy") == "FallbackToLogsOnError",
            memory_limit_bytes=quantity(limit) if limit else None,
        )

    # The end.

    def _end(self) -> None:
        """Stop what runs, say so, and wait until the object may go."""
        running = [s for s in [*self.init_states, *self.states] if s.run is not None]
        grace = self.pod["metadata"].get("deletionGracePeriodSeconds")
        if grace is None:
            grace = self.pod["spec"].get("terminationGracePeriodSeconds", 30)
        self._terminate(running, float(grace))
        self._sync(final=True)
        while not self.deleting:
            self.stop_now.wait(0.2)
        if not self.stop_now.is_set():
            self._sync(final=True)
            self._forget(self.pod)
        self._volumes.remove()

    def _terminate(self, states: list[ContainerState], grace: float) -> None:
        """SIGTERM to the main processes, then SIGKILL to everything when the grace is over."""
        for state in states:
            if state.run is not None:
                state.run.signal(signal.SIGTERM, main_only=True)
        deadline = time.monotonic() + grace
        while any(state.run is not None for state in states):
            for state in states:
                if state.run is not None and (ended := state.run.ended()) is not None:
                    self._take_end(state, ended)
                elif state.run is not None and (
                    time.monotonic() > deadline or self.stop_now.is_set()
                ):
                    state.run.signal(signal.SIGKILL)
            time.sleep(0.05)

    def _sync(self, *, final: bool = False) -> None:
        """Report the status when it changed."""
        status = pod_status(self.pod, self.init_states, self.states, final=final)
        if status != self._sent and not self.stop_now.is_set():
            self._report(self.pod, copy.deepcopy(status))
            self._sent = status

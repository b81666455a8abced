"""One container: a process in namespaces of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from devcluster.node import sandbox
from devcluster.node.image import PROJECT
from devcluster.node.limits import MemoryLimit
from devcluster.node.volumes import Mount
from devcluster.node.warm import Warm, module_of
from devcluster.zygote import Forked, Zygote

TERMINATION_BYTES = 4096
_FALLBACK_BYTES = 2048
_FALLBACK_LINES = 80


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Recipe:
    """All that a container's process is made from."""

    name: str
    command: list[str]
    env: dict[str, str]
    mounts: list[Mount]
    workdir: str
    user: int
    group: int
    groups: list[int]
    read_only_root: bool
    termination_path: str
    log_as_message: bool
    hostname: str = "localhost"
    passwd: str = ""
    memory_limit_bytes: float | None = None


@dataclass(frozen=True)
class Ended:
    """How a run of a container ended."""

    exit_code: int
    reason: str
    message: str
    started: str
    finished: str = field(default_factory=now)


def _start(spec: Path, log: Path, zygote: Zygote | None) -> subprocess.Popen[bytes] | Forked:
    """The process that makes the container and says how it ended."""
    with log.open("wb") as output:
        if zygote is not None:
            return zygote.fork(sandbox.__name__, str(spec), env=os.environ, log=log)
        return subprocess.Popen(
            [sys.executable, "-S", "-E", sandbox.__file__, str(spec)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class Run:
    """One run of a container. A restart makes a new one."""

    def __init__(
        self, recipe: Recipe, folder: Path, log: Path, hosts: Path, group: str, warm: Warm | None
    ) -> None:
        """Start it in `folder`, which it owns. `group` names its cgroup on this machine."""
        self.recipe = recipe
        self.started = now()
        self.started_at = time.monotonic()
        self._folder = folder
        self._log = log
        self._out_of_memory = False
        self._limit: MemoryLimit | None = None
        if recipe.memory_limit_bytes is not None:
            self._limit = MemoryLimit(group, recipe.memory_limit_bytes)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._message = folder / "termination-message"
        self._message.touch()
        self._message.chmod(0o666)
        module = module_of(recipe.command, recipe.env, recipe.memory_limit_bytes)
        zygote = warm.zygote(recipe.env) if warm and module else None
        spec = folder / "sandbox.json"
        spec.write_text(json.dumps(self._sandbox(hosts) | {"module": zygote and module}))
        log.parent.mkdir(parents=True, exist_ok=True)
        self._process = _start(spec, log, zygote)

    def _sandbox(self, hosts: Path) -> dict[str, Any]:
        recipe = self.recipe
        mounts = [
            *recipe.mounts,
            Mount(str(self._message), recipe.termination_path),
            Mount(str(hosts), "/etc/hosts", read_only=True),
        ]
        taken = ("command", "env", "workdir", "user", "group", "groups", "hostname", "passwd")
        return {
            **{name: getattr(recipe, name) for name in taken},
            "folder": str(self._folder),
            "mounts": [asdict(mount) for mount in mounts],
            "read_only_root": recipe.read_only_root,
            "cgroups": self._limit.groups if self._limit is not None else [],
            "in_user_namespace": os.geteuid() != 0,
            "reachable": [str(PROJECT), sys.prefix, os.path.realpath(sys.base_prefix)],
        }

    @property
    def main_pid(self) -> int | None:
        """The container's PID 1, in the host's numbers; None until it is there."""
        with contextlib.suppress(OSError, ValueError):
            return int((self._folder / "pid").read_text())
        return None

    def signal(self, number: signal.Signals, *, main_only: bool = False) -> None:
        """To the main process alone (as a kubelet's SIGTERM), or to all of the container's."""
        main = self.main_pid
        if self._process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if main is None:
                self._process.send_signal(number)
            elif main_only or number == signal.SIGKILL:
                # All others of its PID namespace go with it.
                os.kill(main, number)
            else:
                process = psutil.Process(main)
                for member in [process, *process.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        member.send_signal(number)

    def execute(self, command: list[str], timeout_seconds: float) -> int:
        """Run a command inside, as its user; the exit code, 124 when it took too long."""
        main = self.main_pid
        if main is None:
            return 126
        who = ["--setuid", str(self.recipe.user), "--setgid", str(self.recipe.group)]
        if os.geteuid() != 0:
            who = ["--user", "--preserve-credentials"]
        inside = ["nsenter", "--target", str(main), "--mount", "--pid", "--uts", "--root", "--wd"]
        try:
            return subprocess.run(
                [*inside, *who, "--", *command],
                env=self.recipe.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=timeout_seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return 124
        except OSError:
            return 126

    def check_memory(self) -> None:
        """SIGKILL what went over its limit, as a whole."""
        if self._limit is not None and not self._out_of_memory:
            self._out_of_memory = self._limit.exceeded(self.main_pid)
            if self._out_of_memory:
                self.signal(signal.SIGKILL)

    def ended(self) -> Ended | None:
        """How it ended, or None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        self.check_memory()
        exit_code = 128 - code if code < 0 else code
        failure = self._text("failure")
        if failure:
            message = f"failed to create containerd task: {failure}"
            return Ended(sandbox.CANNOT_START, "StartError", message, self.started)
        reason = "Completed" if exit_code == 0 else "Error"
        if self._out_of_memory:
            exit_code, reason = 128 + signal.SIGKILL, "OOMKilled"
        return Ended(exit_code, reason, self._termination_message(exit_code), self.started)

    def _text(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return (self._folder / name).read_text(errors="replace")
        return ""

    def _termination_message(self, exit_code: int) -> str:
        text = self._message.read_bytes()[:TERMINATION_BYTES].decode(errors="replace")
        if not text and exit_code != 0 and self.recipe.log_as_message:
            content = self._log.read_bytes()[-_FALLBACK_BYTES:].decode(errors="replace")
            text = "".join(content.splitlines(keepends=True)[-_FALLBACK_LINES:])
        return text

    def remove(self) -> None:
        """Delete its folder and its cgroup."""
        if self._limit is not None:
            self._limit.remove()
        shutil.rmtree(self._folder, ignore_errors=True)

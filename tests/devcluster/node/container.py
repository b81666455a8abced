"""One container: a process in a mount namespace and session of its own."""

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
from devcluster.node.volumes import Mount
from devcluster.process import die_with_parent

TERMINATION_BYTES = 4096
_OOM_POLL_SECONDS = 0.5


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
    memory_limit_bytes: float | None = None


@dataclass
class Ended:
    """How a run of a container ended."""

    exit_code: int
    reason: str
    message: str
    started: str
    finished: str = field(default_factory=now)


class Run:
    """One run of a container. A restart makes a new one."""

    def __init__(self, recipe: Recipe, folder: Path, log: Path, hosts: Path) -> None:
        self.recipe = recipe
        self.started = now()
        self.started_at = time.monotonic()
        self._folder = folder
        self._log = log
        self._out_of_memory = False
        self._checked_at = 0.0
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._message = folder / "termination-message"
        self._message.touch()
        self._message.chmod(0o666)
        spec = self._folder / "sandbox.json"
        spec.write_text(json.dumps(self._sandbox(hosts)))
        unshare = ["unshare", "--mount"]
        if os.geteuid() != 0:
            unshare = ["unshare", "--user", "--map-root-user", "--mount"]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*unshare, "--", sys.executable, "-S", "-E", sandbox.__file__, str(spec)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _sandbox(self, hosts: Path) -> dict[str, Any]:
        recipe = self.recipe
        mounts = [
            *recipe.mounts,
            Mount(str(self._message), recipe.termination_path),
            Mount(str(hosts), "/etc/hosts", read_only=True),
        ]
        return {
            "folder": str(self._folder),
            "command": recipe.command,
            "env": recipe.env,
            "workdir": recipe.workdir,
            "mounts": [asdict(mount) for mount in mounts],
            "own_tmp": any(mount.target == "/tmp" for mount in mounts) or recipe.read_only_root,
            "read_only_root": recipe.read_only_root,
            "user": recipe.user,
            "group": recipe.group,
            "groups": recipe.groups,
            "in_user_namespace": os.geteuid() != 0,
            "reachable": [str(PROJECT), sys.prefix, os.path.realpath(sys.base_prefix)],
        }

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals, *, main_only: bool = False) -> None:
        """To the main process alone (as a kubelet's SIGTERM), or to all of the session."""
        with contextlib.suppress(ProcessLookupError):
            if main_only:
                os.kill(self._process.pid, number)
            else:
                os.killpg(self._process.pid, number)

    def check_memory(self) -> None:
        """SIGKILL what is over its limit: here without cgroups, by looking now and then."""
        limit = self.recipe.memory_limit_bytes
        if limit is None or time.monotonic() - self._checked_at < _OOM_POLL_SECONDS:
            return
        self._checked_at = time.monotonic()
        used = 0
        with contextlib.suppress(psutil.Error):
            main = psutil.Process(self._process.pid)
            for process in [main, *main.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    used += process.memory_info().rss - process.memory_info().shared
        if used > limit:
            self._out_of_memory = True
            self.signal(signal.SIGKILL)

    def ended(self) -> Ended | None:
        """How it ended, or None while it runs; whatever it left behind is killed."""
        code = self._process.poll()
        if code is None:
            return None
        self.signal(signal.SIGKILL)
        exit_code = 128 - code if code < 0 else code
        reason = "Completed" if exit_code == 0 else "Error"
        if self._out_of_memory:
            reason = "OOMKilled"
        return Ended(exit_code, reason, self._termination_message(exit_code), self.started)

    def _termination_message(self, exit_code: int) -> str:
        text = self._message.read_bytes()[:TERMINATION_BYTES].decode(errors="replace")
        if not text and exit_code != 0 and self.recipe.log_as_message:
            lines = self._log.read_bytes()[-2048:].decode(errors="replace").splitlines()
            text = "\n".join(lines[-80:])
        return text

    def remove(self) -> None:
        """Delete its overlay."""
        shutil.rmtree(self._folder, ignore_errors=True)

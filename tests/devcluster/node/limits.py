"""A container's memory limit: by a cgroup where this machine lets us, else by looking on."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

import psutil

_log = logging.getLogger(__name__)
_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_LOOK_SECONDS = 0.5


class MemoryLimit:
    """The limit of one run of a container.

    `groups` are the files through which its process joins; empty when only looking on.
    """

    def __init__(self, name: str, limit_bytes: float) -> None:
        self._limit = limit_bytes
        self._folder = _make_v1(name, limit_bytes) or _make_v2(name, limit_bytes)
        self._due = 0.0

    @property
    def groups(self) -> list[str]:
        return [] if self._folder is None else [str(self._folder / "cgroup.procs")]

    def exceeded(self, pid: int | None) -> bool:
        """Whether the container of main process `pid` went over: kill all of it then.

        The kernel kills one process only; a kubelet's container goes as a whole.
        """
        if self._folder is None:
            return pid is not None and self._used(pid) > self._limit
        for name in ("memory.oom_control", "memory.events"):
            with contextlib.suppress(OSError):
                for line in (self._folder / name).read_text().splitlines():
                    key, _, count = line.partition(" ")
                    if key == "oom_kill" and int(count) > 0:
                        return True
        return False

    def _used(self, pid: int) -> float:
        if time.monotonic() < self._due:
            return 0.0
        self._due = time.monotonic() + _LOOK_SECONDS
        used = 0.0
        with contextlib.suppress(psutil.Error):
            main = psutil.Process(pid)
            for process in [main, *main.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    memory = process.memory_info()
                    used += memory.rss - memory.shared
        return used

    def remove(self) -> None:
        """Delete the cgroup; its processes have ended, but the kernel may need a moment."""
        if self._folder is None:
            return
        for _ in range(20):
            with contextlib.suppress(OSError):
                self._folder.rmdir()
                return
            if not self._folder.exists():
                return
            time.sleep(0.05)
        _log.warning("left behind: %s", self._folder)


def _make_v1(name: str, limit_bytes: float) -> Path | None:
    if not (_V1 / "memory.limit_in_bytes").exists():
        return None
    return _make(_V1 / name, {"memory.limit_in_bytes": limit_bytes})


def _make_v2(name: str, limit_bytes: float) -> Path | None:
    if not (_V2 / "cgroup.subtree_control").exists():
        return None
    with contextlib.suppress(OSError):
        (_V2 / "cgroup.subtree_control").write_text("+memory")
    return _make(_V2 / name, {"memory.max": limit_bytes, "memory.oom.group": 1})


def _make(folder: Path, values: dict[str, float]) -> Path | None:
    try:
        folder.mkdir(exist_ok=True)
        for file, value in values.items():
            (folder / file).write_text(str(int(value)))
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        return None
    return folder


def remove_stale(prefix: str) -> None:
    """Delete the empty cgroups whose name begins so."""
    for base in (_V1, _V2):
        for folder in base.glob(f"{prefix}-*"):
            with contextlib.suppress(OSError):
                folder.rmdir()

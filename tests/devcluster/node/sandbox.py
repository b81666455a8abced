"""Entry of a container's process: builds its file system and becomes its command.

`python -S sandbox.py SPEC.json` — run in a new mount namespace (`unshare --mount`). An overlay on
the host's root gives the container a root of its own: what it writes is its own, and a read-only
root is really read-only. Only the standard library is used: no environment is set up yet.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2); OSError names the target."""
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None
    )
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} on {target}: {os.strerror(number)}")


def place(root: str, path: str, is_folder: bool) -> str:
    """Make the place in the new root where something will be mounted."""
    target = root + path
    if is_folder:
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if not os.path.exists(target):
            with open(target, "w"):
                pass
    return target


def build_root(spec: dict) -> str:  # type: ignore[type-arg]
    """The container's root: overlay, /dev, /proc, mounts of the pod."""
    root, upper, work = (os.path.join(spec["folder"], n) for n in ("root", "upper", "work"))
    for folder in (root, upper, work):
        os.makedirs(folder, exist_ok=True)
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    mount("overlay", root, "overlay", data=f"lowerdir=/,upperdir={upper},workdir={work}")
    for path in spec["reachable"]:
        open_up(root, path)
    mount("tmpfs", place(root, "/dev", True), "tmpfs", data="mode=755")
    for device in ("null", "zero", "full", "random", "urandom", "tty"):
        mount(f"/dev/{device}", place(root, f"/dev/{device}", False), flags=MS_BIND)
    os.symlink("/proc/self/fd", root + "/dev/fd")
    mount("tmpfs", place(root, "/dev/shm", True), "tmpfs", data="mode=1777,size=64m")
    mount("/proc", place(root, "/proc", True), flags=MS_BIND | MS_REC)
    mount("/sys", place(root, "/sys", True), flags=MS_BIND | MS_REC)
    place(root, spec["workdir"], True)
    os.chmod(root + spec["workdir"], 0o777)
    if not spec["own_tmp"]:
        # The host's /tmp is nobody's business.
        mount("tmpfs", place(root, "/tmp", True), "tmpfs", data="mode=1777")
    for entry in sorted(spec["mounts"], key=lambda m: m["target"].count("/")):
        target = place(root, entry["target"], os.path.isdir(entry["source"]))
        mount(entry["source"], target, flags=MS_BIND)
        if entry["read_only"]:
            mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
    if spec["read_only_root"]:
        mount("none", root, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
    return root


def open_up(root: str, path: str) -> None:
    """Let any user pass to `path`: in the overlay, not on the host."""
    parts = path.strip("/").split("/")
    for depth in range(1, len(parts) + 1):
        folder = root + "/" + "/".join(parts[:depth])
        mode = os.stat(folder).st_mode
        if mode & 0o055 != 0o055 and os.path.isdir(folder):
            os.chmod(folder, mode | 0o055)


def main() -> None:
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    root = build_root(spec)
    os.chroot(root)
    os.chdir(spec["workdir"])
    if not spec["in_user_namespace"]:
        os.setgroups(spec["groups"])
        os.setgid(spec["group"])
        os.setuid(spec["user"])
    # No new privileges, as allowPrivilegeEscalation: false asks.
    _libc.prctl(38, 1, 0, 0, 0)
    os.execvpe(spec["command"][0], spec["command"], spec["env"])


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        sys.stderr.write(f"exec: {error}\n")
        os._exit(127)
    except OSError as error:
        sys.stderr.write(f"sandbox: {error}\n")
        os._exit(128)

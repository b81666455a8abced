"""Entry of a container's process: builds its file system and becomes its command.

`python -S -E sandbox.py SPEC.json`. The process that is started stays outside and reports how the
container ended; its child is PID 1 of new mount, PID and UTS namespaces. An overlay on the host's
root gives the container a root of its own: what it writes is its own, and a read-only root is
really read-only. As PID 1 it gets only the signals that it handles, as in a real container, and
all of its processes end with it. Only the standard library: no environment is set up yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x4000000, 0x10000000, 0x20000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CANNOT_START = 128
NICENESS = 5
"""What a node reserves for its system: under many busy containers the control plane, the node and its
probes still get their turn at once."""
_MOST_LINKS = 40
_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """OSError naming `what` when a call of libc failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(
    source: str | Path, target: str | Path, kind: str = "", flags: int = 0, data: str = ""
) -> None:
    """mount(2); OSError names the target."""
    texts = [str(source), str(target), kind, data]
    first, second, third, fourth = (text.encode() or None for text in texts)
    check(_libc.mount(first, second, third, flags, fourth), f"mount {source} on {target}")


def die_with_parent() -> None:
    """SIGKILL when the parent ends. A change of user clears it: ask again after one."""
    check(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def inside(root: Path, path: str | Path) -> Path:
    """Where `path` lies below `root`, with links followed as if `root` were /.

    The system's own resolution would follow /var/run → /run out to the host.
    """
    rest = [part for part in str(path).split("/") if part not in ("", ".")]
    found, links = root, 0
    while rest:
        part = rest.pop(0)
        if part == "..":
            found = found if found == root else found.parent
            continue
        if not (found / part).is_symlink():
            found /= part
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, f"too many links in {path}")
        target = os.readlink(found / part)  # noqa: PTH115
        if target.startswith("/"):
            found = root
        rest = [name for name in target.split("/") if name not in ("", ".")] + rest
    return found


def place(root: Path, path: str | Path, *, folder: bool) -> Path:
    """Make the place in the new root where something will be mounted."""
    target = inside(root, path)
    if folder:
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.touch()
    return target


def enter_namespaces(in_user_namespace: bool) -> None:
    """Leave the host's; an ordinary user becomes root of a user namespace of its own."""
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS
    user, group = os.geteuid(), os.getegid()
    if not in_user_namespace:
        check(_libc.unshare(flags), "unshare (the node needs root or user namespaces)")
        return
    check(
        _libc.unshare(flags | CLONE_NEWUSER),
        "unshare: this machine lets ordinary users make no namespaces; run the node as root",
    )
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def mount_overlay(spec: dict[str, Any]) -> Path:
    """The host's root with a writable layer on top, on disk or, where that fails, in memory."""
    base = Path(spec["folder"])
    root = place(base, "root", folder=True)
    extra = ",userxattr" if spec["in_user_namespace"] else ""

    def overlay(layer: Path) -> None:
        upper, work = (place(layer, name, folder=True) for name in ("upper", "work"))
        upper.chmod(0o755)
        data = f"lowerdir=/,upperdir={upper},workdir={work}{extra}"
        mount("overlay", root, "overlay", data=data)

    try:
        overlay(base)
    except OSError:
        # An overlay cannot lie on another one, as in a container of a CI system.
        memory = place(base, "memory", folder=True)
        mount("tmpfs", memory, "tmpfs", data="mode=755")
        overlay(memory)
    return root


def build_root(spec: dict[str, Any]) -> Path:
    """The container's root: overlay, /dev, /proc, mounts of the pod."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    root = mount_overlay(spec)
    for path in spec["reachable"]:
        open_up(root, Path(path))
    mount("tmpfs", place(root, "/dev", folder=True), "tmpfs", data="mode=755")
    for device in ("null", "zero", "full", "random", "urandom", "tty"):
        target = place(root, f"/dev/{device}", folder=False)
        mount(f"/dev/{device}", target, flags=MS_BIND)
    links = {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}
    for name, end in links.items():
        (root / "dev" / name).symlink_to(f"/proc/self/fd{end}")
    mount("tmpfs", place(root, "/dev/shm", folder=True), "tmpfs", data="mode=1777,size=64m")
    try:
        mount("proc", place(root, "/proc", folder=True), "proc")
    except OSError:
        mount("/proc", inside(root, "/proc"), flags=MS_BIND | MS_REC)
    mount("/sys", place(root, "/sys", folder=True), flags=MS_BIND | MS_REC)
    place(root, spec["workdir"], folder=True)
    know_user(root, spec["passwd"], spec["user"])
    mount_all(root, spec)
    return root


def mount_all(root: Path, spec: dict[str, Any]) -> None:
    """/tmp, the pod's volumes, what of the image they hide, and at last the read-only root."""
    read_only = []
    targets = [entry["target"].rstrip("/") for entry in spec["mounts"]]
    hidden = hold(root, spec, hidden_by(["/tmp", *targets], spec["reachable"]))
    if "/tmp" not in targets:
        # The host's /tmp is nobody's business.
        target = place(root, "/tmp", folder=True)
        mount("tmpfs", target, "tmpfs", data="mode=1777")
        read_only += [target] * spec["read_only_root"]
    for entry in sorted(spec["mounts"], key=lambda m: m["target"].count("/")):
        target = place(root, entry["target"], folder=Path(entry["source"]).is_dir())
        mount(entry["source"], target, flags=MS_BIND)
        read_only += [target] * entry["read_only"]
    for path, held in hidden.items():
        target = place(root, path, folder=True)
        mount(held, target, flags=MS_BIND | MS_REC)
        read_only += [target] * spec["read_only_root"]
    read_only += [root] * spec["read_only_root"]
    for target in read_only:
        mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def hidden_by(targets: list[str], paths: list[str]) -> list[str]:
    """Those of the paths that are at or below a mount point."""
    return [
        path
        for path in paths
        if any(Path(path).is_relative_to(target or "/") for target in targets)
    ]


def hold(root: Path, spec: dict[str, Any], paths: list[str]) -> dict[str, Path]:
    """Keep hold of folders that stand for the image, such as a clone below /tmp, before a mount
    covers them; path → where it is held."""
    held = {}
    for number, path in enumerate(paths):
        held[path] = place(Path(spec["folder"]), f"held-{number}", folder=True)
        mount(inside(root, path), held[path], flags=MS_BIND | MS_REC)
    return held


def know_user(root: Path, entry: str, user: int) -> None:
    """Add the image's user to the container's /etc/passwd: libraries ask for its name."""
    passwd = inside(root, "/etc/passwd")
    text = passwd.read_text()
    if entry and f":x:{user}:" not in text:
        passwd.write_text(text + entry + "\n")


def open_up(root: Path, path: Path) -> None:
    """Let any user pass to `path`: in the overlay, not on the host."""
    if path.stat().st_dev != Path("/").stat().st_dev:
        # The overlay shows one file system of the host only.
        mount(path, place(root, path, folder=path.is_dir()), flags=MS_BIND | MS_REC)
    for folder in [*reversed(path.parents), path]:
        within = inside(root, folder)
        mode = within.stat().st_mode
        if mode & 0o055 != 0o055 and within.is_dir():
            with contextlib.suppress(OSError):
                within.chmod(mode | 0o055)


def become_user(spec: dict[str, Any]) -> None:
    """The container's user, and no way to gain privileges from it."""
    if not spec["in_user_namespace"]:
        os.setgroups(spec["groups"])
        os.setgid(spec["group"])
        os.setuid(spec["user"])
    check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    die_with_parent()


def contain(spec: dict[str, Any], failure: int) -> None:
    """In the child: become the container. Returns only by an exception."""
    die_with_parent()
    for group in spec["cgroups"]:
        Path(group).write_text("0")
    root = build_root(spec)
    with contextlib.suppress(OSError):
        socket.sethostname(spec["hostname"])
    os.chroot(root)
    os.chdir(spec["workdir"])
    become_user(spec)
    os.nice(NICENESS)
    command = spec["command"]
    if spec["module"]:
        # This process is a fork of one that has imported it.
        from devcluster.zygote import become

        os.close(failure)
        become(spec["module"], command, spec["env"])
    try:
        os.execvpe(command[0], command, spec["env"])  # noqa: S606
    except FileNotFoundError:
        os.write(failure, f'exec: "{command[0]}": executable file not found in $PATH'.encode())
    except PermissionError:
        os.write(failure, f'exec: "{command[0]}": permission denied'.encode())


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    die_with_parent()
    folder = Path(spec["folder"])
    failure = os.open(folder / "failure", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        enter_namespaces(spec["in_user_namespace"])
        child = os.fork()
        if child == 0:
            contain(spec, failure)
            os._exit(CANNOT_START)
    except OSError as error:
        os.write(failure, f"cannot make the container: {error}".encode())
        os._exit(CANNOT_START)
    scratch = folder / "pid.new"
    scratch.write_text(str(child))
    scratch.rename(folder / "pid")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(128 - code if code < 0 else code)


if __name__ == "__main__":
    main()

"""`python -m devcluster up | down | status | env [--state DIRECTORY]`."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from devcluster import assets, tools
from devcluster.handle import Handle

DEFAULT_STATE = Path(__file__).resolve().parents[2] / ".devcluster"


def say(text: str) -> None:
    """A line on how it goes: beside the answer, which goes to standard output."""
    sys.stderr.write(text + "\n")


def _recorded(state: Path) -> list[psutil.Process | None]:
    """The processes that were started, None for one that has ended."""
    try:
        entries = json.loads((state / "pids.json").read_text())
    except (OSError, ValueError):
        return []
    found: list[psutil.Process | None] = []
    for entry in entries:
        process = None
        with contextlib.suppress(psutil.Error):
            candidate = psutil.Process(entry["pid"])
            # A number may be another's by now.
            if abs(candidate.create_time() - entry["created"]) < 1:
                process = candidate
        found.append(process)
    return found


def is_up(state: Path) -> bool:
    """Whether all recorded processes live."""
    processes = _recorded(state)
    return bool(processes) and None not in processes and (state / "cluster.json").exists()


@contextlib.contextmanager
def _locked(state: Path) -> Iterator[None]:
    """One `up` or `down` of a state at a time."""
    with state.with_name(f"{state.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up(state: Path, *, gpus: int = 8) -> Handle:
    """The running cluster, started when it does not run. It outlives this program."""
    with _locked(state):
        if is_up(state):
            return Handle.load(state)
        _end(state)
        # Slow to import, and of no use when the cluster runs already.
        from devcluster.cluster import DevCluster

        started = time.monotonic()
        say("starting control plane, S3 and node …")
        cluster = DevCluster(state, gpus=gpus, detached=True)
        try:
            handle = cluster.start()
        except BaseException:
            cluster.stop()
            raise
        entries = [
            {"pid": pid, "created": psutil.Process(pid).create_time()} for pid in cluster.pids()
        ]
        (state / "pids.json").write_text(json.dumps(entries))
        say(f"cluster up in {time.monotonic() - started:.1f} s, state and logs in {state}")
        return handle


def down(state: Path) -> None:
    """End the recorded processes by their ids, the node first; remove the state."""
    with _locked(state):
        _end(state)
    state.with_name(f"{state.name}.lock").unlink(missing_ok=True)


def _end(state: Path, timeout_seconds: float = 5.0) -> None:
    for process in _recorded(state):
        if process is None:
            continue
        with contextlib.suppress(psutil.Error):
            # Only a node has something to put in order: what it runs. All data goes anyway.
            if "devcluster.node.agent" in process.cmdline():
                process.terminate()
                process.wait(timeout_seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    shutil.rmtree(state, ignore_errors=True)


def env_lines(handle: Handle) -> list[str]:
    """For a shell's `eval`: the cluster, its programs and its S3."""
    folders = dict.fromkeys([str(tools.kubectl().parent), str(tools.helm().parent)])
    values = {
        "KUBECONFIG": str(handle.kubeconfig),
        "AWS_ACCESS_KEY_ID": handle.s3.access_key,
        "AWS_SECRET_ACCESS_KEY": handle.s3.secret_key,
        "AWS_ENDPOINT_URL": handle.s3.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "S3_BUCKET": handle.s3.bucket,
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
    return [*lines, f"export PATH={shlex.quote(':'.join(folders))}:$PATH"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="devcluster", description=__doc__)
    parser.add_argument("command", choices=("up", "down", "status", "env"))
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE)
    given = parser.parse_args()
    state = given.state.resolve()
    match given.command:
        case "up":
            print(up(state).kubeconfig)
        case "down":
            down(state)
        case "status":
            print("up" if is_up(state) else "down")
            sys.exit(0 if is_up(state) else 1)
        case _:
            if not is_up(state):
                raise RuntimeError("no cluster runs here: python -m devcluster up")
            print("\n".join(env_lines(Handle.load(state))))


if __name__ == "__main__":
    try:
        main()
    except (assets.AssetsMissing, TimeoutError, RuntimeError) as error:
        sys.exit(f"error: {error}")

"""`python -m devcluster build | up | down | status | env [--state DIRECTORY]`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from devcluster import assets, tools
from devcluster.cluster import DevCluster, Handle

DEFAULT_STATE = Path(__file__).resolve().parents[2] / ".devcluster"


def is_up(state: Path) -> bool:
    """Whether all recorded processes live."""
    try:
        pids = json.loads((state / "pids.json").read_text())
        for pid in pids:
            os.kill(pid, 0)
    except (OSError, ValueError):
        return False
    return bool(pids) and (state / "cluster.json").exists()


def up(state: Path) -> Handle:
    """The running cluster, started when it does not run. It outlives this program."""
    if is_up(state):
        return Handle.load(state)
    down(state)
    started = time.monotonic()
    cluster = DevCluster(state, detached=True)
    try:
        handle = cluster.start()
    except BaseException:
        cluster.stop()
        raise
    (state / "pids.json").write_text(json.dumps(cluster.pids()))
    sys.stderr.write(f"cluster up in {time.monotonic() - started:.1f} s, state in {state}\n")
    return handle


def down(state: Path) -> None:
    """End the recorded processes by their ids, the node first; remove the state."""
    with contextlib.suppress(OSError, ValueError):
        pids = json.loads((state / "pids.json").read_text())
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                _await_end(pid)
    shutil.rmtree(state, ignore_errors=True)


def _await_end(pid: int, timeout_seconds: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
        os.killpg(pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="devcluster", description=__doc__)
    parser.add_argument("command", choices=("build", "up", "down", "status", "env"))
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE)
    given = parser.parse_args()
    if given.command == "build":
        print(assets.ensure())
    elif given.command == "up":
        print(up(given.state).kubeconfig)
    elif given.command == "down":
        down(given.state)
    elif given.command == "status":
        print("up" if is_up(given.state) else "down")
    else:
        handle = Handle.load(given.state)
        folders = f"{tools.kubectl().parent}:{tools.helm().parent}"
        print(f"export KUBECONFIG={handle.kubeconfig}")
        print(f"export PATH={folders}:$PATH")
        print(f"export AWS_ACCESS_KEY_ID={handle.s3.access_key}")
        print(f"export AWS_SECRET_ACCESS_KEY={handle.s3.secret_key}")
        print(f"export AWS_ENDPOINT_URL={handle.s3.endpoint}")


if __name__ == "__main__":
    try:
        main()
    except (assets.AssetsMissing, TimeoutError, RuntimeError) as error:
        sys.exit(f"error: {error}")

"""What a process can tell of itself: run in a container that is a fork and in one that is not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path


def main() -> None:
    """Print it as JSON and end with a code of its own."""
    import torch
    from huggingface_hub import constants

    writable = {}
    for folder in ("/", "/tmp", str(Path(__file__).parent)):
        writable[folder] = "no"
        with contextlib.suppress(OSError):
            Path(folder, "probe").touch()
            writable[folder] = "yes"
    status = Path("/proc/self/status").read_text().splitlines()
    kept = ("Uid:", "Gid:", "Groups:", "NoNewPrivs:", "NSpid:", "SigIgn:", "SigCgt:", "SigBlk:")
    print(
        json.dumps(
            {
                "argv": sys.argv[1:],
                "environment": dict(os.environ),
                "folder": str(Path.cwd()),
                "host": socket.gethostname(),
                "ids": [os.getpid(), os.getppid(), os.nice(0)],
                "status": [line for line in status if line.startswith(kept)],
                "signals": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT)],
                "files": sorted(os.listdir("/proc/self/fd")),  # noqa: PTH208
                "processes": [p.name for p in Path("/proc").iterdir() if p.name.isdigit()],
                "mounts": Path("/proc/self/mounts").read_text().count("\n"),
                "threads": threading.active_count(),
                "writable": writable,
                "bytecode": sys.dont_write_bytecode,
                "torch": torch.get_num_threads(),
                "offline": constants.HF_HUB_OFFLINE,
                "unbuffered": getattr(sys.stdout, "write_through"),  # noqa: B009 - not of every stream
            }
        )
    )
    raise SystemExit(7)


if __name__ == "__main__":
    main()

"""preStop hooks."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from devcluster.node.probes import Probe

if TYPE_CHECKING:
    from devcluster.node.status import ContainerState


def pre_stop(state: ContainerState, address: str, timeout_seconds: float) -> threading.Thread:
    """Run the container's preStop hook in a thread; without one the thread ends at once."""
    hook = (state.spec.get("lifecycle") or {}).get("preStop") or {}
    run = state.run
    ports = {
        p["name"]: int(p["containerPort"]) for p in state.spec.get("ports") or [] if "name" in p
    }

    def act() -> None:
        if "sleep" in hook:
            time.sleep(float(hook["sleep"]["seconds"]))
        elif run is not None and hook:
            spec = {**hook, "timeoutSeconds": timeout_seconds}
            Probe(spec, address, ports, run.execute).check()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread

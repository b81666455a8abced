"""An interpreter that has imported the trainer once and forks the trainers' containers of a node.

Imports of torch and DeepSpeed are 5 to 7 seconds of CPU, most of what a short job's containers cost. A
fork is a container like any other: namespaces, root, user and environment of its own, and the product's
`main` as its PID 1. What could tell it from a fresh interpreter starts as one: other programs, an
environment that libraries read at import and that differs, a memory limit, whose group would not be
charged for the pages that are shared.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from devcluster.zygote import Zygote

_log = logging.getLogger(__name__)
_MODULES = {"kubedistill-trainer": "kubedistill_trainer.launch"}
"""Console script → the module that has its `main`."""
_READ_AT_IMPORT = (
    "CUDA_", "DS_", "GLOO_", "HF_", "LD_", "MKL_", "NCCL_", "NVIDIA_", "OMP_", "OPENBLAS_", "PYTHON",
    "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_",
)  # fmt: skip
_ON_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
"""Without these there would be a GPU's context or a pool of threads, which a fork loses."""


def module_of(
    command: Sequence[str], env: Mapping[str, str], memory_limit_bytes: float | None
) -> str | None:
    """The module whose `main` stands for the command in a fork; None where it needs its own start."""
    if memory_limit_bytes is not None or not _ON_CPU.items() <= env.items():
        return None
    return _MODULES.get(command[0])


def read_at_import(env: Mapping[str, str]) -> dict[str, str]:
    """What of an environment libraries read when they are imported."""
    return {name: value for name, value in env.items() if name.startswith(_READ_AT_IMPORT)}


class Warm:
    """A node's warm interpreter; it is started by the first container that could have used it."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._env: dict[str, str] | None = None
        self._zygote: Zygote | None = None

    def zygote(self, env: Mapping[str, str]) -> Zygote | None:
        """Ready for a container with this environment; None while it is not, or for another one."""
        wanted = read_at_import(env)
        with self._lock:
            if self._env is None:
                self._env = wanted
                # Its own thread, which never ends: a zygote ends with the thread that started it.
                threading.Thread(target=self._keep, args=(wanted,), daemon=True).start()
            return self._zygote if self._env == wanted else None

    def _keep(self, env: Mapping[str, str]) -> None:
        try:
            with Zygote("trainer", self._log, env) as zygote:
                self._zygote = zygote
                threading.Event().wait()
        except RuntimeError:
            _log.exception("no warm interpreter: every container starts its own")

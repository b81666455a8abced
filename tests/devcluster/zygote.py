"""A process that has imported the product once, and forks a fresh process for every run of it.

The fork is a process like any other: it runs the product's own `main`, has a number, and can be killed.
`python -m devcluster.zygote trainer|operator` is the far side; it talks over the socket that is its
standard input, and has one thread only, since of a process with several a fork keeps just one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from devcluster.process import die_with_parent

_PRELOADED = {
    "trainer": (
        "deepspeed",
        "kubedistill_trainer.launch",
        "kubedistill_trainer.methods.generate",
        "kubedistill_trainer.methods.own_teacher",
        "kubedistill_trainer.methods.write_text",
        "kubedistill_trainer.preflight",
        "kubedistill_trainer.rank",
        "kubedistill_trainer.report.sweep",
        "kubedistill_trainer.run",
        "transformers.models.llama.modeling_llama",
    ),
    "operator": ("kubedistill_operator.main", "aiohttp", "kopf", "kubernetes.aio"),
}
KUBECONFIG = "kubeconfig"
"""The client library asks for its path when it is imported: here one in each fork's own folder."""
_QUIET = {
    "KUBECONFIG": KUBECONFIG,
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # pyarrow, which transformers imports, would start a thread of its allocator.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


class Forked:
    """A run of the product: a real process, a child of the zygote's. Thread-safe."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote = zygote
        self.pid = pid
        # Kept until the end is read, so that no other process can take the number.
        self._handle = os.pidfd_open(pid)
        self._code: int | None = None
        self._lock = threading.Lock()

    @property
    def running(self) -> bool:
        with self._lock:
            return self._code is None and not self._ended(0)

    def _ended(self, timeout_seconds: float) -> bool:
        return bool(select.select([self._handle], [], [], timeout_seconds)[0])

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return None if self.running else self.wait(0)

    def send_signal(self, number: int) -> None:
        """Harmless when it has ended."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._code is None:  # later, the handle may be another process's
                signal.pidfd_send_signal(self._handle, number)

    def wait(self, timeout_seconds: float) -> int:
        """Its exit code, negative for a signal. TimeoutError when it goes on."""
        with contextlib.suppress(OSError):  # the handle is closed once somebody has read the end
            self._ended(timeout_seconds)
        with self._lock:
            if self._code is None and self._ended(0):
                # Of two who ask for a child's end, one would be told that there is none.
                self._code = self._zygote.reap(self.pid)
                os.close(self._handle)
            if self._code is None:
                raise TimeoutError(f"process {self.pid} has not ended in {timeout_seconds:.0f} s")
            return self._code

    def end(self) -> int:
        """SIGKILL where it still runs; its exit code."""
        if self._code is None:
            self.send_signal(signal.SIGKILL)
        return self.wait(30)


class Zygote:
    """The near side. Thread-safe; use it as a context manager."""

    def __init__(self, kind: str, log: Path, env: Mapping[str, str] | None = None) -> None:
        """`kind` is trainer or operator; `env` is what libraries see when they are imported."""
        self._kind = kind
        self._log = log
        self._env = env or {}
        self._lock = threading.Lock()

    def __enter__(self) -> Zygote:
        mine, other = socket.socketpair()
        tests = str(Path(__file__).parents[1])
        with other, self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "devcluster.zygote", self._kind],
                stdin=other.fileno(),
                stdout=output,
                stderr=output,
                env={**os.environ, **_QUIET, **self._env, "PYTHONPATH": tests},
                # One call of libc: safe also beside threads.
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )
        self._socket, self._file = mine, mine.makefile("rw")
        self.ready = self._read()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._file.close()
        self._socket.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(
        self,
        *argv: str,
        env: Mapping[str, str],
        log: Path,
        folder: Path = Path("/"),
        groups: Sequence[str] = (),
    ) -> Forked:
        """Run `argv[0]`, a module with a `main`, in a new process with exactly this environment.

        It works in `folder`. `groups` are files of cgroups to join.
        """
        answer = self.ask(
            argv=argv,
            env=dict(env),
            log=str(log),
            folder=str(folder),
            groups=list(groups),
        )
        return Forked(self, int(answer["pid"]))

    def reap(self, pid: int) -> int:
        """The exit code of a fork that has ended."""
        try:
            return int(self.ask(reap=pid)["code"])
        except (RuntimeError, OSError):
            # It has ended with the zygote.
            return -signal.SIGKILL

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        with self._lock:
            self._file.write(json.dumps(request) + "\n")
            self._file.flush()
            return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise RuntimeError(f"the zygote ended:\n{self._log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def main() -> None:
    """The far side: import, then fork on request until the other side has gone."""
    started = time.monotonic()
    for name in _PRELOADED[sys.argv[1]]:
        importlib.import_module(name)
    if sys.argv[1] == "trainer":
        _warm_store()
        _warm_export()
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    if threads != 1:
        raise SystemExit(f"{threads} threads after the imports: a fork would lose all but one")
    gc.collect()
    gc.freeze()
    line = socket.socket(fileno=os.dup(0)).makefile("rw")
    _say(line, {"threads": threads, "seconds": round(time.monotonic() - started, 1)})
    while request := line.readline():
        asked = json.loads(request)
        if "reap" in asked:
            _, status = os.waitpid(int(asked["reap"]), 0)
            _say(line, {"code": os.waitstatus_to_exitcode(status)})
            continue
        ready, begun = os.pipe()
        child = os.fork()
        if child == 0:
            line.detach()
            try:
                _run(asked, begun)
            finally:
                # Whatever happened: the child never goes on here.
                traceback.print_exc()
                os._exit(1)
        os.close(begun)
        os.read(ready, 1)
        os.close(ready)
        _say(line, {"pid": child})


def _say(line: Any, answer: dict[str, Any]) -> None:
    line.write(json.dumps(answer) + "\n")
    line.flush()


def _warm_store() -> None:
    """botocore's description of S3 is parsed once here; nothing is sent."""
    from kubedistill_trainer.store import Store

    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    os.environ.update(keys)
    Store("s3://warm/up", endpoint="http://127.0.0.1:1")
    for key in keys:
        del os.environ[key]


def _warm_export() -> None:
    """transformers compiles hundreds of patterns for the first model that a process exports."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")


def _run(asked: dict[str, Any], begun: int) -> None:
    """In the child; never returns. Closing `begun` says that it has a group and a log of its own."""
    os.setsid()
    die_with_parent()
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(begun)
    os.closerange(3, 64)
    for group in asked["groups"]:
        Path(group).write_text(str(os.getpid()))
    os.chdir(asked["folder"])
    become(asked["argv"][0], asked["argv"], asked["env"])


def become(module: str, argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Run the module's `main` with these arguments and this environment, and end as a program does."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        sys.argv = list(argv)
        # It was found in another environment.
        tempfile.tempdir = None
        importlib.import_module(module).main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # what a fresh interpreter would print before it ends
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()

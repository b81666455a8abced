"""/metrics, /progress and /healthz of one rank, on the pod's own address."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from typing import Any

from kubedistill_api.names import EXPORTER_PORT
from kubedistill_api.runspec import ProgressReport
from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

STEP = Gauge("distill_train_step", "Optimizer steps done.")
LOSS = Gauge("distill_train_loss", "Mean loss a token of the latest step.", ["component"])
LEARNING_RATE = Gauge("distill_learning_rate", "Learning rate of the latest step.")
GRADIENT_NORM = Gauge("distill_gradient_norm", "Norm of the latest step's gradient.")
LAST_STEP = Gauge("distill_last_step_timestamp_seconds", "Unix time of the latest step.")
LAST_COMMIT = Gauge(
    "distill_checkpoint_last_commit_timestamp_seconds", "Unix time of the newest commit."
)
CHECKPOINT_INTERVAL = Gauge(
    "distill_checkpoint_interval_seconds", "Time between the starts of the last two saves."
)
CHECKPOINT_BYTES = Gauge("distill_checkpoint_bytes", "Size of the newest commit, over all ranks.")
FAILED_SAVES = Counter("distill_checkpoint_failed_saves", "Saves that ended without a commit.")
AGREEMENT = Gauge(
    "distill_teacher_agreement_ratio", "Share of held-out tokens whose top choice is the teacher's."
)
EVALUATION = Gauge("distill_eval_score", "Figures of the evaluation.", ["benchmark"])
TOKENS = Counter("distill_tokens_total", "Tokens processed by this process.", ["role"])
NONFINITE = Counter("distill_nonfinite_steps_total", "Steps whose loss was not finite.")
STEP_DURATION = Histogram(
    "distill_step_duration_seconds",
    "Time of an optimizer step, by phase.",
    ["phase"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
CHECKPOINT_DURATION = Histogram(
    "distill_checkpoint_duration_seconds",
    "Time of a save, of training's wait for it (stall), or of a restore.",
    ["operation"],
    buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
)
BUILD = Gauge("distill_build_info", "Always 1; the version is a label.", ["version"])


class ProgressBoard:
    """The latest ProgressReport, written by the training loop and read by HTTP threads."""

    def __init__(self, attempt: int = 0) -> None:
        self._lock = threading.Lock()
        self._report = ProgressReport(attempt=attempt)

    def update(self, **changes: Any) -> None:
        with self._lock:
            self._report = self._report.model_copy(update=changes)

    def show_life(self) -> None:
        """Say that work goes on between two steps.

        Before the first one nothing is said: until then a gang may wait long, for its teacher say,
        and is bounded by its time-outs.
        """
        if self.report.last_step_time is not None:
            self.update(last_step_time=time.time())

    @property
    def report(self) -> ProgressReport:
        with self._lock:
            return self._report


def serve(board: ProgressBoard, local_rank: int = 0) -> ThreadingHTTPServer:
    """Start serving in a daemon thread. POD_IP binds one address; without it, all of them."""
    BUILD.labels(version("kubedistill")).set(1)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers: dict[str, Callable[[], tuple[str, bytes]]] = {
                "/metrics": lambda: (CONTENT_TYPE_LATEST, _metrics()),
                "/progress": lambda: ("application/json", _json(board)),
                "/healthz": lambda: ("text/plain", b"ok\n"),
            }
            answer = answers.get(self.path.split("?")[0])
            if answer is None:
                self.send_error(404)
                return
            kind, body = answer()
            # Who asked may have stopped waiting: a rank that starts has little time for answers.
            with contextlib.suppress(ConnectionError):
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes are no news."""

    address = os.environ.get("POD_IP", "")
    port = int(os.environ.get("KUBEDISTILL_EXPORTER_PORT", EXPORTER_PORT)) + local_rank
    server = ThreadingHTTPServer((address, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="exporter", daemon=True).start()
    return server


def _metrics() -> bytes:
    return bytes(generate_latest(REGISTRY))


def _json(board: ProgressBoard) -> bytes:
    return board.report.model_dump_json(by_alias=True).encode()

"""A writer's /progress."""

from __future__ import annotations

import time
from collections.abc import Callable

from kubedistill_api.status import TeacherStreamStatus

from kubedistill_trainer.exporter import ProgressBoard

_REPORT_SECONDS = 2.0


class StreamReporter:
    """Keeps /progress current; `status(complete)` says what is committed."""

    def __init__(self, board: ProgressBoard, status: Callable[[bool], TeacherStreamStatus]) -> None:
        self._board = board
        self._status = status
        self._last = 0.0

    def tick(self) -> None:
        if time.monotonic() - self._last > _REPORT_SECONDS:
            self.now()

    def now(self, complete: bool = False) -> None:
        self._last = time.monotonic()
        self._board.update(teacher_stream=self._status(complete), last_step_time=time.time())

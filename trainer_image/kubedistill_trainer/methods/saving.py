"""When the training's state is saved, what follows where that fails, and what is told of it."""

from __future__ import annotations

import logging
import time
from collections import deque
from statistics import fmean
from typing import Any

from kubedistill_api.checkpoint import Checkpoint
from kubedistill_api.status import CheckpointStatus
from pydantic import JsonValue

from kubedistill_trainer import exporter
from kubedistill_trainer.checkpoint import (
    Checkpointer,
    CheckpointError,
    CommitInfo,
    Fenced,
    Restored,
)
from kubedistill_trainer.checkpoint.estimate import fits_grace, p99
from kubedistill_trainer.checkpoint.interval import (
    Mean,
    expected_mtbf,
    first_save,
    save_cost,
    save_interval,
)
from kubedistill_trainer.store import StoreError

_log = logging.getLogger(__name__)
GRACE_MARGIN_SECONDS = 5.0
_FAILURES_BORNE = 2
"""Saves in a row that may fail: training goes on, and the commit before them is valid."""
_RECENT = 200
_TELL_SECONDS = 2.0
_MOST_REJECTED = 8


class Saver:
    """Saves of one run, by interval or on demand, beside training. Collective where it is said."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        checkpoint: Checkpoint,
        board: exporter.ProgressBoard,
        *,
        grace_seconds: float,
        nodes: int = 1,
        mtbf_seconds: Mean | None = None,
        known_save_seconds: float | None = None,
    ) -> None:
        """`mtbf_seconds`: mean time between failures as seen of this job; None for none seen.

        `known_save_seconds`: the longest save of the attempts before; None where there was none.
        """
        self._checkpointer = checkpointer
        self._interval = checkpoint.interval
        self._board = board
        self._grace = grace_seconds
        self._seen_mtbf = mtbf_seconds
        self._nodes = nodes
        self._known_save = known_save_seconds
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._calm: deque[float] = deque(maxlen=_RECENT)
        self._busy: deque[float] = deque(maxlen=_RECENT)
        self._saves: list[CommitInfo] = []
        self._failures = 0
        self._began = self._started_at = time.monotonic()
        self.committed_step = -1
        """The newest commit's, as far as `settle` has seen."""
        if known_save_seconds is not None:
            board.update(save_seconds=known_save_seconds)
            self._tell_grace()

    @property
    def saves(self) -> list[float]:
        """Seconds of each save so far, from its snapshot to its commit; before the first one, what is
        known of attempts before."""
        if not self._saves and self._known_save is not None:
            return [self._known_save]
        return [info.duration_seconds for info in self._saves]

    def stepped(self, seconds: float) -> None:
        """A step took so long."""
        self._steps.append(seconds)
        flight = self._checkpointer.flight
        beside = flight is not None and not flight.ended.is_set()
        (self._busy if beside else self._calm).append(seconds)
        if not self._saves:  # from the first commit on, commits tell
            self._tell_grace()

    @property
    def longest_step(self) -> float:
        return max(self._steps)

    def due(self, step: int) -> bool:
        """Whether the state after this step is to be saved. With `Auto` rank 0's answer counts."""
        if self._interval != "Auto":
            return step % int(self._interval) == 0
        flight = self._checkpointer.flight
        if flight is not None and not flight.ended.is_set():
            return False
        return time.monotonic() - self._started_at >= self.interval_seconds()

    def interval_seconds(self) -> float:
        """With `Auto`: seconds between the starts of two saves."""
        mtbf = expected_mtbf(self._seen_mtbf, time.monotonic() - self._began, self._nodes)
        if not self._saves:
            return first_save(mtbf)
        # The median would do for the stall; the first snapshot also pays for its memory's pages.
        stall = min(info.stall_seconds for info in self._saves[-5:])
        save = self._saves[-1].duration_seconds
        means = [fmean(times) if times else None for times in (self._calm, self._busy)]
        return save_interval(save_cost(stall, save, *means), save, mtbf)

    @property
    def failed(self) -> bool:
        """Whether a save has ended with an error that `settle` has not told yet."""
        flight = self._checkpointer.flight
        return flight is not None and flight.ended.is_set() and flight.error is not None

    def start(
        self, engine: Any, step: int, cursor: dict[str, JsonValue], keep_step: int | None
    ) -> None:
        """Collective: settle the save before, then save beside training."""
        self.settle()
        now = time.monotonic()
        exporter.CHECKPOINT_INTERVAL.set(now - self._started_at)
        self._started_at = now
        try:
            self._checkpointer.start(
                engine, step=step, cursor=cursor, keep_step=keep_step, then=self._committed
            )
        except (CheckpointError, StoreError) as error:
            self._bear(error)

    def settle(self, *, last: bool = False) -> None:
        """Collective: wait for the save that is in flight.

        A failed one is borne, a few times in a row, unless it is the `last` one: then, and when the
        run is fenced, its error is raised.
        """
        self._await_flight()
        try:
            info = self._checkpointer.finish()
        except (CheckpointError, StoreError) as error:
            if last or isinstance(error, Fenced):
                raise
            self._bear(error)
            return
        if info is not None:
            self._failures = 0
            self.committed_step = info.step

    def _await_flight(self) -> None:
        """Tell that there is life while a save is waited for, within the time that it may take."""
        flight = self._checkpointer.flight
        while flight is not None and not flight.ended.wait(_TELL_SECONDS):
            if flight.is_in_time:
                self._board.show_life()

    def save(
        self, engine: Any, step: int, cursor: dict[str, JsonValue], keep_step: int | None
    ) -> None:
        """Collective: save this step and wait for its commit. Raises what goes wrong."""
        self.settle()
        self._checkpointer.start(
            engine, step=step, cursor=cursor, keep_step=keep_step, then=self._committed
        )
        self.settle(last=True)

    def tell_rejected(self, restored: Restored) -> None:
        """Add what a restore passed over to what this attempt has found damaged, the newest first."""
        found = [str(rejected) for rejected in restored.rejected]
        before = self._board.report.rejected_checkpoints
        self._board.update(rejected_checkpoints=[*found, *before][:_MOST_REJECTED])

    def _bear(self, error: Exception) -> None:
        self._failures += 1
        exporter.FAILED_SAVES.inc()
        if self._failures > _FAILURES_BORNE:
            raise error
        _log.warning("a save failed; training goes on", extra={"error": str(error)})
        self._board.update(save_problem=str(error)[:500])

    def _committed(self, info: CommitInfo) -> None:
        """Called by the upload's thread."""
        self._saves.append(info)
        exporter.CHECKPOINT_DURATION.labels("save").observe(info.duration_seconds)
        exporter.CHECKPOINT_DURATION.labels("stall").observe(info.stall_seconds)
        exporter.CHECKPOINT_BYTES.set(info.size_bytes)
        exporter.LAST_COMMIT.set(time.time())
        self._board.update(
            checkpoint=CheckpointStatus(
                uri=info.uri, step=info.step, time=info.time, digest=info.digest
            ),
            save_seconds=max(self.saves),
            stall_seconds=max(i.stall_seconds for i in self._saves),
            save_problem="",
            grace_problem=self._grace_problem(),
        )
        _log.info(
            "committed",
            extra={
                "step": info.step,
                "seconds": round(info.duration_seconds, 2),
                "stall": round(info.stall_seconds, 3),
            },
        )

    def _tell_grace(self) -> None:
        self._board.update(grace_problem=self._grace_problem())

    def _grace_problem(self) -> str:
        steps, saves = list(self._steps), self.saves
        if not saves or fits_grace(steps, saves, self._grace, GRACE_MARGIN_SECONDS):
            return ""
        needed = p99(saves) + (p99(steps) if steps else 0.0) + GRACE_MARGIN_SECONDS
        return (
            f"a pod that is asked to stop needs {needed:.0f} s to finish a step and save, and has "
            f"{self._grace:.0f} s"
        )

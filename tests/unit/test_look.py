"""A held-out look that takes long: it shows that it goes on, and ends on all ranks where one is to stop."""

from __future__ import annotations

import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.exporter import ProgressBoard
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.interruption import Interruption
from kubedistill_trainer.methods.signal import NoTeacher
from kubedistill_trainer.report.evaluate import heldout_perplexity, measure
from loop_kit import Commits, loop
from test_report_figures import Engine, dataset

WORLD = 2
ROUNDS = 6
"""Of a look of two ranks at twelve sequences."""


class AskedInItsSecondLook(Engine):
    """A student whose rank gets SIGTERM while it is measured for the second time."""

    passes = 0

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes == ROUNDS + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(tokens, positions)


def a_rank(rank: int, folder: Path) -> None:
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    student = AskedInItsSecondLook() if rank == 1 else Engine()
    commits = Commits()
    stopping = {"earlyStopping": {"intervalSteps": 2, "patience": 9}}
    trained = loop(commits, rank=rank, world_size=WORLD, **stopping)
    trained._interruption = Interruption(1e6)
    looked: Any = partial(heldout_perplexity, student, dataset(), rank, WORLD, None)
    trained._heldout_perplexity = looked
    try:
        trained.run()
    except RunFailure as end:
        assert end.code is ExitCode.GRACEFUL_CHECKPOINT
        assert "committed step 4" in end.message
        assert [look.step for look in trained.watch.looks] == [2]
        os._exit(0)


def test_ranks_leave_a_look_together_when_one_is_asked_to_stop(tmp_path: Path) -> None:
    """Or those that were not asked would wait for the others in the look's last sum."""
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=a_rank, args=(rank, tmp_path)) for rank in range(WORLD)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_rank_ticks_as_often_as_its_peers(ranks: int) -> None:
    """Also one that has fewer sequences of its own: the ranks agree in each tick."""
    ticks = [0] * ranks
    for rank in range(ranks):

        def tick(rank: int = rank) -> None:
            ticks[rank] += 1

        measure(Engine(), NoTeacher(), dataset(), rank, ranks, tick)
    assert len(set(ticks)) == 1
    assert ticks[0] >= len(dataset().split.heldout) / ranks


def test_life_is_shown_between_steps_and_not_before_the_first() -> None:
    """Until then a gang is bounded by its time-outs: it may wait long for its teacher."""
    board = ProgressBoard()
    board.show_life()
    assert board.report.last_step_time is None
    board.update(last_step_time=1.0)
    board.show_life()
    assert board.report.last_step_time > 1.0

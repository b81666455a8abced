"""Ranks that wait for a streamed teacher: together, without being taken for dead or stalled."""

from __future__ import annotations

import multiprocessing
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods import gathering
from kubedistill_trainer.methods.signal import NoTeacher
from kubedistill_trainer.store.errors import StoreUnavailable
from kubedistill_trainer.teacher.errors import SampleMissing, StreamStalled
from kubedistill_trainer.teacher.reading import ReaderSettings
from kubedistill_trainer.teacher.stream_reader import StreamReader
from loop_kit import Commits, Engine, gang, loop  # noqa: F401
from teacher_builders import MemoryStore, identity, write_stream

PATIENCE_SECONDS = 4.0
"""Of the group that the ranks step by."""


def opened(store: MemoryStore, folder: Path, **settings: Any) -> StreamReader:
    changed = ReaderSettings(stall_seconds=60, poll_seconds=0.01, poll_limit_seconds=0.02)
    if settings:
        changed = ReaderSettings(poll_seconds=0.01, poll_limit_seconds=0.02, **settings)
    return StreamReader(store, identity(), cache=folder / "cache", settings=changed)


def test_a_reader_says_whether_samples_are_committed(tmp_path: Path) -> None:
    store = MemoryStore()
    write_stream(store, tmp_path / "a", upto=6)
    with opened(store, tmp_path) as source:
        assert source.there([0, 5])
        assert not source.there([5, 7])
        assert not source.there([7, 5], seconds=0.05)
        write_stream(store, tmp_path / "b", upto=9)
        assert source.there([7, 5], seconds=60)
        with pytest.raises(SampleMissing, match="sample 12"):
            source.there([12])


def test_samples_that_do_not_come_are_a_stall_however_short_the_looks(tmp_path: Path) -> None:
    store = MemoryStore()
    write_stream(store, tmp_path / "a", upto=6)
    with opened(store, tmp_path, stall_seconds=0.5) as source:
        looks = 0
        with pytest.raises(StreamStalled, match=r"partition 1 committed 3 samples"):
            while looks < 10_000:
                assert not source.there([7], seconds=0.02)
                looks += 1
        assert looks > 1


def test_a_store_that_is_away_ends_no_look(tmp_path: Path) -> None:
    store = MemoryStore()
    write_stream(store, tmp_path / "a", upto=6)

    def away(operation: str, key: str) -> None:
        raise StoreUnavailable(operation, key, "503")

    with opened(store, tmp_path, stall_seconds=60) as source:
        store.hooks.before = away
        assert not source.there([5], seconds=0.05)


class Slow(NoTeacher):
    """What rank 1 asks for comes after a time that no collective would wait for."""

    def __init__(self, rank: int) -> None:
        self._comes = time.monotonic() + (2 * PATIENCE_SECONDS if rank else 0.0)

    def there(self, samples: Any, seconds: float = 0.0) -> bool:
        time.sleep(max(0.0, min(self._comes - time.monotonic(), seconds)))
        return time.monotonic() >= self._comes


def a_rank(rank: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    group = dist.new_group(timeout=timedelta(seconds=PATIENCE_SECONDS))
    gathering.LOOK_SECONDS = 0.5
    alive: list[float] = []
    there = gathering.gather_teacher(
        Slow(rank), np.arange(3), group, asked=lambda: False, alive=lambda: alive.append(0)
    )
    assert there
    assert alive, "it says that it waits"
    # As a step would, right behind it.
    dist.all_reduce(torch.ones(1), group=group)
    os._exit(0)


def test_ranks_wait_longer_for_a_teacher_than_for_each_other(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=a_rank, args=(number, tmp_path)) for number in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]


class Late(NoTeacher):
    """Each step's outputs come at the third look."""

    def __init__(self) -> None:
        self.looks = 0

    def there(self, samples: Any, seconds: float = 0.0) -> bool:
        if not len(samples):
            return True
        self.looks += 1
        return self.looks % 3 == 0


@pytest.mark.usefixtures("gang")
def test_a_loop_whose_teacher_is_late_lives_and_learns_the_same() -> None:
    engine, calm = Engine(), Engine()
    loop(Commits(), engine=calm).run()
    late = loop(Commits(), engine=engine)
    late._teacher = teacher = Late()
    seen: list[float | None] = []
    update = late._board.update

    def watched(**changes: Any) -> None:
        if "last_step_time" in changes and "step" not in changes:
            seen.append(changes["last_step_time"])
        update(**changes)

    late._board.update = watched  # type: ignore[method-assign]
    assert late.run() == 10
    assert engine.taken == calm.taken
    assert teacher.looks == 30
    assert len(seen) >= 10, "it gave signs of life while it waited"


@pytest.mark.usefixtures("gang")
def test_a_loop_that_waits_for_its_teacher_heeds_sigterm() -> None:
    """It is asked while it waits for the fourth step's samples."""

    class Asked(NoTeacher):
        looks = 0

        def there(self, samples: Any, seconds: float = 0.0) -> bool:
            self.looks += 1
            return self.looks <= 3

    class Clock:
        remaining_seconds = staticmethod(lambda: 1e6)
        has_work = staticmethod(lambda: None)

        @property
        def asked(self) -> bool:
            return teacher.looks > 9

    waiting, teacher = loop(Commits()), Asked()
    waiting._teacher = teacher
    waiting._interruption = Clock()  # type: ignore[assignment]
    with pytest.raises(RunFailure, match="asked to stop after step 3") as caught:
        waiting.run()
    # Before its first save nobody knows how long one takes: none is begun.
    assert caught.value.code is ExitCode.INTERRUPTED

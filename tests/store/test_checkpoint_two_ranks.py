"""Two ranks of which one has read other inputs, has more to fetch, or no room for its snapshot."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)

WORLD = 2
PATIENCE_SECONDS = 8.0
"""Of the control group."""


class Engine:
    """Each rank has a file of its own."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.weights: Any = None
        self.checkpoint_engine: Any = None

    def _file(self, folder: str, tag: str) -> Path:
        return Path(folder) / tag / f"zero_pp_rank_{self.rank}_optim_states.pt"

    def save_checkpoint(self, folder: str, *, tag: str, save_latest: bool) -> None:
        self.checkpoint_engine.save(self.weights, str(self._file(folder, tag)))

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str, object]:
        import torch

        self.weights = torch.load(self._file(folder, tag), weights_only=True)
        return folder, {}


def joined(
    rank: int, folder: Path, store: Any, memory: int | None = None, **options: Any
) -> tuple[Any, Engine]:
    """A checkpointer of one of the ranks, and its engine; `memory`: its limit in bytes."""
    import torch
    import torch.distributed as dist
    from kubedistill_trainer.checkpoint import Checkpointer

    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
    checkpointer = Checkpointer(
        store=store,
        scratch=folder / str(rank),
        fence=1,
        attempt="a",
        rank=rank,
        world_size=WORLD,
        config_digest="c",
        keep_last=3,
        control_group=dist.new_group(timeout=timedelta(seconds=PATIENCE_SECONDS)),
        upload_group=dist.new_group(timeout=timedelta(minutes=5)),
        memory_limit_bytes=memory,
        **options,
    )
    checkpointer.open()
    engine = Engine(rank)
    engine.weights = torch.full((10,), float(rank))
    return checkpointer, engine


def a_rank(rank: int, folder: Path, uri: str, endpoint: str) -> None:
    """Save, and restore over a network that is slow for rank 1 alone."""
    from kubedistill_trainer.checkpoint import CheckpointFailed
    from kubedistill_trainer.store import Store

    store = Store(uri, endpoint=endpoint)
    waits = list[bool]()
    checkpointer, engine = joined(rank, folder, store, waits=waits.append)
    # One of them has read data that somebody has changed since.
    with pytest.raises(CheckpointFailed, match=r"rank 1 has read other inputs .*: data.sources$"):
        checkpointer.pin_inputs({"data.sources": f"digest-{rank}", "teacher": "digest"})
    checkpointer.pin_inputs({"data.sources": "digest", "teacher": "digest"})
    checkpointer.save(engine, step=5, cursor={})
    if rank == 1:
        client: Any = store._connection.client
        client.meta.events.register(
            "before-send.s3.GetObject", lambda **_: time.sleep(PATIENCE_SECONDS)
        )
    engine.weights = None
    waits.clear()
    restored = checkpointer.restore(engine)
    assert waits == [True, False], "it tells that it waits for its peer"
    assert restored is not None
    assert restored.step == 5
    assert engine.weights[0] == rank
    os._exit(0)


def a_rank_without_room(rank: int, folder: Path, uri: str, endpoint: str) -> None:
    """A save for which memory is short on both ranks, and the disk of rank 1 is full."""
    from kubedistill_trainer.checkpoint import CheckpointFailed
    from kubedistill_trainer.store import Store

    checkpointer, engine = joined(rank, folder, Store(uri, endpoint=endpoint), memory=1)
    if rank == 1:
        save = engine.save_checkpoint

        def full(folder: str, *, tag: str, save_latest: bool) -> None:
            engine._file(folder, tag).symlink_to("/dev/full")
            save(folder, tag=tag, save_latest=save_latest)

        engine.save_checkpoint = full  # type: ignore[method-assign]
    try:
        checkpointer.save(engine, step=5, cursor={})
    except CheckpointFailed as error:
        assert "rank 1" in str(error)
        os._exit(0)


@pytest.mark.parametrize("life", [a_rank, a_rank_without_room])
def test_two_ranks(s3: S3Server, tmp_path: Path, life: Callable[..., None]) -> None:  # noqa: F811
    """One that fetches long is waited for; where one fails, no rank's disk keeps its snapshot."""
    spawn = multiprocessing.get_context("spawn")
    uri = s3.uri()
    ranks = [spawn.Process(target=life, args=(n, tmp_path, uri, s3.endpoint)) for n in range(WORLD)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert list(tmp_path.rglob("*.pt")) == []

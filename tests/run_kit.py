"""A run's prefix with real shards, for tests of what reads one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
from kubedistill_trainer.checkpoint import CommitLog
from kubedistill_trainer.checkpoint.history import CommitEntry
from kubedistill_trainer.checkpoint.records import Commit, ShardRecord
from kubedistill_trainer.checkpoint.retention import data_prefix
from kubedistill_trainer.store import Store

RUN = "team/student/0c9f"


def opened(store: Store, fence: int, run: str = RUN) -> CommitLog:
    """The log, taken over by an attempt of this fence."""
    log = CommitLog(store, fence=fence, attempt=f"0c9f-{fence}", run=run)
    log.take_over()
    return log


def described(path: str, content: bytes, rank: int = 0) -> ShardRecord:
    """The receipt of a shard; up to 16 MiB, so of one part."""
    return ShardRecord(
        path=path,
        rank=rank,
        shared=False,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        crc32c=[google_crc32c.value(content)] if content else [],
    )


@dataclass
class Run:
    """One attempt of a run that makes commits of two shards."""

    store: Store
    fence: int = 1
    log: CommitLog = field(init=False)

    def __post_init__(self) -> None:
        self.log = opened(self.store, self.fence)

    def commit(self, step: int, **changes: Any) -> CommitEntry:
        """Upload and commit; content differs by step and shard."""
        data = data_prefix(self.fence, step, f"u{step}")
        contents = {"state/a.pt": f"a of {step}".encode() * 100, "rng-00000.json": b"{}"}
        for path, content in contents.items():
            self.store.put(f"{data}/{path}", content)
        shards = [described(path, content) for path, content in contents.items()]
        fields = {
            "step": step, "world_size": 1, "data": data, "shards": shards, "cursor": {"step": step},
            "config_digest": "c", "config": {"training.learningRate": 0.001},
        }  # fmt: skip
        record = self.log.append(Commit, **(fields | changes))
        assert isinstance(record.record, Commit)
        return CommitEntry(record.sequence, record.record)

"""Commits of a DeepSpeed engine's state, and the resume from the newest good one.

Only the files that DeepSpeed itself wrote, and that verify against a commit of this run, are given
to its loader, which unpickles: nothing that came from a user gets there.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from kubedistill_trainer.checkpoint import rng, shards
from kubedistill_trainer.checkpoint.errors import (
    CheckpointCorrupt,
    CheckpointError,
    Fenced,
    SaveFailed,
    WorldSizeChanged,
)
from kubedistill_trainer.checkpoint.log import CommitLog
from kubedistill_trainer.checkpoint.records import Record, Shard
from kubedistill_trainer.store import Store

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class CommitInfo:
    """A commit that was made."""

    uri: str
    step: int
    digest: str
    size_bytes: int
    duration_seconds: float
    time: str


@dataclass(frozen=True)
class Restored:
    """A commit that was loaded; `rejected` says what was found wrong with newer ones."""

    step: int
    cursor: dict[str, Any]
    uri: str
    rejected: list[str] = field(default_factory=list)


class Checkpointer:
    """One rank's part. All methods are collectives over `control_group`: on error all ranks raise.

    `store` is rooted at the run's prefix; `scratch` is a local folder of this rank alone.
    """

    def __init__(
        self,
        *,
        store: Store,
        scratch: Path,
        fence: int,
        attempt: str,
        rank: int,
        world_size: int,
        config_digest: str,
        keep_last: int,
        control_group: Any,
    ) -> None:
        self._store = store
        self._scratch = scratch
        self._fence = fence
        self._attempt = attempt
        self._rank = rank
        self._world_size = world_size
        self._config_digest = config_digest
        self._keep_last = keep_last
        self._group = control_group
        self._log = CommitLog(store)
        self._verified_slot: int | None = None

    def open(self) -> None:
        """Step 1: rank 0 writes the FENCE. Raises Fenced when a newer attempt was faster."""
        self._on_rank_0(lambda: self._log.take(self._record("FENCE")))

    def save(self, engine: Any, *, step: int, cursor: dict[str, Any]) -> CommitInfo:
        """Steps 2 and 3: snapshot, upload, receipts, HEAD, COMMIT; then what is old is retired.

        Raises SaveFailed (the previous commit stays valid), Fenced.
        """
        started = time.monotonic()
        tag = f"s{step}"
        folder = self._snapshot(engine, tag)
        receipts = self._upload(folder, f"data/e{self._fence}/s{step}/{uuid.uuid4().hex}")
        generators = self._gather(rng.capture())
        everything = [shard for mine in receipts for shard in mine]

        def commit() -> Record:
            shards.check_present(self._store, everything)
            record = self._record(
                "COMMIT",
                step=step,
                world_size=self._world_size,
                config_digest=self._config_digest,
                tag=tag,
                cursor=cursor,
                rng=tuple(generators),
                shards=tuple(everything),
            )
            self._log.append(record)
            self._retire()
            return record

        record = self._on_rank_0(commit)
        shutil.rmtree(folder, ignore_errors=True)
        return CommitInfo(
            uri=self._store.uri_of(_prefix_of(record)),
            step=step,
            digest=record.digest,
            size_bytes=sum(shard.size_bytes for shard in everything),
            duration_seconds=time.monotonic() - started,
            time=record.time,
        )

    def restore(self, engine: Any) -> Restored | None:
        """Load the newest commit that verifies; None when there is none.

        A commit that does not verify gets a REJECT, and the next older one is tried. Raises
        WorldSizeChanged, Fenced.
        """
        rejected: list[str] = []
        while True:
            found = self._on_rank_0(self._newest)
            if found is None:
                return None
            slot, record = found
            problem = self._fetch(record)
            if problem is None:
                self._load(engine, record)
                self._verified_slot = slot
                uri = self._store.uri_of(_prefix_of(record))
                return Restored(record.step, record.cursor, uri, rejected)
            rejected.append(f"step {record.step}: {problem}")
            reject = self._record("REJECT", slots=(slot,), reason=problem[:500])
            self._on_rank_0(partial(self._log.append, reject))

    # Saving.

    def _snapshot(self, engine: Any, tag: str) -> Path:
        """DeepSpeed writes this rank's files to local disk. A collective of its own."""
        folder = self._scratch / "save"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        return folder

    def _upload(self, folder: Path, prefix: str) -> list[list[Shard]]:
        """Upload and gather everybody's receipts; SaveFailed on all ranks when one has none."""
        mine: list[Shard] = []
        problem = ""
        # The prefix is rank 0's, so that a checkpoint lies in one place.
        prefix = self._from_rank_0(prefix)
        try:
            mine = shards.upload(self._store, prefix, folder, self._rank)
        except Exception as error:
            problem = f"rank {self._rank}: {type(error).__name__}: {error}"
        answers = self._gather((mine, problem))
        problems = [text for _, text in answers if text]
        if problems:
            raise SaveFailed("; ".join(problems))
        return [receipt for receipt, _ in answers]

    def _retire(self) -> None:
        """RETIRE first, delete after: never the newest, the newest verified, or the kept ones."""
        history = self._log.read()
        live = history.live_commits()
        keep = {number for number, _ in live[: self._keep_last]} | {self._verified_slot}
        old = [(number, record) for number, record in live if number not in keep]
        if not old:
            return
        self._log.append(self._record("RETIRE", slots=tuple(number for number, _ in old)))
        for _, record in old:
            self._store.delete([shard.key for shard in record.shards])

    # Restoring.

    def _newest(self) -> tuple[int, Record] | None:
        for number, record in self._log.read().live_commits():
            try:
                shards.check_present(self._store, list(record.shards))
            except CheckpointCorrupt as error:
                self._log.append(self._record("REJECT", slots=(number,), reason=str(error)))
                continue
            if record.world_size != self._world_size:
                raise WorldSizeChanged(
                    f"the newest commit (step {record.step}) was made by {record.world_size} "
                    f"ranks, there are {self._world_size}: use as many nodes and GPUs as before"
                )
            return number, record
        return None

    def _fetch(self, record: Record) -> str | None:
        """Download what this rank needs, verified; what is wrong, agreed among all ranks."""
        folder = self._scratch / "restore"
        shutil.rmtree(folder, ignore_errors=True)
        problem = ""
        # Rank 0's files hold what is replicated.
        wanted = [shard for shard in record.shards if shard.rank in (0, self._rank)]
        try:
            shards.download(self._store, wanted, folder)
        except CheckpointCorrupt as error:
            problem = str(error)
        problems = [text for text in self._gather(problem) if text]
        return problems[0] if problems else None

    def _load(self, engine: Any, record: Record) -> None:
        folder = self._scratch / "restore"
        loaded, _ = engine.load_checkpoint(str(folder), tag=record.tag)
        if loaded is None:
            raise CheckpointCorrupt(f"DeepSpeed did not load step {record.step} from {folder}")
        rng.restore(record.rng[self._rank])
        shutil.rmtree(folder, ignore_errors=True)

    # Agreement.

    def _gather(self, value: _Result) -> list[_Result]:
        answers: list[Any] = [None] * self._world_size
        dist.all_gather_object(answers, value, group=self._group)
        return answers

    def _from_rank_0(self, value: _Result) -> _Result:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _on_rank_0(self, action: Callable[[], _Result]) -> _Result:
        """Do something on rank 0; all ranks get its result, or raise what it raised."""
        answer: tuple[Any, Exception | None] = (None, None)
        if self._rank == 0:
            try:
                answer = (action(), None)
            except Exception as error:
                known = isinstance(error, CheckpointError)
                answer = (None, error if known else SaveFailed(f"{type(error).__name__}: {error}"))
        result, failure = self._from_rank_0(answer)
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    def _record(self, kind: Any, **content: Any) -> Record:
        return Record(
            kind=kind,
            fence=self._fence,
            attempt=self._attempt,
            time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            version=version("kubedistill"),
            **content,
        )


def _prefix_of(record: Record) -> str:
    return record.shards[0].key.rsplit("/r", 1)[0]


__all__ = ["Checkpointer", "CommitInfo", "Fenced", "Restored"]

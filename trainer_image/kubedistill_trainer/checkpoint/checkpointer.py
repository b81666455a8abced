"""The Checkpointer: save, commit, clean up and restore a DeepSpeed engine across ranks.

The numbered steps are those of storage.md.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import JsonValue

from kubedistill_trainer.checkpoint import retention, rng, shards, snapshot
from kubedistill_trainer.checkpoint.agreement import Gang
from kubedistill_trainer.checkpoint.errors import (
    CheckpointCorrupt,
    ConfigChanged,
    WorldSizeChanged,
)
from kubedistill_trainer.checkpoint.log import CommitEntry, CommitLog, Entry, slot_key
from kubedistill_trainer.checkpoint.records import Commit, Reject, ShardRecord, digest
from kubedistill_trainer.store import Store, StoreError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommitInfo:
    """A commit that was made."""

    uri: str
    """Prefix of its shards."""
    step: int
    digest: str
    size_bytes: int
    duration_seconds: float
    time: str
    """ISO 8601, UTC, by the clock of rank 0."""


@dataclass(frozen=True)
class Rejected:
    """A commit that was passed over, or a slot without a readable record (step is None)."""

    uri: str
    step: int | None
    reason: str

    def __str__(self) -> str:
        at = "unreadable record" if self.step is None else f"step {self.step}"
        return f"{at}, {self.uri}: {self.reason}"


@dataclass(frozen=True)
class Restored:
    """The commit that was loaded, and newer ones that could not be."""

    step: int
    cursor: dict[str, JsonValue]
    uri: str
    rejected: list[Rejected] = field(default_factory=list)


class Checkpointer:
    """One rank's side of a run's checkpoints. Every method is collective over all ranks.

    `store` is at the run's prefix. `control_group` is a gloo group of all ranks with a timeout
    (None: the default group). Not thread-safe.
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
        control_group: dist.ProcessGroup | None,
    ) -> None:
        self._store = store
        self._scratch = scratch
        self._fence = fence
        self._rank = rank
        self._world_size = world_size
        self._config_digest = config_digest
        self._keep_last = keep_last
        self._gang = Gang(rank, world_size, control_group)
        self._log = CommitLog(store, fence=fence, attempt=attempt)
        self._verified: int | None = None
        self._snapshot_bytes = 0

    def open(self) -> None:
        """Step 1: rank 0 writes FENCE; then it clears away what earlier attempts left.

        Raises Fenced on every rank when a fence as high is in the log already.
        """
        self._gang.from_first(self._log.take_over)
        self._gang.from_first(
            lambda: self._tidy(lambda: retention.collect(self._store, self._log, self._fence))
        )

    def save(
        self,
        engine: Any,
        *,
        step: int,
        cursor: dict[str, JsonValue],
        keep_step: int | None = None,
    ) -> CommitInfo:
        """Steps 2 and 3: snapshot, upload, commit; then clean up. Returns after the commit.

        Clean-up leaves the commit of `keep_step` alone.

        Raises on every rank: Fenced (exit, write nothing more), StoreError or CheckpointFailed
        (nothing was committed; the previous commit is valid, and another save may be tried).
        Training's random generators are left as the snapshot holds them.
        """
        started = time.monotonic()
        folder = snapshot.empty(self._scratch / "save")
        try:
            self._gang.gather(lambda: snapshot.check_room(folder, self._snapshot_bytes))
            taken = self._gang.gather(lambda: snapshot.take(engine, folder, self._rank))[self._rank]
            self._snapshot_bytes = taken.size_bytes
            data, receipts = self.upload(taken, step)
            entry = self._gang.from_first(lambda: self._commit(step, cursor, data, receipts))
        finally:
            snapshot.empty(folder)
        self._gang.from_first(lambda: self._tidy(lambda: self._retire(keep_step)))
        # Retries draw random numbers in some libraries; a resumed run would not have drawn them.
        rng.restore(taken.generators)
        commit = entry.record
        return CommitInfo(
            uri=self._store.uri_of(commit.data),
            step=step,
            digest=digest(commit),
            size_bytes=commit.size_bytes,
            duration_seconds=time.monotonic() - started,
            time=commit.time,
        )

    def upload(self, taken: snapshot.Snapshot, step: int) -> tuple[str, list[ShardRecord]]:
        """Step 2: upload under a prefix of its own; the prefix and the receipts of all ranks."""
        data = self._gang.from_first(
            lambda: retention.data_prefix(self._fence, step, str(uuid.uuid4()))
        )
        receipts = self._gang.gather(
            lambda: shards.upload(
                self._store.child(data),
                taken.folder,
                taken.paths,
                rank=self._rank,
                is_shared=snapshot.is_shared,
            )
        )
        return data, [receipt for of_rank in receipts for receipt in of_rank]

    def restore(self, engine: Any, step: int | None = None) -> Restored | None:
        """Load the newest good commit into the engine; None when the run has none.

        With `step` the newest good commit of that step, or where there is none the newest of all.

        A commit that is missing, altered or torn gets a REJECT and the next older one is tried.
        Raises WorldSizeChanged and ConfigChanged on a good commit that does not fit, StoreError
        when the store cannot be read (which rejects nothing), Fenced when the run is taken over.
        """
        # A newer attempt's commits are not ours to go on from.
        self._gang.from_first(self._log.refuse_if_overtaken)
        rejected = self._gang.from_first(self._reject_unreadable)
        while True:
            entry = self._gang.from_first(lambda: self._newest(step))
            if entry is None:
                self._refuse_if_all_bad(rejected)
                return None
            folder = snapshot.empty(self._scratch / "restore")
            try:
                if problem := self._fetch(entry, folder):
                    rejected.append(self._gang.from_first(partial(self._reject, entry, problem)))
                    continue
                self._gang.gather(partial(snapshot.load, engine, folder, self._rank))
            finally:
                snapshot.empty(folder)
            self._verified = entry.sequence
            commit = entry.record
            uri = self._store.uri_of(commit.data)
            return Restored(commit.step, dict(commit.cursor), uri, rejected)

    def _commit(
        self, step: int, cursor: dict[str, JsonValue], data: str, receipts: list[ShardRecord]
    ) -> CommitEntry:
        """Step 3, on rank 0: HEAD every shard, then one COMMIT at the expected slot."""
        try:
            shards.check_by_head(self._store.child(data), receipts)
        except CheckpointCorrupt:
            # A newer attempt collects what an older one uploads: then that is why it is missing.
            self._log.refuse_if_overtaken()
            raise
        entry = self._log.append(
            Commit,
            step=step,
            world_size=self._world_size,
            data=data,
            shards=receipts,
            cursor=cursor,
            config_digest=self._config_digest,
        )
        assert isinstance(entry.record, Commit)
        return CommitEntry(entry.sequence, entry.record)

    def _newest(self, step: int | None) -> CommitEntry | None:
        commits = self._log.commits()
        wanted = [commit for commit in commits if commit.record.step == step]
        return next(reversed(wanted or commits), None)

    def _fetch(self, entry: CommitEntry, folder: Path) -> str:
        """Download what this rank needs, verified; what is wrong on any rank, or nothing."""
        commit = entry.record
        self._refuse_misfit(entry)
        store = self._store.child(commit.data)

        def fetch() -> str:
            try:
                if self._rank == 0:
                    shards.check_by_head(store, commit.shards)
                for shard in commit.shards:
                    if shard.shared or shard.rank == self._rank:
                        shards.download(store, shard, folder / shard.path)
            except CheckpointCorrupt as error:
                return str(error)
            return ""

        # The agreement is a minimum: one rank that cannot load it is enough to pass it over.
        return next((problem for problem in self._gang.gather(fetch) if problem), "")

    def _refuse_misfit(self, entry: CommitEntry) -> None:
        commit, uri = entry.record, self._store.uri_of(slot_key(entry.sequence))
        if commit.config_digest != self._config_digest:
            raise ConfigChanged(
                f"{uri}: written under configuration {commit.config_digest!r}, this run has "
                f"{self._config_digest!r}; start a new job for a changed specification"
            )
        if commit.world_size != self._world_size:
            raise WorldSizeChanged(
                f"{uri}: written by {commit.world_size} ranks, this attempt has "
                f"{self._world_size}; give the job its former number of nodes and GPUs"
            )

    def _reject(self, entry: CommitEntry, reason: str) -> Rejected:
        self._log.append(Reject, sequence=entry.sequence, reason=reason)
        return self._passed_over(entry.sequence, entry.record.step, reason)

    def _reject_unreadable(self) -> list[Rejected]:
        found: list[Entry] = self._log.unreadable()
        for entry in found:
            self._log.append(Reject, sequence=entry.sequence, reason=entry.problem)
        return [self._passed_over(e.sequence, None, e.problem) for e in reversed(found)]

    def _passed_over(self, sequence: int, step: int | None, reason: str) -> Rejected:
        rejected = Rejected(self._store.uri_of(slot_key(sequence)), step, reason)
        _log.warning("commit rejected", extra={"commit": rejected.uri, "reason": reason})
        return rejected

    def _refuse_if_all_bad(self, rejected: list[Rejected]) -> None:
        if rejected:
            names = "; ".join(map(str, rejected))
            raise CheckpointCorrupt(
                f"{self._store.uri}: no commit can be loaded ({names}); restore the objects, or "
                "start a new job"
            )

    def _retire(self, keep_step: int | None) -> None:
        commits = retention.to_retire(
            self._log.commits(),
            keep_last=self._keep_last,
            verified=self._verified,
            keep_step=keep_step,
        )
        retention.retire(self._store, self._log, commits)

    def _tidy(self, do: Callable[[], object]) -> None:
        """Clean-up that fails costs space, not the run: a later one does it again."""
        try:
            do()
        except StoreError as error:
            _log.warning("clean-up failed", extra={"error": str(error)})

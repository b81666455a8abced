"""The Checkpointer: save, commit, clean up and restore a DeepSpeed engine across ranks.

The numbered steps are those of storage.md. A save has two halves: a snapshot, for which training
waits, and the upload with its commit, which runs beside training in a thread of each rank.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import JsonValue

from kubedistill_trainer.checkpoint import retention, shards, snapshot, universal
from kubedistill_trainer.checkpoint.agreement import Gang
from kubedistill_trainer.checkpoint.configuration import differences
from kubedistill_trainer.checkpoint.errors import (
    CheckpointCorrupt,
    ConfigChanged,
)
from kubedistill_trainer.checkpoint.known import KnownRecords
from kubedistill_trainer.checkpoint.log import CommitEntry, CommitLog, Entry, slot_key
from kubedistill_trainer.checkpoint.records import Commit, Reject, ShardRecord, digest
from kubedistill_trainer.checkpoint.results import CommitInfo, Flight, Rejected, Restored
from kubedistill_trainer.checkpoint.staging import HostMemory
from kubedistill_trainer.store import NotFound, Store, StoreError

_log = logging.getLogger(__name__)


class Checkpointer:
    """One rank's side of a run's checkpoints. Every method but `flight` is collective over all
    ranks.

    `store` is at the run's prefix, `run` the job's identity. `scratch` is this rank's own folder,
    `node_scratch` one that the ranks of its node share (None: `scratch`). `config` is what
    `config_digest` is of, by name. `committed` is called on each rank after each commit.
    `control_group` and `upload_group` are two gloo groups of all ranks with timeouts (None for a
    single rank): the second one is for uploads and downloads, so its timeout is longer than any of
    them. Not thread-safe.
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
        upload_group: dist.ProcessGroup | None = None,
        memory_limit_bytes: int | None = None,
        node_scratch: Path | None = None,
        local_rank: int = 0,
        run: str = "",
        restart: int = 0,
        config: Mapping[str, JsonValue] | None = None,
        committed: Callable[[], object] = lambda: None,
    ) -> None:
        self._store = store
        self._scratch = scratch
        self._node_scratch = node_scratch or scratch
        self._local_rank = local_rank
        self._fence = fence
        self._rank = rank
        self._world_size = world_size
        self._config_digest = config_digest
        self._keep_last = keep_last
        self._gang = Gang(rank, world_size, control_group)
        self._transfers = Gang(rank, world_size, upload_group)
        self._memory = HostMemory(memory_limit_bytes)
        self._config = dict(config or {})
        self._committed = committed
        known = KnownRecords(scratch / "log", fresh=restart == 0)
        self._log = CommitLog(
            store, fence=fence, restart=restart, attempt=attempt, run=run, known=known
        )
        self._verified: int | None = None
        self._flight: Flight | None = None

    def open(self) -> None:
        """Step 1: rank 0 writes FENCE; then it clears away what earlier attempts left.

        Raises Fenced on every rank when a fence as high is in the log already.
        """
        self._gang.from_first(self._log.take_over)
        self._gang.from_first(
            lambda: self._tidy(lambda: retention.collect(self._store, self._log, self._fence))
        )

    @property
    def flight(self) -> Flight | None:
        """The save that was started last, until `finish` has told how it ended."""
        return self._flight

    def start(
        self,
        engine: Any,
        *,
        step: int,
        cursor: dict[str, JsonValue],
        keep_step: int | None = None,
        then: Callable[[CommitInfo], None] = lambda info: None,
    ) -> None:
        """First half of step 2: a snapshot; its upload and commit follow beside training.

        One upload is in flight: a save that was started before has been finished by then. Clean-up
        after the commit leaves the commit of `keep_step` alone. `then` is called by the upload's
        thread once the commit is made.

        Raises on every rank: CheckpointFailed when a snapshot cannot be taken.
        """
        assert self._flight is None, "finish the save before it"
        flight = Flight(step)
        folder = self._scratch / "save"
        taken: list[snapshot.Snapshot] = []

        def take() -> None:
            taken.append(snapshot.take(engine, folder, self._rank, self._memory))

        self._gang.gather(take)
        stall = time.monotonic() - flight.began
        limits = self._store.limits
        flight.limit_seconds = stall + sum(
            limits.deadline_seconds(file.size_bytes) for file in taken[0].files
        )
        if taken[0].on_disk_bytes:
            _log.warning(
                "memory is short: a part of the snapshot went to disk while training waited",
                extra={"step": step, "bytes": taken[0].on_disk_bytes},
            )

        def work() -> None:
            try:
                flight.info = self._upload_and_commit(flight, taken[0], stall, cursor)
                self._committed()
                then(flight.info)
                if self._rank == 0:
                    self._tidy(lambda: self._retire(keep_step))
            except Exception as error:
                flight.error = error
            snapshot.remove(folder)
            flight.ended.set()

        self._flight = flight
        threading.Thread(target=work, name="checkpoint", daemon=True).start()

    def finish(self) -> CommitInfo | None:
        """Wait for the upload that is in flight; its commit, or None where there was none.

        Raises on every rank: Fenced (exit, write nothing more), StoreError or CheckpointError
        (nothing was committed; the previous commit is valid, and another save may be tried).
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        flight.ended.wait()
        if flight.error is not None:
            raise flight.error
        return flight.info

    def save(
        self,
        engine: Any,
        *,
        step: int,
        cursor: dict[str, JsonValue],
        keep_step: int | None = None,
    ) -> CommitInfo:
        """Both halves at once. Raises what `start` and `finish` raise."""
        self.start(engine, step=step, cursor=cursor, keep_step=keep_step)
        info = self.finish()
        assert info is not None
        return info

    def _upload_and_commit(
        self,
        flight: Flight,
        taken: snapshot.Snapshot,
        stall: float,
        cursor: dict[str, JsonValue],
    ) -> CommitInfo:
        """Second half of step 2, and step 3. The ranks agree over the group for that."""
        data, receipts = self._upload(taken, flight)
        commit = self._transfers.from_first(
            lambda: self._commit(flight.step, cursor, data, receipts)
        ).record
        return CommitInfo(
            uri=self._store.uri_of(commit.data),
            step=flight.step,
            digest=digest(commit),
            size_bytes=commit.size_bytes,
            duration_seconds=time.monotonic() - flight.began,
            stall_seconds=stall,
            time=commit.time,
        )

    def _upload(self, taken: snapshot.Snapshot, flight: Flight) -> tuple[str, list[ShardRecord]]:
        """Step 2: upload under a prefix of its own; the prefix and the receipts of all ranks."""
        data = self._transfers.from_first(
            lambda: retention.data_prefix(self._fence, flight.step, str(uuid.uuid4()))
        )

        def own() -> list[ShardRecord]:
            receipts = shards.upload(self._store.child(data), taken.files, rank=self._rank)
            flight.uploaded()
            return receipts

        try:
            receipts = self._transfers.gather(own)
        except NotFound:
            # A newer attempt ends what an older one uploads: then that is why it is gone.
            self._transfers.from_first(self._log.refuse_if_overtaken)
            raise
        return data, [receipt for of_rank in receipts for receipt in of_rank]

    def restore(self, engine: Any, step: int | None = None) -> Restored | None:
        """Load the newest good commit into the engine; None when the run has none.

        With `step` the newest good commit of that step, or where there is none the newest of all.
        No save may be in flight.

        A commit that is missing, altered or torn gets a REJECT and the next older one is tried.
        Raises ConfigChanged on a good commit that does not fit, StoreError
        when the store cannot be read (which rejects nothing), Fenced when the run is taken over.
        """
        assert self._flight is None, "finish the save before it"
        # A newer attempt's commits are not ours to go on from.
        self._gang.from_first(self._log.refuse_if_overtaken)
        rejected = self._gang.from_first(self._reject_unreadable)
        while True:
            entry = self._gang.from_first(lambda: self._newest(step))
            if entry is None:
                self._refuse_if_all_bad(rejected)
                return None
            if problem := self._load(engine, entry):
                rejected.append(self._gang.from_first(partial(self._reject, entry, problem)))
                continue
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
            config=self._config,
        )
        assert isinstance(entry.record, Commit)
        return CommitEntry(entry.sequence, entry.record)

    def _newest(self, step: int | None) -> CommitEntry | None:
        commits = self._log.commits()
        wanted = [commit for commit in commits if commit.record.step == step]
        return next(reversed(wanted or commits), None)

    def _load(self, engine: Any, entry: CommitEntry) -> str:
        """Load a commit into the engine; or what is wrong with it, and then nothing is loaded."""
        self._refuse_misfit(entry)
        commit = entry.record
        if commit.world_size != self._world_size:
            return self._load_universal(engine, commit)
        folder = snapshot.empty(self._scratch / "restore")
        mine = [shard for shard in commit.shards if shard.shared or shard.rank == self._rank]
        try:
            problem = self._fetch(commit, mine, folder)
            if not problem:
                # Not by `gather`: a rank that fails in it ends, and so its peers within it do.
                snapshot.load(engine, folder, self._rank)
            return problem
        finally:
            snapshot.remove(folder)

    def _load_universal(self, engine: Any, commit: Commit) -> str:
        """The same for a commit of another number of ranks: each node's first rank converts it."""
        leads = self._local_rank == 0
        folder = self._node_scratch / "restore-universal"
        if leads:
            snapshot.empty(folder)
        all_but_generators = [
            s for s in commit.shards if not s.path.startswith(snapshot.RNG_PREFIX)
        ]
        try:
            problem = self._fetch(
                commit, all_but_generators if leads else [], universal.shard_folder(folder)
            )
            if not problem:
                self._transfers.gather(lambda: universal.convert(folder) if leads else None)
                universal.load(engine, folder, rank=self._rank, step=commit.step)
                self._gang.gather(lambda: None)  # before the folder goes
                _log.info(
                    "loaded by another number of ranks",
                    extra={"ranks": self._world_size, "committed_by": commit.world_size},
                )
            return problem
        finally:
            if leads:
                snapshot.remove(folder)

    def _fetch(self, commit: Commit, wanted: Sequence[ShardRecord], folder: Path) -> str:
        """Download what this rank needs, verified; what is wrong on any rank, or nothing."""
        store = self._store.child(commit.data)

        def fetch() -> str:
            try:
                if self._rank == 0:
                    shards.check_by_head(store, commit.shards)
                for shard in wanted:
                    shards.download(store, shard, folder / shard.path)
            except CheckpointCorrupt as error:
                return str(error)
            return ""

        # The agreement is a minimum: one rank that cannot load it is enough to pass it over. Ranks
        # that need little wait for those that need all: over the group that has the time. No
        # upload uses it now.
        return next((problem for problem in self._transfers.gather(fetch) if problem), "")

    def _refuse_misfit(self, entry: CommitEntry) -> None:
        commit, uri = entry.record, self._store.uri_of(slot_key(entry.sequence))
        if commit.config_digest != self._config_digest:
            found = differences(commit.config, self._config) if commit.config else []
            raise ConfigChanged(
                f"{uri}: another model or configuration: {'; '.join(found) or 'nothing is said of it'}"
                f" (digest {commit.config_digest!r}, this run has {self._config_digest!r}); start a "
                "new job for a changed specification"
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

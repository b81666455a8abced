"""The Checkpointer: save, commit, clean up and restore a DeepSpeed engine across ranks.

The numbered steps are those of storage.md. A save has two halves: a snapshot, for which training
waits, and the upload with its commit, which runs beside training in a thread of each rank.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import JsonValue

from kubedistill_trainer.checkpoint import resuming, retention, shards, snapshot
from kubedistill_trainer.checkpoint.agreement import Gang
from kubedistill_trainer.checkpoint.configuration import differences
from kubedistill_trainer.checkpoint.errors import (
    CheckpointCorrupt,
    CheckpointFailed,
    ConfigChanged,
    InputsChanged,
    NoUsableCommit,
)
from kubedistill_trainer.checkpoint.known import KnownRecords
from kubedistill_trainer.checkpoint.loading import Loader
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
    `config_digest` is of, by name. `known_step` is the newest step that is known from elsewhere to be
    committed. `committed` is called on each rank after each commit, `alive` after each part of what
    it restores.
    `control_group` and `upload_group` are two gloo groups of all ranks with timeouts (None for a
    single rank): the second one is for uploads and downloads, so its timeout is longer than any of
    them; `waits` tells when a rank begins to wait for its peers over it (True), and when it has
    ended (False). Not thread-safe.
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
        known_step: int = 0,
        committed: Callable[[], object] = lambda: None,
        waits: Callable[[bool], object] = lambda waiting: None,
        alive: Callable[[], object] = lambda: None,
    ) -> None:
        self._store = store
        self._scratch = scratch
        self._fence = fence
        self._rank = rank
        self._world_size = world_size
        self._config_digest = config_digest
        self._keep_last = keep_last
        self._gang = Gang(rank, world_size, control_group)
        self._transfers = Gang(rank, world_size, upload_group, waits)
        self._memory = HostMemory(memory_limit_bytes)
        self._config = dict(config or {})
        self._inputs: dict[str, JsonValue] = {}
        self._known_step = known_step
        self._committed = committed
        self._loader = Loader(
            store, scratch, node_scratch or scratch, local_rank, self._gang, self._transfers, alive
        )
        known = KnownRecords(scratch / "log", fresh=restart == 0)
        self._log = CommitLog(
            store, fence=fence, restart=restart, attempt=attempt, run=run, known=known
        )
        self._verified: int | None = None
        self._flight: Flight | None = None
        self._staging = scratch / "save"
        # A rank that was killed in a save may have left its snapshot.
        snapshot.remove(self._staging)

    def open(self) -> None:
        """Step 1: rank 0 writes FENCE; then it clears away what earlier attempts left.

        Raises Fenced on every rank when a fence as high is in the log already.
        """
        self._gang.from_first(self._log.take_over)
        self._gang.from_first(
            lambda: self._tidy(lambda: retention.collect(self._store, self._log, self._fence))
        )

    def pin_inputs(self, digests: Mapping[str, str]) -> None:
        """Digests of what the ranks have read, by name: commits say them, and a resume by other ones
        is refused. CheckpointFailed on every rank where they are not the same on all ranks."""
        of_first, *others = self._transfers.gather(lambda: dict(digests))
        for rank, mine in enumerate(others, 1):
            if found := differences(of_first, mine):
                raise CheckpointFailed(
                    f"rank {rank} has read other inputs than rank 0, so they were changed while the "
                    f"attempt started: {', '.join(one.partition(':')[0] for one in found)}"
                )
        self._inputs = dict(digests)

    def abort_earlier_uploads(self, store: Store) -> None:
        """Rank 0 aborts the multipart uploads below `store` that attempts before this one left."""
        self._gang.from_first(
            lambda: self._tidy(
                lambda: retention.abort_earlier_uploads(self._store, self._log, store)
            )
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
        folder = self._staging
        taken: list[snapshot.Snapshot] = []

        def take() -> None:
            taken.append(snapshot.take(engine, folder, self._rank, self._memory))

        try:
            self._gang.gather(take)
        except Exception:
            # Until the next save the disk has room again: on the ranks that had enough of it too.
            snapshot.remove(folder)
            raise
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

        One that is missing, altered or torn is passed over for the next older one, and gets a REJECT
        once an older one is loaded: where none is, the log stays as it was, so that objects that
        somebody puts back are found.

        Raises NoUsableCommit where something was committed and nothing of it can be loaded,
        ConfigChanged and InputsChanged on a good commit that does not fit, StoreError when the store
        cannot be read, Fenced when the run is taken over.
        """
        assert self._flight is None, "finish the save before it"
        # A newer attempt's commits are not ours to go on from.
        self._gang.from_first(self._log.refuse_if_overtaken)
        passed = self._gang.from_first(self._unreadable)
        while (entry := self._gang.from_first(lambda: self._newest(step, passed))) is not None:
            self._refuse_misfit(entry)
            problem = self._loader.load(engine, entry.record)
            if not problem:
                break
            passed.append(self._passed_over(entry.sequence, entry.record.step, problem))
        else:
            self._gang.from_first(lambda: self._refuse_to_begin_anew(passed))
            return None
        rejected = self._gang.from_first(lambda: self._reject(passed))
        self._verified = entry.sequence
        commit = entry.record
        uri = self._store.uri_of(commit.data)
        return Restored(commit.step, dict(commit.cursor), uri, rejected)

    def _commit(
        self, step: int, cursor: dict[str, JsonValue], data: str, receipts: list[ShardRecord]
    ) -> CommitEntry:
        """Step 3, on rank 0: HEAD every shard, then one COMMIT at the expected slot."""
        self._log.refuse_if_gone()
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
            config=self._config | self._inputs,
        )
        assert isinstance(entry.record, Commit)
        return CommitEntry(entry.sequence, entry.record)

    def _newest(self, step: int | None, passed: Sequence[Rejected]) -> CommitEntry | None:
        over = {one.sequence for one in passed}
        commits = [commit for commit in self._log.commits() if commit.sequence not in over]
        wanted = [commit for commit in commits if commit.record.step == step]
        return next(reversed(wanted or commits), None)

    def _refuse_misfit(self, entry: CommitEntry) -> None:
        commit, uri = entry.record, self._store.uri_of(slot_key(entry.sequence))
        if commit.config_digest != self._config_digest:
            found = differences(_without(commit.config, self._inputs), self._config)
            said = "; ".join(found) if commit.config else ""
            raise ConfigChanged(
                f"{uri}: another model or configuration: {said or 'nothing is said of it'}"
                f" (digest {commit.config_digest!r}, this run has {self._config_digest!r}); start a "
                "new job for a changed specification"
            )
        # Commits of earlier versions say nothing of their inputs.
        known = {name: value for name, value in commit.config.items() if name in self._inputs}
        if found := differences(known, {name: self._inputs[name] for name in known}):
            raise InputsChanged(
                f"{uri}: step {commit.step} was trained on other inputs: {'; '.join(found)}; put back "
                "what was there, or start a new job"
            )

    def _unreadable(self) -> list[Rejected]:
        found: list[Entry] = self._log.unreadable()
        return [self._passed_over(e.sequence, None, e.problem) for e in reversed(found)]

    def _passed_over(self, sequence: int, step: int | None, reason: str) -> Rejected:
        return Rejected(self._store.uri_of(slot_key(sequence)), step, reason, sequence)

    def _reject(self, passed: list[Rejected]) -> list[Rejected]:
        """Write that they were passed over; they, and a commit that has left the log."""
        for one in passed:
            self._log.append(Reject, sequence=one.sequence, reason=one.reason)
            _log.warning("commit rejected", extra={"commit": one.uri, "reason": one.reason})
        if lost := self._left_the_log():
            _log.warning("a commit has left the log", extra={"step": lost.step})
        return [*passed, *([lost] if lost else [])]

    def _left_the_log(self) -> Rejected | None:
        uri = self._store.uri_of("log")
        return resuming.left_the_log(self._log.history(), self._known_step, uri)

    def _refuse_to_begin_anew(self, passed: list[Rejected]) -> None:
        lost = self._left_the_log()
        known = [*passed, *resuming.rejected_before(self._log.history(), self._store.uri_of)]
        if found := [*known, *([lost] if lost else [])]:
            raise NoUsableCommit(resuming.no_usable_commit(self._store.uri, found))

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


def _without(config: Mapping[str, JsonValue], names: Iterable[str]) -> dict[str, JsonValue]:
    return {name: value for name, value in config.items() if name not in names}

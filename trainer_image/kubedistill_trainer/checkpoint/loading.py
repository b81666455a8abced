"""Load one commit into the engines of all ranks, or say what is wrong with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kubedistill_trainer.checkpoint import shards, snapshot, universal
from kubedistill_trainer.checkpoint.agreement import Gang
from kubedistill_trainer.checkpoint.errors import CheckpointCorrupt
from kubedistill_trainer.checkpoint.records import Commit, ShardRecord
from kubedistill_trainer.store import Store

_log = logging.getLogger(__name__)


class Loader:
    """One rank's side of it. `transfers` is the gang over the group that has time for downloads."""

    def __init__(
        self,
        store: Store,
        scratch: Path,
        node_scratch: Path,
        local_rank: int,
        gang: Gang,
        transfers: Gang,
        alive: Callable[[], object],
    ) -> None:
        """`alive` is called after each part that is downloaded."""
        self._store = store
        self._scratch = scratch
        self._node_scratch = node_scratch
        self._local_rank = local_rank
        self._gang = gang
        self._transfers = transfers
        self._alive = alive

    def load(self, engine: Any, commit: Commit) -> str:
        """Collective. What is wrong with the commit, and then nothing is loaded; empty where it is.

        Raises on every rank what goes wrong otherwise: StoreError, CheckpointFailed.
        """
        if commit.world_size != self._gang.world_size:
            return self._load_universal(engine, commit)
        folder, rank = snapshot.empty(self._scratch / "restore"), self._gang.rank
        mine = [shard for shard in commit.shards if shard.shared or shard.rank == rank]
        try:
            problem = self._fetch(commit, mine, folder)
            if not problem:
                # Not by `gather`: a rank that fails in it ends, and so its peers within it do.
                snapshot.load(engine, folder, rank)
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
                universal.load(engine, folder, rank=self._gang.rank, step=commit.step)
                self._gang.gather(lambda: None)  # before the folder goes
                _log.info(
                    "loaded by another number of ranks",
                    extra={"ranks": self._gang.world_size, "committed_by": commit.world_size},
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
                if self._gang.rank == 0:
                    shards.check_by_head(store, commit.shards)
                for shard in wanted:
                    shards.download(store, shard, folder / shard.path, self._alive)
            except CheckpointCorrupt as error:
                return str(error)
            return ""

        # The agreement is a minimum: one rank that cannot load it is enough to pass it over. Ranks
        # that need little wait for those that need all: over the group that has the time. No
        # upload uses it now.
        return next((problem for problem in self._transfers.gather(fetch) if problem), "")

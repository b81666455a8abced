"""Ranks learn of a failure together, over the control-plane group (gloo, never NCCL)."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from kubedistill_trainer.checkpoint.errors import CheckpointError, CheckpointFailed
from kubedistill_trainer.store import StoreError

T = TypeVar("T")


class Gang:
    """The ranks that must agree; alone it needs no process group.

    Objects travel by pickle between ranks of one gang only, which trust each other.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        group: dist.ProcessGroup | None,
        waits: Callable[[bool], object] = lambda waiting: None,
    ) -> None:
        """`waits` is called with True when this rank's own part is done and it begins to wait for its
        peers, and with False once it has their answers."""
        self.rank = rank
        self.world_size = world_size
        self._group = group
        self._waits = waits

    def gather(self, do: Callable[[], T]) -> list[T]:
        """Call `do` on every rank; the results by rank.

        If it fails anywhere, every rank raises the error of the lowest rank that failed: a
        StoreError or CheckpointError as it is with the rank in its text, CheckpointFailed for
        anything else. Only Exceptions travel; a rank that is killed is the group timeout's affair.
        """
        outcome: tuple[bool, T | Exception]
        cause: Exception | None = None
        try:
            outcome = (True, do())
        except Exception as error:
            cause, outcome = error, (False, _for_peers(error, self.rank))
        outcomes = self._exchange(outcome)
        results: list[T] = []
        for rank, (succeeded, value) in enumerate(outcomes):
            if not succeeded:
                assert isinstance(value, Exception)
                raise value from (cause if rank == self.rank else None)
            results.append(value)  # type: ignore[arg-type]
        return results

    def from_first(self, do: Callable[[], T]) -> T:
        """Call `do` on rank 0 only; its result on every rank. Fails as `gather` does."""
        return self.gather(lambda: do() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _exchange(self, outcome: tuple[bool, T | Exception]) -> list[tuple[bool, T | Exception]]:
        if self.world_size == 1:
            return [outcome]
        outcomes: list[tuple[bool, T | Exception]] = [outcome] * self.world_size
        self._waits(True)
        dist.all_gather_object(outcomes, outcome, group=self._group)
        self._waits(False)
        return outcomes


def _for_peers(error: Exception, rank: int) -> Exception:
    """What the peers raise: the same kind where they know it, with the rank in the text."""
    if isinstance(error, StoreError):
        told: Exception = type(error)(error.operation, error.uri, f"{error.problem} (rank {rank})")
    elif isinstance(error, CheckpointError):
        told = type(error)(f"{error} (rank {rank})")
    else:
        return CheckpointFailed(f"rank {rank}: {type(error).__name__}: {error}")
    pickle.dumps(told)  # a kind that cannot travel must not hang the peers: fail here, in tests
    return told

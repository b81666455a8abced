"""What the ranks tell each other after each step, in one small all-reduce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Losses(NamedTuple):
    """Mean losses a token of one step, over all ranks."""

    soft: float
    hard: float
    features: float
    total: float


@dataclass(frozen=True)
class Word:
    """What one rank has to say."""

    asked_to_stop: bool
    save_is_due: bool
    """Asked of rank 0 alone."""
    save_failed: bool
    """A save that was in flight has ended with an error."""
    lacks_teacher: bool
    """The teacher's outputs for the next step's batch are not there yet."""
    own_seconds: float
    """Of the step, before the rank waited for any other."""
    losses: torch.Tensor
    """This rank's share of each of `Losses`, float64 [4]."""


@dataclass(frozen=True)
class Agreed:
    """What all ranks know alike."""

    asked_to_stop: bool
    save_is_due: bool
    save_failed: bool
    lacks_teacher: bool
    own_seconds: list[float]
    """By rank."""
    losses: Losses


def any_rank(flag: bool, group: Any) -> bool:
    """Collective over all ranks: whether the flag is raised on any of them."""
    raised = torch.tensor(float(flag))
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=group)
    return bool(raised)


def agree(word: Word, rank: int, world_size: int, group: Any) -> Agreed:
    """Collective over all ranks. Flags hold where any rank raised them; losses are added up."""
    due = word.save_is_due and rank == 0
    flags = [word.asked_to_stop, due, word.save_failed, word.lacks_teacher]
    own = torch.zeros(world_size, dtype=torch.float64)
    own[rank] = word.own_seconds
    message = torch.cat([torch.tensor(flags, dtype=torch.float64), own, word.losses])
    dist.all_reduce(message, group=group)
    stop, is_due, failed, lacks, *rest = message.tolist()
    own_seconds, losses = rest[:world_size], Losses(*rest[world_size:])
    return Agreed(stop > 0, is_due > 0, failed > 0, lacks > 0, own_seconds, losses)

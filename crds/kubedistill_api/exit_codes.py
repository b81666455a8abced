"""Exit codes of the trainer's containers: an API between trainer and operator.

The operator decides from the code alone whether an attempt is retried and whether the retry is
charged to `backoffLimit`; people read the reason in `status.attempts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from kubedistill_api import reasons


class ExitCode(IntEnum):
    """What a trainer's container says when it ends."""

    SUCCESS = 0
    UNKNOWN = 1
    BAD_CONFIGURATION = 10
    GRACEFUL_CHECKPOINT = 11
    FENCED = 12
    UNREADABLE_INPUT = 13
    OUT_OF_MEMORY = 14
    STORAGE_UNAVAILABLE = 15
    STALLED = 16
    PEER_LOST = 17
    INTERRUPTED = 18
    STREAM_DAMAGED = 19
    ENDPOINT_UNAVAILABLE = 20
    COST_LIMIT = 21
    NON_FINITE_LOSS = 22
    RESUME_REFUSED = 23


@dataclass(frozen=True)
class ExitPolicy:
    """What the operator does after an exit code.

    retry: a next attempt may start.  charged: the attempt counts against `backoffLimit`.
    """

    reason: str
    retry: bool
    charged: bool
    meaning: str


POLICIES: dict[ExitCode, ExitPolicy] = {
    ExitCode.SUCCESS: ExitPolicy(reasons.COMPLETED, False, False, "the job is done"),
    ExitCode.UNKNOWN: ExitPolicy(reasons.ERROR, True, True, "an error without a code of its own"),
    ExitCode.BAD_CONFIGURATION: ExitPolicy(
        reasons.INVALID_SPEC, False, False, "the spec cannot work; the message names the field"
    ),
    ExitCode.GRACEFUL_CHECKPOINT: ExitPolicy(
        reasons.GRACEFUL_CHECKPOINT, True, False, "asked to stop, committed, stopped"
    ),
    # Of the newest attempt there is: the log knows another, which the next one outbids.
    ExitCode.FENCED: ExitPolicy(reasons.FENCED, True, True, "another attempt owns the run"),
    ExitCode.UNREADABLE_INPUT: ExitPolicy(
        reasons.UNREADABLE_INPUT, False, False, "data or a model cannot be read or does not fit"
    ),
    ExitCode.OUT_OF_MEMORY: ExitPolicy(reasons.OUT_OF_MEMORY, True, True, "memory ran out"),
    ExitCode.STORAGE_UNAVAILABLE: ExitPolicy(
        reasons.STORAGE_UNAVAILABLE, True, True, "the object store did not answer in time"
    ),
    ExitCode.STALLED: ExitPolicy(reasons.STALLED, True, True, "no step within the stall timeout"),
    ExitCode.PEER_LOST: ExitPolicy(
        reasons.PEER_LOST, True, True, "another rank ended; its own exit says why"
    ),
    ExitCode.INTERRUPTED: ExitPolicy(
        reasons.INTERRUPTED, True, False, "asked to stop with too little grace to commit"
    ),
    ExitCode.STREAM_DAMAGED: ExitPolicy(
        reasons.STREAM_DAMAGED, True, True, "a shard is damaged; the teacher writes it again first"
    ),
    ExitCode.ENDPOINT_UNAVAILABLE: ExitPolicy(
        reasons.ENDPOINT_UNAVAILABLE, True, True, "the teacher's server did not answer in all tries"
    ),
    ExitCode.COST_LIMIT: ExitPolicy(
        reasons.COST_LIMIT_REACHED, False, False, "the teacher's answers cost as much as they may"
    ),
    ExitCode.NON_FINITE_LOSS: ExitPolicy(
        reasons.NON_FINITE_LOSS, False, False, "the loss is no number: the same would come again"
    ),
    ExitCode.RESUME_REFUSED: ExitPolicy(
        reasons.RESUME_REFUSED,
        False,
        False,
        "what was committed cannot be gone on from, and nothing begins anew by itself",
    ),
}


def policy(code: int | None) -> ExitPolicy:
    """The policy of a container's exit code; codes that are not ours count as UNKNOWN.

    137 (SIGKILL) and 143 (SIGTERM) come from outside the trainer and are charged: without a
    `DisruptionTarget` condition nobody meant them.
    """
    try:
        return POLICIES[ExitCode(code)] if code is not None else POLICIES[ExitCode.UNKNOWN]
    except ValueError:
        return POLICIES[ExitCode.UNKNOWN]

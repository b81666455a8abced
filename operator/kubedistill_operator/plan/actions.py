"""What a plan asks the reconciler to do. All of it may be done twice without harm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kubedistill_api.chain import DistillationChainStatus
from kubedistill_api.runspec import ResolvedModel
from kubedistill_api.status import DistillationJobStatus
from kubedistill_api.sweep import SweepTable


@dataclass(frozen=True)
class Inputs:
    """Models whose place is known, and the digest of all that determines the result."""

    digest: str
    teacher: ResolvedModel | None = None
    student: ResolvedModel | None = None


@dataclass(frozen=True)
class CreatePreflight:
    """The preflight's ConfigMap and Job."""

    inputs: Inputs
    tries: int = 0


@dataclass(frozen=True)
class CreateTeacher:
    """The teacher writers' ConfigMap and Job.

    `tries` is the last attempt that found the stream damaged: a Job with a lower one ran before.
    """

    tries: int = 0


@dataclass(frozen=True)
class CreateGang:
    """The Service, ConfigMap and Job of an attempt that status.attempts already holds."""

    attempt: int
    fence: int


@dataclass(frozen=True)
class DeleteBatchJob:
    """Delete a Job and, before it counts as gone, its pods."""

    name: str


@dataclass(frozen=True)
class DeletePod:
    """Delete a pod that nothing else takes along; `uid` says which one of that name."""

    name: str
    uid: str


@dataclass(frozen=True)
class AbandonPod:
    """Say in its stead that a pod of a lost node has failed, and remove it.

    Its Job makes no other one before that. Should its processes still run, they run on.
    """

    name: str
    uid: str


@dataclass(frozen=True)
class DeleteFinished:
    """Delete the DistillationJob itself, as it was when that was decided; its children follow."""


@dataclass(frozen=True)
class RestoreInputs:
    """Create what pods that do not start may miss: their ConfigMap, and the gang's Service.

    Of the gang's `attempt`, or of the preflight (with `inputs`), or of the teacher.
    """

    role: str
    attempt: int = 0
    inputs: Inputs | None = None


@dataclass(frozen=True)
class RestoreService:
    """Create or mend the Service by which the ranks of a gang that runs find each other."""


@dataclass(frozen=True)
class ScaleBatchJob:
    name: str
    parallelism: int


@dataclass(frozen=True)
class SuspendBatchJob:
    name: str
    suspend: bool


@dataclass(frozen=True)
class CreateStageJob:
    """A stage's DistillationJob, or that of one trial of its sweep."""

    name: str
    stage: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class SuspendStageJob:
    name: str
    suspend: bool


@dataclass(frozen=True)
class SetStageFields:
    """Give a stage's DistillationJob what may change of it, as the chain's spec now says; None: none."""

    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class CreateReport:
    """The ConfigMap and Job that write a finished sweep into its trials' reports.

    They belong to `job`, a DistillationJob.
    """

    job: str
    sweep: SweepTable


Action = (
    CreatePreflight
    | CreateTeacher
    | CreateGang
    | DeleteBatchJob
    | DeletePod
    | AbandonPod
    | DeleteFinished
    | RestoreInputs
    | RestoreService
    | ScaleBatchJob
    | SuspendBatchJob
    | CreateStageJob
    | SuspendStageJob
    | SetStageFields
    | CreateReport
)


@dataclass(frozen=True)
class Refusal:
    """An action that the API server refused when it was last tried."""

    action: Action
    reason: str
    message: str


@dataclass(frozen=True)
class Event:
    """A line of the story that `kubectl describe` tells."""

    reason: str
    message: str
    warning: bool = False


@dataclass(frozen=True)
class Plan:
    """The status to write first, then what to do, then what to tell, and when to look again."""

    status: DistillationJobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None


@dataclass(frozen=True)
class ChainPlan:
    """The same for a chain."""

    status: DistillationChainStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None
    stage_states: Mapping[str, str] = field(default_factory=dict)

"""What the operator hands the trainer (`run.json`), and what the trainer hands back.

Back come two documents: `ProgressReport` from rank 0's /progress while it runs, and `Outcome` as
the container's termination message (at most 4096 bytes), which outlives the container and needs no
permission but to read pods.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from kubedistill_api.base import ApiModel
from kubedistill_api.job import IMMUTABLE_PARTS, DistillationJobSpec
from kubedistill_api.status import (
    CheckpointStatus,
    Metric,
    ModelStatus,
    PayloadProbe,
    Resolved,
    TeacherStreamStatus,
    WeakestSlice,
)
from kubedistill_api.status import ResolvedModel as ResolvedModel
from kubedistill_api.sweep import SweepTable

TERMINATION_MESSAGE_PATH = "/dev/termination-log"
TERMINATION_MESSAGE_BYTES = 4096


class Rendezvous(ApiModel):
    """Where the ranks of a gang meet: static, rank 0's pod."""

    host: str
    port: int
    nodes: int = 1
    ranks_per_node: int = 1


class RunSpec(ApiModel):
    """One container's whole knowledge of its run."""

    namespace: str
    name: str
    uid: str
    chain: str = ""
    stage: str = ""
    role: Literal["preflight", "teacher", "student", "report"]
    attempt: int = 0
    fence: int = 0
    spec: DistillationJobSpec
    inputs_digest: str = Field(
        description="Digest of what determines the result; pins a checkpoint."
    )
    teacher_model: ResolvedModel | None = None
    student_model: ResolvedModel | None = None
    rendezvous: Rendezvous | None = None
    memory_limit_bytes: int | None = Field(
        None, description="Memory limit of a student's container, if it has one."
    )
    termination_grace_seconds: int = 30
    micro_batch_size: int | None = Field(
        None, description="In place of the spec's, after an attempt that ran out of memory."
    )
    mean_seconds_between_failures: float | None = Field(
        None, description="Of this job's attempts so far; None while none has failed."
    )
    save_seconds: float | None = Field(
        None, description="Longest save of this job's attempts so far; None while there was none."
    )
    committed_step: int | None = Field(
        None, description="Newest step that the job's status knows to be committed; None for none."
    )
    failures_seen: int | None = Field(None, description="How many failures that mean is of.")
    sweep: SweepTable | None = Field(None, description="Of a report: what is added to it.")

    def configuration(self) -> dict[str, Any]:
        """What determines the result, flat: `training.learningRate` → 2e-05. No nulls."""
        wire = self.spec.to_wire()
        parts: dict[str, Any] = {name: wire[name] for name in IMMUTABLE_PARTS if name in wire}
        models = (
            ("teacher.model.digest", self.teacher_model),
            ("student.model.digest", self.student_model),
        )
        digests = {name: model.digest for name, model in models if model is not None}
        return dict(_flat(parts)) | digests


class ProgressReport(ApiModel):
    """Rank 0's /progress. Times are Unix seconds."""

    phase: Literal[
        "Starting", "Generating", "Training", "Compressing", "Evaluating", "Exporting", "Done"
    ] = "Starting"
    attempt: int = 0
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    estimated_remaining_seconds: float | None = None
    last_step_time: float | None = None
    resumed_from_step: int | None = None
    checkpoint: CheckpointStatus | None = None
    rejected_checkpoints: list[str] = []
    teacher_stream: TeacherStreamStatus | None = None
    save_seconds: float | None = Field(
        None, description="Longest save of a checkpoint so far, from its snapshot to its commit."
    )
    stall_seconds: float | None = Field(
        None, description="Longest time that training waited for a snapshot."
    )
    save_problem: str = Field("", description="Why the last save failed; empty where it did not.")
    grace_problem: str = Field(
        "", description="Why a save does not fit the pod's grace; empty where it does."
    )
    rank_restarts: int = Field(
        0, description="Starts of the ranks within the attempt, but the first."
    )
    restart_reason: str = Field("", description="Why the ranks before these ended.")
    straggler: str = Field("", description="The rank that the others wait for, and by how much.")
    skipped_steps: list[int] = Field([], description="Steps left out for a loss that is no number.")
    step_seconds: float | None = Field(None, description="99th percentile of a step's time.")


class Problem(ApiModel):
    """One thing wrong with the inputs, in words that a person can act on."""

    field: str = Field(description="Path in the object, such as spec.data.sources[0].uri.")
    found: str
    expected: str

    def sentence(self) -> str:
        return f"{self.field}: found {self.found}; {self.expected}"


class Outcome(ApiModel):
    """The last word of a container."""

    reason: str
    message: str = ""
    problems: list[Problem] = []
    resolved: Resolved | None = None
    progress: ProgressReport | None = None
    model: ModelStatus | None = None
    metrics: list[Metric] = []
    weakest: list[WeakestSlice] = []

    def to_termination_message(self) -> str:
        """JSON within the kubelet's limit: long texts and tables are shortened, never the structure."""
        text_limit = 1500
        value = self
        while True:
            text = value.model_dump_json(by_alias=True, exclude_none=True, exclude_defaults=True)
            if len(text.encode()) <= TERMINATION_MESSAGE_BYTES or text_limit < 50:
                return text
            value = self._shortened(text_limit)
            text_limit //= 2

    def _shortened(self, limit: int) -> Outcome:
        problems = [
            Problem(field=p.field[:limit], found=p.found[:limit], expected=p.expected[:limit])
            for p in self.problems[:4]
        ]
        changes: dict[str, Any] = {"message": self.message[:limit], "problems": problems}
        if self.progress is not None and self.progress.teacher_stream is not None:
            stream = self.progress.teacher_stream
            fewer = stream.model_copy(update={"probe": _worst_rows(stream.probe)})
            changes["progress"] = self.progress.model_copy(update={"teacher_stream": fewer})
        return self.model_copy(update=changes)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _worst_rows(rows: Sequence[PayloadProbe]) -> list[PayloadProbe]:
    """Of each payload the temperature at which it keeps least: the row that decides."""
    worst: dict[str, PayloadProbe] = {}
    for row in rows:
        known = worst.get(row.payload)
        if known is None or row.gradient_error > known.gradient_error:
            worst[row.payload] = row
    return list(worst.values())

"""The spec and status of a DistillationChain: stages, each taught by the one before."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints

from kubedistill_api.base import ApiModel, cel, rules
from kubedistill_api.references import ModelSource, Preserved
from kubedistill_api.status import Conditions
from kubedistill_api.sweep import Sweep, TrialStatus
from kubedistill_api.teacher import MAX_TEMPERATURES

StageName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=40),
]
PARTIAL_MARK = "x-kubedistill-partial-job-spec"
STAGE_MARK = "x-kubedistill-stage"
MAX_RETRIES = 8
Retry = Annotated[Preserved, Field(description="Part of a job's spec.")]
GatePolicy = Literal["Stop", "Continue", "Retry"]
PartialJobSpec = Annotated[dict[str, Any], Field(json_schema_extra={PARTIAL_MARK: True})]
"""Any part of a DistillationJob's spec. It is merged first and checked as a whole afterwards."""


class InitialTeacher(ApiModel):
    """The teacher of the first stage that has none of its own."""

    model: ModelSource = Field(description="A model folder in S3.")


class Stage(ApiModel):
    """One stage: a name, and what differs from the template (any part of a job's spec)."""

    model_config = ConfigDict(extra="allow", json_schema_extra={STAGE_MARK: True})
    name: StageName = Field(description="Name of the stage; its job is <chain>-<name>.")
    sweep: Sweep | None = Field(
        None, description="One job a value of what is swept over; the best one's student goes on."
    )
    on_gate_failure: GatePolicy | None = Field(
        None, description="For this stage, in place of the chain's `onGateFailure`."
    )
    retries: list[Retry] = Field(
        [],
        max_length=MAX_RETRIES,
        description="For `onGateFailure: Retry`: what the stage is tried with next, one after the "
        "other, until its gates hold; each merged over the stage, such as {training: {epochs: 6}}.",
    )

    def job_part(self) -> dict[str, Any]:
        """Merged over the template by JSON merge patch (RFC 7386)."""
        return dict(self.model_extra or {})


class DistillationChainSpec(ApiModel):
    """A progressive sequence of DistillationJobs."""

    model_config = rules(
        [
            cel(
                "self.stages.all(a, self.stages.exists_one(b, b.name == a.name))",
                "two stages have the same name: names of stages must differ",
                ".stages",
            )
        ]
    )
    initial_teacher: InitialTeacher | None = Field(
        None, description="Teacher of the first stage that distils."
    )
    template: PartialJobSpec = Field({}, description="What all stages share: part of a job's spec.")
    stages: list[Stage] = Field(min_length=1, max_length=32, description="Stages, in order.")
    on_gate_failure: GatePolicy = Field(
        "Stop",
        description="Where a stage's student breaks a gate. Stop: the chain fails there. Continue: it "
        "goes on with that student. Retry: the stage is tried with its `retries`, and the chain "
        "stops where none of them helps, or there are none.",
    )
    suspend: bool = Field(False, description="True: suspend the running stage, start no other.")


class StageStatus(ApiModel):
    """One stage as observed."""

    name: str = Field(max_length=50, description="Name of the stage.")
    job_name: str = Field(
        "", max_length=63, description="Its DistillationJob; of a sweep the chosen trial's."
    )
    state: str = Field("", max_length=64, description="Reason of that job's Succeeded condition.")
    model: str = Field("", max_length=2048, description="URI of its model.")
    perplexity: float | None = Field(None, description="Held-out perplexity of its model.")
    parameters: int = Field(0, description="Parameters of its model.")
    trials: list[TrialStatus] = Field(
        [], max_length=MAX_TEMPERATURES, description="Trials of its sweep."
    )
    choice: str = Field("", max_length=1024, description="Which trial was chosen, and why.")
    report: Literal["", "Writing", "Written", "Failed"] = Field(
        "", description="Whether the trials' reports have the table of the sweep."
    )


class DistillationChainStatus(ApiModel):
    """Observed state of a DistillationChain."""

    observed_generation: int = Field(0, description="Generation of the spec that was looked at.")
    conditions: Conditions = Field([], description="Conditions by type; Succeeded is the summary.")
    current_stage: str = Field("", max_length=64, description='Such as "13b 2/5".')
    progress: int = Field(0, description="Percent of all stages' steps, each stage alike.")
    estimated_remaining: str = Field("", max_length=32, description="Of the running job.")
    stages: list[StageStatus] = Field([], max_length=32, description="Stages, in order.")

"""What the operator reports: conditions, progress, checkpoint, model, attempts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kubedistill_api.base import ApiModel


class Condition(ApiModel):
    """One condition, as in metav1.Condition."""

    type: str = Field(max_length=64, description="Name of the condition.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field("", max_length=64, description="One word for why.")
    message: str = Field("", max_length=4096, description="The same for people.")
    last_transition_time: str = Field("", max_length=64, description="When status last changed.")
    observed_generation: int = Field(0, description="Generation of the spec that it speaks of.")


Conditions = Annotated[
    list[Condition],
    Field(
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]


class Progress(ApiModel):
    """How far training is."""

    step: int = Field(0, description="Optimizer steps done.")
    total_steps: int = Field(0, description="Optimizer steps in all.")
    percentage: int = Field(0, description="Steps done, in percent.")
    tokens_per_second: float | None = Field(
        None, description="Tokens that all ranks take a second."
    )
    loss: float | None = Field(None, description="Mean loss a token of the latest step.")
    loss_text: str = Field("", max_length=32, description="The loss, for the table.")
    estimated_remaining: str = Field("", max_length=32, description="Time left, such as 3h12m.")
    last_updated_time: str = Field("", max_length=64, description="When rank 0 last said so.")
    straggler: str = Field(
        "", max_length=256, description="The rank that the others wait for, and by how much."
    )
    skipped_steps: list[int] = Field(
        [], max_length=64, description="Steps left out because their loss was no number."
    )


class CheckpointStatus(ApiModel):
    """The newest commit."""

    uri: str = Field("", max_length=2048, description="Prefix of its shards.")
    step: int = Field(0, description="Optimizer steps that it holds.")
    time: str = Field("", max_length=64, description="When it was committed.")
    digest: str = Field("", max_length=128, description="SHA-256 of its record.")


class ModelStatus(ApiModel):
    """The finished model."""

    uri: str = Field("", max_length=2048, description="Folder in Hugging Face layout.")
    digest: str = Field("", max_length=128, description="SHA-256 over its files.")
    parameters: int = Field(0, description="Number of parameters.")
    report: str | None = Field(
        None,
        max_length=2048,
        description="Folder of its report and card, where they are not in its own.",
    )


class Metric(ApiModel):
    """One figure of the evaluation."""

    name: str = Field(max_length=64, description="Such as perplexity or perplexityRatio.")
    value: float = Field(description="Its value.")


class WeakestSlice(ApiModel):
    """The held-out text on which a figure is worst: more of its like is what the next run needs."""

    metric: str = Field(max_length=64, description="The figure.")
    source: str = Field(max_length=2048, description="The file that the text is of.")
    tokens: int = Field(0, description="Held-out tokens of it.")


class Attempt(ApiModel):
    """One run of the gang."""

    number: int = Field(description="Counts from 1.")
    fence: int = Field(0, description="Fencing epoch: a commit with a lower one is refused.")
    start_time: str = Field("", max_length=64, description="When its Job was asked for.")
    end_time: str = Field("", max_length=64, description="When its last pod ended.")
    reason: str = Field("", max_length=64, description="Why it ended.")
    message: str = Field("", max_length=1024, description="The same for people.")
    charged: bool = Field(False, description="Whether it counts against backoffLimit.")
    resumed_from_step: int | None = Field(
        None, description="Step of the commit that it began with."
    )
    last_step: int = Field(0, description="Last step that it reported.")
    rank_restarts: int = Field(
        0, description="How often its ranks were started again in their pods; not charged."
    )
    nodes: int = Field(0, description="Pods of the gang; 0 for all of spec.workers.nodes.")
    placed_nodes: int = Field(
        0, description="Pods that found a place, where it ended because others found none."
    )
    micro_batch_size: int = Field(
        0, description="Sequences that a rank takes at once; 0 for spec.training.microBatchSize."
    )


class PayloadProbe(ApiModel):
    """What one payload keeps of the teacher at one temperature, measured on a part of the data."""

    payload: str = Field(max_length=64, description="Payload, such as Sparse, K=100.")
    temperature: float = Field(description="Temperature of the soft term.")
    bytes_per_token: float = Field(description="Encoded size of a token.")
    kept_mass: float = Field(description="Share of the teacher's probability that is kept.")
    gradient_error: float = Field(
        description="Norm of the error of the logits' gradient, relative to the exact gradient."
    )
    angle_degrees: float = Field(description="Angle between both gradients.")


class TeacherStreamStatus(ApiModel):
    """What the teacher wrote."""

    uri: str = Field("", max_length=2048, description="Prefix of the stream.")
    digest: str = Field("", max_length=128, description="Digest of what made it.")
    payload: str = Field("", max_length=32, description="Sparse, Sampled, Hidden or Text.")
    bytes: int = Field(0, description="Bytes committed.")
    tokens: int = Field(0, description="Tokens committed; of a text those of the answers.")
    complete: bool = Field(False, description="Whether all of it is there.")
    lag_tokens: int = Field(0, description="Tokens committed that the student has not read yet.")
    held: bool = Field(False, description="Whether a writer waits because of its byteBudget.")
    wait_seconds: float = Field(0.0, description="Seconds that rank 0 waited for the stream.")
    probe: list[PayloadProbe] = Field(
        [], max_length=128, description="What `payload: Auto` measured before it chose."
    )
    answers: int = Field(0, description="Answers committed, of a teacher that is learnt by text.")
    prompt_tokens: int = Field(0, description="Tokens of the prompts of these answers.")
    answer_tokens: int = Field(0, description="Tokens of these answers, reasoning included.")
    evaluation_tokens: int = Field(
        0, description="Tokens for which the endpoint's model was asked tasks and questions."
    )
    cost: float | None = Field(
        None, description="What all these tokens cost by `endpoint.price`, whoever asked for them."
    )
    learnt: str = Field("", max_length=512, description="How many answers the filters kept.")


class ResolvedModel(ApiModel):
    """A model whose place is known: of the spec, or of a finished job (then with its digest)."""

    uri: str = Field(max_length=2048, description="Folder in Hugging Face layout.")
    digest: str = Field("", max_length=128, description="SHA-256 over its files, of a job's model.")
    job: str = Field("", max_length=253, description="The job that made it.")


class Resolved(ApiModel):
    """What the preflight found out about the inputs."""

    inputs_digest: str = Field("", max_length=128, description="Digest of the inputs checked.")
    teacher_model: ResolvedModel | None = Field(
        None, description="The teacher, as it was when the inputs were accepted."
    )
    student_model: ResolvedModel | None = Field(
        None, description="The model that the student begins as, likewise."
    )
    student_parameters: int = Field(0, description="Parameters of the student.")
    total_steps: int = Field(0, description="Optimizer steps in all.")
    training_tokens: int = Field(0, description="Tokens of one epoch.")
    data_digest: str = Field("", max_length=128, description="Digest of the data.")
    stream_uri: str = Field("", max_length=2048, description="Where the stream is or will be.")
    stream_complete: bool = Field(False, description="Whether the stream was there already.")


class DistillationJobStatus(ApiModel):
    """Observed state of a DistillationJob."""

    observed_generation: int = Field(0, description="Generation of the spec that was looked at.")
    conditions: Conditions = Field([], description="Conditions by type; Succeeded is the summary.")
    start_time: str | None = Field(
        None, max_length=64, description="When inputs were accepted; from here they are fixed."
    )
    completion_time: str | None = Field(None, max_length=64, description="When it ended.")
    fence: int = Field(0, description="Fencing epoch of the newest attempt.")
    student_summary: str = Field("", max_length=64, description="The student, for the table.")
    teacher_summary: str = Field("", max_length=64, description="The teacher, for the table.")
    gpus: int = Field(0, description="GPUs of the gang, for the table.")
    restarts: int = Field(0, description="Attempts after the first.")
    failures: int = Field(0, description="Charged attempts since the last progress.")
    teacher_failures: list[int] = Field(
        [],
        max_length=256,
        description="By part of the data: charged failures of its writer since the stream grew.",
    )
    forgiven_failures: list[int] = Field(
        [],
        max_length=256,
        description="By part of the data: failures that the writers' Job counts and we do not, "
        "since the stream grew after them; below 0: those of a Job before it.",
    )
    furthest_commit: int = Field(
        0, description="Highest step that was ever committed: beyond it is progress."
    )
    micro_batch_limit: int = Field(
        0,
        description="Sequences that a rank takes at once at most, since an attempt ran out of "
        "memory; 0 while none has.",
    )
    save_seconds: float | None = Field(
        None, description="Longest save of a checkpoint seen; the pods' grace follows from it."
    )
    resolved: Resolved | None = Field(None, description="What the preflight found out.")
    progress: Progress | None = Field(None, description="How far training is.")
    checkpoint: CheckpointStatus | None = Field(None, description="The newest commit.")
    model: ModelStatus | None = Field(None, description="The finished model.")
    metrics: list[Metric] = Field([], max_length=64, description="Figures of the evaluation.")
    weakest: list[WeakestSlice] = Field(
        [], max_length=8, description="By figure the file on which the student is worst."
    )
    attempts: list[Attempt] = Field([], max_length=10, description="The last ten attempts.")
    teacher_stream: TeacherStreamStatus | None = Field(None, description="The teacher's stream.")

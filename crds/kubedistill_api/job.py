"""The spec of a DistillationJob: one student by one method."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from pydantic.alias_generators import to_snake

from kubedistill_api.base import ApiModel, cel, rules
from kubedistill_api.checkpoint import Checkpoint
from kubedistill_api.data import Data
from kubedistill_api.evaluation import Evaluation
from kubedistill_api.gates import MAX_GATES, Gate
from kubedistill_api.generation import MAX_TOKENS, ChainOfThought, Generation
from kubedistill_api.objective import Objective
from kubedistill_api.pruning import Prune, Smaller
from kubedistill_api.quantization import Quantize
from kubedistill_api.references import (
    JobReference,
    ModelSource,
    Preserved,
    S3Uri,
    SecretReference,
)
from kubedistill_api.teacher import Teacher
from kubedistill_api.training import Training


class Distill(ApiModel):
    """Train the student on a teacher's outputs."""

    model_config = rules(
        [
            cel(
                # Of a default `{}` the rule is asked before the defaults within it.
                "!has(self.objective) || !has(self.objective.softWeight) || "
                "(has(self.signal) && self.signal != 'Logits') || "
                "self.objective.softWeight > 0.0 || !has(self.objective.features) || "
                "size(self.objective.features) > 0",
                "with softWeight 0 and no features nothing of the teacher is learnt: raise "
                "`softWeight`, add `features`, or write `fineTune: {}` without a teacher",
                ".objective.softWeight",
            ),
            cel(
                "!has(self.generation) || (has(self.signal) && self.signal != 'Logits')",
                "`generation` is for `signal: Responses` and `ChainOfThought`",
            ),
            cel(
                "!has(self.chainOfThought) || (has(self.signal) && self.signal == 'ChainOfThought')",
                "`chainOfThought` is for `signal: ChainOfThought`",
            ),
            cel(
                "!has(self.chainOfThought) || self.chainOfThought.minAgreement == 0.0 || "
                "(has(self.generation) && self.generation.samples > 1)",
                "samples can agree only where there are several: raise `generation.samples`",
                ".chainOfThought.minAgreement",
            ),
            cel(
                "!has(self.chainOfThought) || !has(self.chainOfThought.minReasoningTokens) || "
                "self.chainOfThought.minReasoningTokens <= (has(self.generation) && "
                f"has(self.generation.maxTokens) ? self.generation.maxTokens : {MAX_TOKENS})",
                "no answer holds so long a reasoning: `minReasoningTokens` is at most "
                "`generation.maxTokens`",
                ".chainOfThought.minReasoningTokens",
            ),
            cel(
                "!has(self.signal) || self.signal == 'Logits' || !has(self.objective) || "
                "!has(self.objective.features) || size(self.objective.features) == 0",
                "a teacher's text has no layers: leave `features` out, or write `signal: Logits`",
                ".objective.features",
            ),
        ]
    )
    objective: Objective = Field(Objective(), description="What is minimised.")
    signal: Literal["Logits", "Responses", "ChainOfThought"] = Field(
        "Logits",
        description="What of the teacher is learnt. Logits: its next-token distribution. "
        "Responses: its answers to prompts. ChainOfThought: answers with the reasoning before them.",
    )
    generation: Generation | None = Field(
        None, description="How the teacher answers, for Responses and ChainOfThought."
    )
    chain_of_thought: ChainOfThought | None = Field(
        None, description="Which reasoning is learnt, for ChainOfThought."
    )


class FineTune(ApiModel):
    """Train the student on the data's own labels: cross-entropy only, no teacher."""


class Evaluate(ApiModel):
    """Measure the student as it is."""


class Student(ApiModel):
    """How the student begins: exactly one of `model`, `fromJob`, `fromTeacher`, `config`."""

    model_config = rules(
        [
            cel(
                "[has(self.model), has(self.fromJob), has(self.fromTeacher), has(self.config)]"
                ".filter(x, x).size() == 1",
                "give exactly one start for the student: `model`, `fromJob`, `fromTeacher` or `config`",
            )
        ]
    )
    model: ModelSource | None = Field(None, description="A model folder in S3.")
    from_job: JobReference | None = Field(
        None, description="The model of another job; waits for it."
    )
    from_teacher: Smaller | None = Field(None, description="The teacher made smaller.")
    config: Preserved | None = Field(
        None,
        description="Keys of a Hugging Face config.json; random weights. `model_type` is needed, "
        "`vocab_size` is taken from the tokenizer when absent.",
    )


class Workers(ApiModel):
    """The student's gang."""

    model_config = rules(
        [
            cel(
                "!has(self.minNodes) || self.minNodes <= self.nodes",
                "`minNodes` is at most `nodes`",
                ".minNodes",
            )
        ]
    )
    nodes: int = Field(1, ge=1, le=1024, description="Pods of the gang.")
    min_nodes: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Pods with which the gang goes on where there is no room for more; without it, "
        "it waits for all `nodes`. The batch stays `globalBatchSize`, which has to be a multiple of "
        "their ranks.",
    )
    gpus_per_node: int = Field(
        1, ge=0, le=16, description="GPUs (and ranks) of a pod; 0 runs one rank on the CPU."
    )
    gpu_resource_name: str = Field(
        "nvidia.com/gpu",
        min_length=1,
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$",
        description="Resource that counts GPUs.",
    )
    template: Preserved = Field(
        {},
        description="Pod template merged strategically over the operator's: node selectors, "
        "tolerations, volumes, and for the container `trainer` env, resources and image.",
    )


class Storage(ApiModel):
    """Where checkpoints, streams and models go."""

    uri: S3Uri = Field(description="Prefix in S3, such as s3://runs/support.")
    endpoint: str = Field(
        "",
        max_length=1024,
        pattern=r"^(https?://.+)?$",
        description="URL of an S3-compatible server; empty for AWS.",
    )
    region: str = Field(
        "us-east-1",
        min_length=1,
        max_length=63,
        # As boto3 has it: letters, digits and dashes, not digits alone, no dash at an end.
        pattern=r"^([a-zA-Z]|[0-9][-0-9]*[a-zA-Z])([-a-zA-Z0-9]*[a-zA-Z0-9])?$",
        description="Region of the bucket, such as us-east-1.",
    )
    secret_ref: SecretReference | None = Field(
        None,
        description="Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
        "without it the pods' own identity is used.",
    )


def _scored_rules() -> list[dict[str, Any]]:
    """What logits of an endpoint ask for: only the likeliest are known, and only at T = 1."""
    scored = (
        "!has(self.distill) || !has(self.teacher) || !has(self.teacher.endpoint) || "
        "self.distill.signal != 'Logits' || "
    )
    return [
        cel(
            scored + "(self.teacher.payload == 'Sparse' && self.teacher.delivery == 'Stream')",
            "an endpoint gives text, or the likeliest tokens' probabilities: write `distill.signal: "
            "Responses` or `ChainOfThought`, or `payload: Sparse` with `delivery: Stream`",
            ".teacher.payload",
        ),
        cel(
            scored + "(self.distill.objective.temperature == 1.0 && "
            "self.teacher.temperatures.all(t, t == 1.0))",
            "an endpoint gives probabilities at temperature 1 only: write "
            "`distill.objective.temperature: 1`, and no other in `teacher.temperatures`",
            ".distill.objective.temperature",
        ),
        cel(
            scored + "has(self.data.tokenizer)",
            "an endpoint does not show its tokenizer: give `data.tokenizer: {uri: s3://…}`, the same",
            ".data",
        ),
        cel(
            scored + "!has(self.teacher.endpoint.maxCost)",
            "`maxCost` counts text only: leave it out with `signal: Logits`",
            ".teacher.endpoint.maxCost",
        ),
    ]


UNTRAINED = ("prune", "quantize", "evaluate")
"""Methods that leave the student's weights to what they were trained to."""
METHODS = ("distill", "fineTune", *UNTRAINED)
METHODS_TEXT = "one of " + ", ".join(f"`{name}: {{…}}`" for name in METHODS)
IMMUTABLE_PARTS = (
    *METHODS, "teacher", "student", "data", "training", "workers", "storage", "checkpoint",
    "evaluation",
)  # fmt: skip


class DistillationJobSpec(ApiModel):
    """One student by one method: exactly one of `distill`, `fineTune`, `prune`, `quantize` and `evaluate`."""

    model_config = rules(
        [
            cel(
                f"[{', '.join(f'has(self.{name})' for name in METHODS)}].filter(x, x).size() == 1",
                f"give exactly one method: {METHODS_TEXT}",
            ),
            cel(
                "!has(self.distill) || has(self.teacher)",
                "a `distill` job needs a `teacher` (`model: {uri: s3://…}` or `fromJob: {name: …}`)",
            ),
            cel(
                "has(self.distill) || !has(self.teacher) || !has(self.teacher.endpoint)",
                "without `distill` the teacher is what the student is compared with, by its logits: "
                "give `model` or `fromJob`",
                ".teacher",
            ),
            cel(
                "has(self.distill) || has(self.fineTune) || has(self.student.model) || "
                "has(self.student.fromJob)",
                "without training the student is a model that is there: give `student.model` or "
                "`fromJob`",
                ".student",
            ),
            cel(
                "!has(self.quantize) || (self.workers.nodes == 1 && self.workers.gpusPerNode <= 1)",
                "`quantize` runs in one process: write `workers: {nodes: 1, gpusPerNode: 1}`",
                ".workers",
            ),
            cel(
                "!has(self.student.fromTeacher) || has(self.teacher)",
                "`student.fromTeacher` needs a `teacher`; use `student.config`, `model` or `fromJob`",
            ),
            cel(
                "!has(self.student.config) || has(self.data.tokenizer) || "
                "(has(self.teacher) && has(self.distill) && self.distill.signal == 'Logits')",
                "a student by `config` needs `data.tokenizer: {uri: s3://…}`, unless it learns the "
                "logits of a teacher, whose tokenizer it has then",
            ),
            cel(
                "!has(self.distill) || !has(self.teacher) || !has(self.teacher.model) || "
                "!has(self.student.model) || self.teacher.model.uri != self.student.model.uri",
                "student and teacher are the same model: give another `student.model.uri`",
            ),
            cel(
                "!has(self.distill) || !has(self.teacher) || "
                "size(self.distill.objective.features) == 0 || self.teacher.delivery == 'Online'",
                "`distill.objective.features` need the teacher's layers: "
                "write `teacher.delivery: Online`, or leave features out",
                ".distill.objective.features",
            ),
            cel(
                "!has(self.distill) || !has(self.teacher) || self.teacher.payload != 'Sampled' || "
                "self.teacher.delivery != 'Stream' || self.distill.objective.loss == 'ForwardKL'",
                "draws estimate KL(teacher || student) only: write `objective.loss: ForwardKL`, "
                "or another teacher.payload",
                ".distill.objective.loss",
            ),
            cel(
                "!has(self.distill) || !has(self.teacher) || self.distill.signal == 'Logits' || "
                "self.teacher.delivery == 'Stream'",
                "a teacher's text is written before it is learnt: write `teacher.delivery: Stream`",
                ".teacher.delivery",
            ),
            *_scored_rules(),
            cel(
                "!has(self.teacher) || !has(self.teacher.endpoint) || !has(self.student.fromTeacher)",
                "a student cannot begin as a teacher behind an endpoint: give `student.model`, "
                "`fromJob` or `config`",
                ".student.fromTeacher",
            ),
            cel(
                "(has(self.distill) && self.distill.signal != 'Logits') == "
                "self.data.sources.exists(s, s.origin == 'Teacher')",
                "`signal: Responses` and `ChainOfThought` need a source with `origin: Teacher`, whose "
                "prompts the teacher answers; other jobs have none",
                ".data.sources",
            ),
            cel(
                "self.training.globalBatchSize >= self.workers.nodes * "
                "(self.workers.gpusPerNode > 0 ? self.workers.gpusPerNode : 1) && "
                "self.training.globalBatchSize % (self.workers.nodes * "
                "(self.workers.gpusPerNode > 0 ? self.workers.gpusPerNode : 1)) == 0",
                "`training.globalBatchSize` must be a multiple of the ranks "
                "(workers.nodes × workers.gpusPerNode)",
            ),
        ]
    )
    distill: Distill | None = Field(None, description="Learn from a teacher.")
    fine_tune: FineTune | None = Field(None, description="Learn from the data's labels alone.")
    prune: Prune | None = Field(None, description="Make a model smaller, without training it.")
    quantize: Quantize | None = Field(None, description="Store a model in fewer bits.")
    evaluate: Evaluate | None = Field(None, description="Measure a model, and leave it as it is.")
    teacher: Teacher | None = Field(
        None,
        description="Whose outputs are learnt; without `distill`, with what the student is compared.",
    )
    student: Student = Field(description="How the student begins.")
    data: Data = Field(description="What is learnt from.")
    training: Training = Field(Training(), description="Optimizer and schedule.")
    workers: Workers = Field(Workers(), description="The student's gang.")
    storage: Storage = Field(description="Where everything durable lies.")
    checkpoint: Checkpoint = Field(Checkpoint(), description="Commits of the training state.")
    evaluation: Evaluation = Field(
        Evaluation(), description="What the finished student is asked, beside the held-out text."
    )
    gates: list[Gate] = Field(
        [],
        max_length=MAX_GATES,
        description="Bounds on the figures of the finished student. Where one does not hold the job "
        "fails with GateFailed; the model is kept. They may change at any time, and are then held "
        "against the figures that are there, without training anything again.",
    )
    on_gate_failure: Literal["Fail", "Continue"] = Field(
        "Fail",
        description="Where a gate does not hold. Fail: the job fails with GateFailed. Continue: it "
        "succeeds all the same, and the condition GatesPassed says which gates do not hold.",
    )
    suspend: bool = Field(
        False, description="True: commit, end the pods, keep the state. False: go on."
    )
    backoff_limit: int = Field(
        6,
        ge=0,
        le=1000,
        description="Retries without progress, of the gang and of each of the teacher's writers, "
        "before the job fails; disruptions are free.",
    )
    active_deadline_seconds: int | None = Field(
        None,
        ge=1,
        le=2_147_483_647,
        description="Seconds from its start, or from when it last went on after a suspension, after "
        "which the job fails.",
    )
    stall_timeout_seconds: int = Field(
        900,
        ge=10,
        le=604_800,
        description="Seconds without a step after which the gang is restarted, and without an "
        "answer after which one of the teacher's writers is.",
    )
    ttl_seconds_after_finished: int | None = Field(
        None,
        ge=0,
        le=2_147_483_647,
        description="Seconds after its end after which the object is deleted; its model stays. Of "
        "no effect in a chain, with which its jobs go.",
    )

    @property
    def method(self) -> str:
        """The one method that a valid spec has, by its field's name."""
        return next(name for name in METHODS if getattr(self, to_snake(name)) is not None)

    @property
    def trains(self) -> bool:
        """Whether the method trains the student."""
        return self.distill is not None or self.fine_tune is not None

    @property
    def compares(self) -> bool:
        """Whether there is a teacher of which nothing is learnt: for figures beside it."""
        return self.teacher is not None and self.distill is None


def immutability_rules(started: str) -> list[dict[str, Any]]:
    """CEL transition rules at the object's root: once `started` holds, the inputs stay as they are."""
    return [
        cel(
            f"!({started}) || (has(self.spec.{name}) == has(oldSelf.spec.{name}) && "
            f"(!has(self.spec.{name}) || self.spec.{name} == oldSelf.spec.{name}))",
            f"spec.{name} cannot change once the job has started: delete the job, or apply the "
            "change under another name (gates, onGateFailure, suspend, backoffLimit, activeDeadlineSeconds, "
            "stallTimeoutSeconds and ttlSecondsAfterFinished may change)",
            f".spec.{name}",
        )
        for name in IMMUTABLE_PARTS
    ]

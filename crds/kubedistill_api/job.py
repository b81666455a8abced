"""The spec of a DistillationJob: one student by one method."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from kubedistill_api.base import ApiModel, cel, number_or, rules

S3Uri = Annotated[
    str,
    StringConstraints(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?$", max_length=1024),
]
ObjectName = Annotated[
    str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=50)
]
Preserved = Annotated[
    dict[str, Any],
    Field(json_schema_extra={"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
]


class JobReference(ApiModel):
    """Another DistillationJob of the same namespace, whose finished model is used."""

    name: ObjectName = Field(description="Name of a DistillationJob in the same namespace.")


class ModelSource(ApiModel):
    """A model folder in S3, in Hugging Face layout: config.json, *.safetensors, tokenizer.json."""

    uri: S3Uri = Field(description="Folder of a Hugging Face model with safetensors weights.")


class DivergenceMix(ApiModel):
    """Weights of divergences of the teacher's distribution p and the student's q."""

    model_config = rules(
        [
            cel(
                "self.forwardKL + self.reverseKL + self.jsd > 0.0",
                "give at least one of forwardKL, reverseKL and jsd a weight above 0",
            )
        ]
    )
    forward_kl: float = Field(
        0.0, alias="forwardKL", ge=0, le=1000, description="Weight of KL(p || q)."
    )
    reverse_kl: float = Field(
        0.0, alias="reverseKL", ge=0, le=1000, description="Weight of KL(q || p)."
    )
    jsd: float = Field(0.0, ge=0, le=1000, description="Weight of JSD.")


class FeatureMatching(ApiModel):
    """Hidden states of the student, through a trained projection, pulled to the teacher's."""

    model_config = rules(
        [
            cel(
                "has(self.studentLayer) == has(self.teacherLayer)",
                "give both studentLayer and teacherLayer, or neither for all layers of the student",
            )
        ]
    )
    student_layer: int | None = Field(
        None, ge=1, le=1024, description="Layer of the student, counted from 1."
    )
    teacher_layer: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Layer of the teacher. With neither, every layer of the student is matched to "
        "the teacher's at the same relative depth.",
    )
    loss: Literal["MSE", "Cosine"] = Field(
        "MSE", description="Mean squared error a dimension, or 1 - cosine."
    )
    weight: float = Field(1.0, gt=0, le=1000, description="Weight beside the other terms.")


class Objective(ApiModel):
    """The loss: softWeight * T^2 * D(teacher, student) + (1 - softWeight) * cross-entropy + features."""

    model_config = rules(
        [
            cel(
                # Of a default `{}` the rule is asked before the defaults within it.
                "has(self.mix) == (has(self.loss) && self.loss == 'Mix')",
                "give `mix` with `loss: Mix`, and only with it",
            )
        ]
    )
    loss: Literal["ForwardKL", "ReverseKL", "JSD", "Mix"] = Field(
        "ForwardKL", description="Divergence D of the soft term: one, or a Mix by weights."
    )
    mix: DivergenceMix | None = Field(None, description="Weights, for `loss: Mix`.")
    beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="JSD's share of the teacher in the mean that both are compared with.",
    )
    temperature: float = Field(
        4.0, gt=0, le=100, description="T of the soft term, which is multiplied by T^2."
    )
    soft_weight: float = Field(
        0.5, ge=0, le=1, description="Weight of the soft term; cross-entropy has the rest."
    )
    features: list[FeatureMatching] = Field(
        [], max_length=64, description="Hidden states to be matched; needs `delivery: Online`."
    )


class Distill(ApiModel):
    """Train the student on a teacher's outputs."""

    objective: Objective = Field(Objective(), description="What is minimised.")
    signal: Literal["Logits"] = Field(
        "Logits", description="What of the teacher is learnt: its next-token distribution."
    )


class FineTune(ApiModel):
    """Train the student on the data's own labels: cross-entropy only, no teacher."""


class TeacherWorkers(ApiModel):
    """The teacher's own pods, for `delivery: Stream`: independent writers of parts of the data."""

    replicas: int = Field(1, ge=1, le=256, description="Writers; each takes a part of the data.")
    gpus_per_replica: int = Field(
        1, ge=0, le=16, description="GPUs of a writer; 0 runs on the CPU."
    )
    template: Preserved = Field(
        {}, description="Pod template merged over the operator's, as for `workers.template`."
    )


class Teacher(ApiModel):
    """The model whose outputs are learnt: exactly one of `model` and `fromJob`."""

    model_config = rules(
        [
            cel(
                "has(self.model) != has(self.fromJob)",
                "give exactly one teacher: either `model: {uri: s3://…}` or `fromJob: {name: …}`",
            )
        ]
    )
    model: ModelSource | None = Field(None, description="A model folder in S3.")
    from_job: JobReference | None = Field(
        None, description="The model of another job; waits for it."
    )
    delivery: Literal["Online", "Stream"] = Field(
        "Stream",
        description="Online: the teacher runs inside the student's pods. "
        "Stream: it runs once in pods of its own and writes a stream to S3.",
    )
    payload: Literal["Auto", "Sparse", "Sampled", "Hidden"] = Field(
        "Hidden",
        description="What a stream holds a token. Hidden: final hidden state, exact at every T. "
        "Sparse: the topK log-probabilities and the mass of the rest, for low T. "
        "Sampled: random draws at the objective's T, unbiased, for much text at T = 1. "
        "Auto: measures Sparse and Hidden on a part of the data, and takes the smallest within "
        "maxGradientError.",
    )
    max_gradient_error: float = Field(
        0.05,
        gt=0,
        le=1,
        description="For Auto: greatest error of the logits' gradient, relative to the exact one.",
    )
    top_k: int = Field(100, ge=1, le=1024, description="Log-probabilities a token, for Sparse.")
    draws: int = Field(50, ge=1, le=1024, description="Random draws a token, for Sampled.")
    workers: TeacherWorkers = Field(TeacherWorkers(), description="The teacher's own pods.")


class FromTeacher(ApiModel):
    """The student starts as the teacher with fewer layers."""

    layers: int = Field(
        ge=1, le=1024, description="Layers kept, spread evenly, the first and the last included."
    )


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
    from_teacher: FromTeacher | None = Field(None, description="The teacher made smaller.")
    config: Preserved | None = Field(
        None,
        description="Keys of a Hugging Face config.json; random weights. `model_type` is needed, "
        "`vocab_size` is taken from the tokenizer when absent.",
    )


class DataSource(ApiModel):
    """One file of text."""

    uri: S3Uri = Field(description="A .jsonl file (one object a line) or a .txt file.")
    text_field: str = Field(
        "text",
        min_length=1,
        max_length=128,
        description="Field of a JSON line that holds the text.",
    )


class Data(ApiModel):
    """What is learnt from, and what is held out."""

    sources: list[DataSource] = Field(min_length=1, max_length=64, description="Files of text.")
    tokenizer: ModelSource | None = Field(
        None,
        description="Folder with tokenizer.json; by default the teacher's, or else the student's.",
    )
    sequence_length: int = Field(1024, ge=8, le=131072, description="Tokens of a packed sequence.")
    holdout: float = Field(
        0.02, gt=0, lt=1, description="Share of the packed sequences kept for evaluation."
    )
    max_bad_records: int = Field(
        0, ge=0, le=1_000_000, description="Malformed lines that are skipped before the job fails."
    )


class DeepSpeed(ApiModel):
    """What DeepSpeed partitions."""

    zero_stage: int = Field(
        1, ge=1, le=3, description="1: optimizer states; 2: and gradients; 3: and weights."
    )
    offload: Literal["None", "CPU"] = Field(
        "None", description="CPU: the optimizer's states and its step are in host memory."
    )


class EarlyStopping(ApiModel):
    """Ends training when the held-out loss stops falling; the best commit is what is exported."""

    interval_steps: int = Field(
        ge=1, le=1_000_000, description="Optimizer steps between two looks at the held-out loss."
    )
    patience: int = Field(
        3, ge=1, le=1000, description="Looks in a row without improvement before training ends."
    )
    min_delta: float = Field(
        0.0, ge=0, le=100, description="Fall of the loss, in nats a token, that is an improvement."
    )


class Training(ApiModel):
    """The optimizer and its schedule: AdamW, linear warm-up, decay."""

    epochs: int = Field(3, ge=1, le=1000, description="Passes over the data.")
    max_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="Optimizer steps after which training ends anyway."
    )
    global_batch_size: int = Field(
        64, ge=1, le=65536, description="Sequences of an optimizer step, over all ranks."
    )
    micro_batch_size: int = Field(
        4, ge=1, le=4096, description="Sequences that a rank takes at once."
    )
    learning_rate: float = Field(
        2.0e-5,
        gt=0,
        le=1,
        strict=True,
        description="Peak learning rate, a number without quotes: 2.0e-5.",
        json_schema_extra=number_or("a number without quotes, such as 2.0e-5"),
    )
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="Share of the steps that warm up.")
    schedule: Literal["Cosine", "Linear", "Constant"] = Field(
        "Cosine", description="Course of the learning rate after the warm-up."
    )
    final_rate_ratio: float = Field(
        0.1, ge=0, le=1, description="Learning rate at the end, as a share of the peak."
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW's decoupled weight decay.")
    gradient_clipping: float = Field(
        1.0, ge=0, le=1000, description="Greatest norm of the gradient; 0 for no clipping."
    )
    precision: Literal["BF16", "FP32"] = Field("BF16", description="Type of weights in training.")
    seed: int = Field(0, ge=0, le=2_147_483_647, description="Seed of weights, order and dropout.")
    activation_checkpointing: bool = Field(
        False, description="Keep no activations within a layer: less memory, a third more time."
    )
    early_stopping: EarlyStopping | None = Field(
        None, description="End when the held-out loss stops falling."
    )
    deep_speed: DeepSpeed = Field(DeepSpeed(), description="DeepSpeed's settings.")


class Workers(ApiModel):
    """The student's gang."""

    nodes: int = Field(1, ge=1, le=1024, description="Pods of the gang.")
    gpus_per_node: int = Field(
        1, ge=0, le=16, description="GPUs (and ranks) of a pod; 0 runs one rank on the CPU."
    )
    gpu_resource_name: str = Field(
        "nvidia.com/gpu", min_length=1, max_length=253, description="Resource that counts GPUs."
    )
    template: Preserved = Field(
        {},
        description="Pod template merged strategically over the operator's: node selectors, "
        "tolerations, volumes, and for the container `trainer` env, resources and image.",
    )


class SecretReference(ApiModel):
    """A Secret of the same namespace."""

    name: str = Field(min_length=1, max_length=253, description="Name of the Secret.")


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
        "us-east-1", min_length=1, max_length=64, description="Region of the bucket."
    )
    secret_ref: SecretReference | None = Field(
        None,
        description="Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; "
        "without it the pods' own identity is used.",
    )


class Checkpoint(ApiModel):
    """How often state is committed, and how much of it is kept."""

    interval_steps: int = Field(100, ge=1, le=1_000_000, description="Steps between commits.")
    keep_last: int = Field(3, ge=1, le=100, description="Commits that are kept.")


_IMMUTABLE = (
    "distill", "fineTune", "teacher", "student", "data", "training", "workers", "storage", "checkpoint",
)  # fmt: skip


class DistillationJobSpec(ApiModel):
    """One student by one method: exactly one of `distill` and `fineTune`."""

    model_config = rules(
        [
            cel(
                "has(self.distill) != has(self.fineTune)",
                "give exactly one method: either `distill: {}` or `fineTune: {}`",
            ),
            cel(
                "has(self.distill) == has(self.teacher)",
                "a `distill` job needs a `teacher` (`model: {uri: s3://…}` or `fromJob: {name: …}`), "
                "and a `fineTune` job has none",
            ),
            cel(
                "!has(self.student.fromTeacher) || has(self.teacher)",
                "`student.fromTeacher` needs a `teacher`; use `student.config`, `model` or `fromJob`",
            ),
            cel(
                "!has(self.student.config) || has(self.teacher) || has(self.data.tokenizer)",
                "a student by `config` without a teacher needs `data.tokenizer: {uri: s3://…}`",
            ),
            cel(
                "!has(self.teacher) || !has(self.teacher.model) || !has(self.student.model) || "
                "self.teacher.model.uri != self.student.model.uri",
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
    teacher: Teacher | None = Field(None, description="Whose outputs are learnt.")
    student: Student = Field(description="How the student begins.")
    data: Data = Field(description="What is learnt from.")
    training: Training = Field(Training(), description="Optimizer and schedule.")
    workers: Workers = Field(Workers(), description="The student's gang.")
    storage: Storage = Field(description="Where everything durable lies.")
    checkpoint: Checkpoint = Field(Checkpoint(), description="Commits of the training state.")
    suspend: bool = Field(
        False, description="True: commit, end the pods, keep the state. False: go on."
    )
    backoff_limit: int = Field(
        6, ge=0, le=1000, description="Failed attempts before the job fails; disruptions are free."
    )
    active_deadline_seconds: int | None = Field(
        None, ge=1, le=2_147_483_647, description="Seconds from start after which the job fails."
    )
    stall_timeout_seconds: int = Field(
        900,
        ge=10,
        le=604_800,
        description="Seconds without a step after which the gang is restarted.",
    )


def immutability_rules(started: str) -> list[dict[str, Any]]:
    """CEL transition rules at the object's root: once `started` holds, the inputs stay as they are."""
    return [
        cel(
            f"!({started}) || (has(self.spec.{name}) == has(oldSelf.spec.{name}) && "
            f"(!has(self.spec.{name}) || self.spec.{name} == oldSelf.spec.{name}))",
            f"spec.{name} cannot change once the job has started: delete the job, or apply the "
            "change under another name (suspend, backoffLimit, activeDeadlineSeconds and "
            "stallTimeoutSeconds may change)",
            f".spec.{name}",
        )
        for name in _IMMUTABLE
    ]

"""Condition types and reasons: constants, each with what a person does about it.

`Succeeded` is the summary condition; its reason is the STATE column of `kubectl get`.
"""

from __future__ import annotations

# Condition types, in the order in which they come true.
SUCCEEDED = "Succeeded"
VALIDATED = "Validated"
DEPENDENCIES_READY = "DependenciesReady"
TEACHER_READY = "TeacherReady"
RUNNING = "Running"
CHECKPOINT_CURRENT = "CheckpointCurrent"
GATES_PASSED = "GatesPassed"
SUSPENDED = "Suspended"

CONDITION_TYPES = (
    SUCCEEDED,
    VALIDATED,
    DEPENDENCIES_READY,
    TEACHER_READY,
    RUNNING,
    CHECKPOINT_CURRENT,
    GATES_PASSED,
    SUSPENDED,
)
CHAIN_CONDITION_TYPES = (SUCCEEDED, VALIDATED, RUNNING, SUSPENDED)

# Reasons.
PENDING = "Pending"
VALIDATING = "Validating"
VALID = "Valid"
WAITING_FOR_DEPENDENCY = "WaitingForDependency"
DEPENDENCY_NOT_FOUND = "DependencyNotFound"
DEPENDENCY_FAILED = "DependencyFailed"
DEPENDENCY_CYCLE = "DependencyCycle"
DEPENDENCIES_MET = "DependenciesMet"
NOT_NEEDED = "NotNeeded"
GENERATING = "Generating"
SHARDS_COMMITTED = "ShardsCommitted"
STREAM_COMPLETE = "StreamComplete"
STREAM_DAMAGED = "StreamDamaged"
TEACHER_FAILED = "TeacherFailed"
COST_LIMIT_REACHED = "CostLimitReached"
STARTING = "Starting"
UNSCHEDULABLE = "Unschedulable"
POD_NOT_STARTING = "PodNotStarting"
CREATION_REFUSED = "CreationRefused"
NAME_TAKEN = "NameTaken"
TRAINING = "Training"
COMPRESSING = "Compressing"
EVALUATING = "Evaluating"
RESTARTING = "Restarting"
IS_SUSPENDED = "Suspended"
NOT_SUSPENDED = "NotSuspended"
NO_CHECKPOINT_YET = "NoCheckpointYet"
COMMITTED = "Committed"
CHECKPOINT_REJECTED = "CheckpointRejected"
SAVE_FAILED = "SaveFailed"
GRACE_TOO_SHORT = "GraceTooShort"
COMPLETED = "Completed"
NOT_EVALUATED = "NotEvaluated"
GATES_MET = "GatesMet"
GATE_FAILED = "GateFailed"
INVALID_SPEC = "InvalidSpec"
UNREADABLE_INPUT = "UnreadableInput"
SECRET_NOT_FOUND = "SecretNotFound"  # noqa: S105 - a reason, not a secret
OUT_OF_MEMORY = "OutOfMemory"
STORAGE_UNAVAILABLE = "StorageUnavailable"
ENDPOINT_UNAVAILABLE = "EndpointUnavailable"
STALLED = "Stalled"
PEER_LOST = "PeerLost"
INTERRUPTED = "Interrupted"
DISRUPTED = "Disrupted"
FENCED = "Fenced"
GRACEFUL_CHECKPOINT = "GracefulCheckpoint"
NON_FINITE_LOSS = "NonFiniteLoss"
RESUME_REFUSED = "ResumeRefused"
ERROR = "Error"
DEADLINE_EXCEEDED = "DeadlineExceeded"
BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
STAGE_FAILED = "StageFailed"
STAGE_RUNNING = "StageRunning"

WHAT_TO_DO: dict[str, str] = {
    PENDING: (
        "Nothing: the operator has not looked at the object yet. If it stays, check that the "
        "operator runs."
    ),
    VALIDATING: (
        "Nothing: a small pod checks storage, data, tokenizer and sizes before GPUs are asked for."
    ),
    VALID: "Nothing.",
    WAITING_FOR_DEPENDENCY: "Wait, or look at the job that the message names.",
    DEPENDENCY_NOT_FOUND: (
        "Create the job that the message names in the same namespace, or correct the name."
    ),
    DEPENDENCY_FAILED: (
        "Mend the job that the message names, delete and apply it again; this one continues "
        "by itself."
    ),
    DEPENDENCY_CYCLE: (
        "Break the circle that the message prints: one of these jobs needs a model of its own."
    ),
    DEPENDENCIES_MET: "Nothing.",
    NOT_NEEDED: "Nothing.",
    GENERATING: "Nothing: the teacher writes its stream.",
    SHARDS_COMMITTED: "Nothing: the student can start on what is there.",
    STREAM_COMPLETE: "Nothing.",
    STREAM_DAMAGED: (
        "Nothing: the teacher writes the damaged shard again, and the next attempt follows. "
        "Check the store when this repeats."
    ),
    TEACHER_FAILED: "Read the message and the logs of the teacher's pods.",
    COST_LIMIT_REACHED: (
        "Nothing is lost: delete the job and apply it again with a larger "
        "teacher.endpoint.maxCost; answers that are there are not paid for again."
    ),
    STARTING: "Nothing: the pods start.",
    UNSCHEDULABLE: (
        "Ask for less in spec.workers, free capacity, or add nodes; the scheduler's message "
        "says what is short. With workers.minNodes the gang goes on with fewer pods by itself."
    ),
    POD_NOT_STARTING: "Read the message: an image, a Secret or a volume is missing.",
    CREATION_REFUSED: (
        "Mend what the message names: a quota, an admission webhook, or the operator's role. It is "
        "tried again by itself."
    ),
    NAME_TAKEN: (
        "Delete or rename the object that the message names, which is not of this job; the job goes "
        "on by itself."
    ),
    TRAINING: "Nothing.",
    COMPRESSING: "Nothing: what is interrupted begins anew, since nothing is committed on the way.",
    EVALUATING: "Nothing.",
    RESTARTING: (
        "Nothing: the next attempt resumes from the newest commit. status.attempts says why "
        "the last one ended."
    ),
    IS_SUSPENDED: "Set spec.suspend to false to go on from the newest commit.",
    NOT_SUSPENDED: "Nothing.",
    NO_CHECKPOINT_YET: "Nothing: the first commit comes after spec.checkpoint.interval.",
    COMMITTED: "Nothing.",
    CHECKPOINT_REJECTED: (
        "Check the store: a committed shard did not verify, and an older commit was used."
    ),
    SAVE_FAILED: (
        "Check the object store and the pods' scratch space: training goes on, and the commit before "
        "is what a restart would take."
    ),
    GRACE_TOO_SHORT: (
        "Nothing is lost but the steps since the last commit when a pod is evicted: the next "
        "attempt's pods get a longer grace. Set terminationGracePeriodSeconds in spec.workers.template "
        "to have it from the start."
    ),
    COMPLETED: "Nothing: status.model says where the model is.",
    NOT_EVALUATED: "Nothing: gates are held against the figures once training has ended.",
    GATES_MET: "Nothing.",
    GATE_FAILED: (
        "Look at the figures that the message names: the model is in status.model all the same. "
        "Train longer or on more text like that of the weakest file, under another name; or loosen "
        "spec.gates (a stage's: in its chain), and the job succeeds without training again."
    ),
    INVALID_SPEC: "Correct the field that the message names.",
    UNREADABLE_INPUT: "Correct the data, model or stream that the message names.",
    SECRET_NOT_FOUND: (
        "Create the Secret with the keys that the message names; the job goes on by itself."
    ),
    OUT_OF_MEMORY: (
        "Lower training.microBatchSize or data.sequenceLength, raise "
        "training.deepSpeed.zeroStage, or give more memory."
    ),
    STORAGE_UNAVAILABLE: "Check the object store and spec.storage.endpoint.",
    ENDPOINT_UNAVAILABLE: (
        "Check the server at spec.teacher.endpoint.url, and that the pods reach it; answers that "
        "were committed are not asked for again."
    ),
    STALLED: (
        "Look at the pods' logs of that attempt; raise stallTimeoutSeconds when steps are "
        "really that slow. One that is not charged waited for a teacher's writer: see TeacherReady."
    ),
    PEER_LOST: "Look at the other pods of that attempt: one ended first.",
    INTERRUPTED: "Raise the pods' termination grace when this repeats.",
    DISRUPTED: "Nothing: a pod was evicted or preempted, or its node is lost; the retry is free.",
    FENCED: "Nothing at first: the next attempt takes the run over. Where it comes again, something "
    "else runs pods of this job: another operator, or a Job that somebody made.",
    GRACEFUL_CHECKPOINT: "Nothing: the attempt committed before it stopped.",
    NON_FINITE_LOSS: (
        "Lower training.learningRate, or use precision: FP32 or onNonFiniteLoss: Skip, under another "
        "name; commits before it stay."
    ),
    RESUME_REFUSED: (
        "Put back what the message names (objects of the store, from a version or a copy of the bucket; "
        "data or a teacher as they were), then raise backoffLimit: the job goes on from its newest "
        "commit. Or delete it and apply it again, which begins anew."
    ),
    ERROR: "Read the logs of the pod that the message names.",
    DEADLINE_EXCEEDED: "Raise activeDeadlineSeconds (a stage's: in its chain) and apply the job again.",
    BACKOFF_LIMIT_EXCEEDED: "Read status.attempts (TeacherReady, where its writers failed), mend the "
    "cause, raise backoffLimit (a stage's: in its chain).",
    STAGE_FAILED: "Mend the stage that the message names.",
    STAGE_RUNNING: "Nothing.",
}

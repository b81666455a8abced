"""Names that both sides derive: Kubernetes objects, labels, ports and the layout in S3."""

from __future__ import annotations

import hashlib

MAX_JOB_NAME_LENGTH = 50
"""`<name>-a<attempt>-<index>` must stay a 63-character host name."""

LABEL_JOB = "kubedistill.dev/job"
LABEL_JOB_UID = "kubedistill.dev/job-uid"
"""Tells the children of a deleted job from those of its successor of the same name."""
LABEL_ROLE = "kubedistill.dev/role"
LABEL_ATTEMPT = "kubedistill.dev/attempt"
LABEL_CHAIN = "kubedistill.dev/chain"
LABEL_STAGE = "kubedistill.dev/stage"
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGER = "kubedistill"

ROLE_PREFLIGHT = "preflight"
ROLE_TEACHER = "teacher"
ROLE_STUDENT = "student"
ROLE_REPORT = "report"

CONTAINER = "trainer"
RUN_SPEC_DIRECTORY = "/etc/kubedistill"
RUN_SPEC_FILE = "run.json"
RUN_SPEC_DIGEST = "KUBEDISTILL_RUN_SPEC_SHA256"
"""Variable of a pod that says of which run.json it was made, in hexadecimal digits."""
SCRATCH_DIRECTORY = "/scratch"
EXPORTER_PORT = 9400
"""Local rank r of a pod serves /metrics on this port + r; rank 0's also serves /progress."""
START_SECONDS = 300
"""What the processes of a pod that runs may take until they answer there, whatever is asked of them
later: they import some gigabytes, perhaps from a disk that is busy."""

SECRET_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
API_KEY = "API_KEY"
"""Key of a teacher's endpoint: in its Secret, and in the environment of who asks."""

_RENDEZVOUS_FIRST_PORT = 20_000
_RENDEZVOUS_PORTS = 10_000


def short_hash(text: str, length: int = 6) -> str:
    """A short lower-case hexadecimal digest, for names."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def attempt_name(job: str, attempt: int) -> str:
    """The Job and ConfigMap of one attempt of the student gang."""
    return f"{job}-a{attempt}"


def preflight_name(job: str, inputs_digest: str) -> str:
    """The preflight Job of one set of inputs: other inputs are checked anew."""
    return f"{job}-p{inputs_digest[:6]}"


def teacher_name(job: str) -> str:
    """The teacher writers' Job."""
    return f"{job}-teacher"


def stage_job_name(chain: str, stage: str) -> str:
    """The DistillationJob of a chain's stage."""
    return f"{chain}-{stage}"


def trial_job_name(chain: str, stage: str, temperature: float) -> str:
    """The DistillationJob of one trial of a stage's sweep: `c-m-t2`, `c-m-t0-5`."""
    return f"{stage_job_name(chain, stage)}-t{temperature:g}".replace(".", "-")


def retry_job_name(chain: str, stage: str, number: int) -> str:
    """The DistillationJob of a stage's n-th retry, counted from 1."""
    return f"{stage_job_name(chain, stage)}-r{number}"


def report_name(job: str) -> str:
    """The Job that writes a finished sweep into its trials' reports."""
    return f"{job}-report"


def pod_host(batch_job: str, index: int, service: str) -> str:
    """The name under which a pod of an Indexed Job is found by its peers."""
    return f"{batch_job}-{index}.{service}"


def rendezvous_port(uid: str, attempt: int) -> int:
    """A port that differs between attempts and jobs, for nodes whose pods share one network."""
    value = int(hashlib.sha256(f"{uid}/{attempt}".encode()).hexdigest()[:8], 16)
    return _RENDEZVOUS_FIRST_PORT + value % _RENDEZVOUS_PORTS


def run_uri(storage_uri: str, namespace: str, name: str, uid: str) -> str:
    """The prefix of one run: checkpoints, commit log, cursors."""
    return f"{storage_uri.rstrip('/')}/{namespace}/{name}-{uid}"


def models_uri(storage_uri: str, namespace: str, name: str) -> str:
    """The prefix under which a job's finished models lie, each by its digest."""
    return f"{storage_uri.rstrip('/')}/{namespace}/{name}/model"

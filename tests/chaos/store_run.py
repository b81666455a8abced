"""One attempt of a real gang whose S3 calls go through the proxy, and what it leaves."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals

from devcluster.process import free_port
from devcluster.s3 import S3Access
from devcluster.zygote import Forked, Zygote
from e2e.gang import llama, small_spec
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import Outcome, Rendezvous, RunSpec
from kubedistill_operator.plan.compose import merge_patch
from pydantic import ValidationError

from chaos.s3_proxy import S3Proxy

RANKS = 2
STEPS = 8
_PEER_SECONDS = 8.0
"""A rank whose peer is gone gets this long; then its pod goes, as the Job controller sees to it."""
_RUN_SECONDS = 180.0
_PART_BYTES = 5 << 20
"""The least that S3 takes, and SeaweedFS too."""
_NAMESPACE, _NAME, _UID = "chaos", "job", "uid"
"""Of every job. Each has a store URI of its own, so that a prefix may be copied, records and all."""


def rank_name(rank: int) -> str:
    """The client's name at the proxy."""
    return f"rank-{rank}"


@dataclass(frozen=True)
class Job:
    """A short job with nothing in it that is not about checkpoints."""

    zero: int = 1
    in_parts: bool = False
    """Its shards are of some MiB: they go up in parts, and one comes down in several."""

    def __str__(self) -> str:
        return f"zero{self.zero}{'-parts' * self.in_parts}"

    def spec(self, s3: S3Access) -> DistillationJobSpec:
        own = {
            "fineTune": {},
            "student": {"config": llama(272, 4) if self.in_parts else llama(16, 1)},
            "training": {
                "maxSteps": STEPS, "microBatchSize": 4, "deepSpeed": {"zeroStage": self.zero},
            },
            "evaluation": {"examples": 0},
            "checkpoint": {"keepLast": 2, "interval": 4 if self.in_parts else 2},
        }  # fmt: skip
        return DistillationJobSpec.model_validate(merge_patch(small_spec(s3), own))

    @property
    def env(self) -> dict[str, str]:
        """What its ranks are told beside the spec."""
        if not self.in_parts:
            return {}
        names = ("THRESHOLD_BYTES", "PART_BYTES")
        return {f"KUBEDISTILL_STORE_MULTIPART_{name}": str(_PART_BYTES) for name in names}


ZERO1, ZERO2, ZERO3 = (Job(stage) for stage in (1, 2, 3))
IN_PARTS = Job(in_parts=True)


@dataclass(frozen=True)
class Ended:
    """How an attempt ended."""

    codes: list[int]
    outcomes: list[Outcome | None]
    """None of a rank that left none: it was killed, or its disk was full."""
    logs: list[str]
    seconds: float
    left_alone: list[int] = field(default_factory=list)
    """Ranks that had to be ended, for they did not notice that their peer was gone."""
    since_asked: list[float] = field(default_factory=list)
    """Seconds from the first SIGTERM to any rank until each of them was gone; empty without one."""

    @property
    def tail(self) -> str:
        return "\n".join(log[-1500:] for log in self.logs)


class Attempt:
    """The ranks of one attempt."""

    def __init__(
        self, ranks: Sequence[Forked], folders: Sequence[Path], disks: Sequence[Path]
    ) -> None:
        """`folders` have the ranks' logs, `disks` are their scratch."""
        self.ranks = list(ranks)
        self._folders = list(folders)
        self._disks = list(disks)
        self._started = time.monotonic()
        self._asked: float | None = None
        self._gone: dict[int, float] = {}

    def signal(self, client: str, number: Signals) -> None:
        """The proxy's way to strike the rank that it knows as `client`."""
        if number == Signals.SIGTERM and self._asked is None:
            self._asked = time.monotonic()
        self.ranks[int(client.rsplit("-", 1)[1])].send_signal(number)

    def wait(self, timeout_seconds: float = _RUN_SECONDS) -> Ended:
        """Until all ranks have ended. Ranks that outlive the first failure too long are ended."""
        deadline = self._started + timeout_seconds
        left_alone: list[int] = []
        failed = False
        while running := self._running():
            ended = [rank for rank in self.ranks if not rank.running]
            if not failed and any(rank.wait(5) != 0 for rank in ended):
                failed, deadline = True, min(deadline, time.monotonic() + _PEER_SECONDS)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                left_alone = [i for i, rank in enumerate(self.ranks) if rank.running]
                for rank in running:
                    rank.end()
                break
            with contextlib.suppress(TimeoutError):
                running[0].wait(min(remaining, 0.2))
        codes = [rank.wait(10) for rank in self.ranks]
        self._running()
        asked = self._asked
        return Ended(
            codes,
            [_outcome(disk) for disk in self._disks],
            [(folder / "log").read_text(errors="replace") for folder in self._folders],
            time.monotonic() - self._started,
            left_alone,
            [] if asked is None else [self._gone[i] - asked for i in range(len(self.ranks))],
        )

    def _running(self) -> list[Forked]:
        """Ranks that still run; of the others it is noted when that was first seen."""
        for number, rank in enumerate(self.ranks):
            if not rank.running:
                self._gone.setdefault(number, time.monotonic())
        return [rank for rank in self.ranks if rank.running]

    def end(self) -> None:
        """No rank is left."""
        for rank in self.ranks:
            rank.end()


def _outcome(folder: Path) -> Outcome | None:
    with contextlib.suppress(OSError, ValidationError):
        return Outcome.model_validate_json((folder / "outcome-0.json").read_text())
    return None


class Gang:
    """Starts attempts of jobs below one folder."""

    def __init__(self, zygote: Zygote, proxy: S3Proxy, s3: S3Access, folder: Path) -> None:
        self._zygote = zygote
        self._proxy = proxy
        self._s3 = s3
        self._folder = folder

    def start(
        self,
        name: str,
        attempt: int,
        job: Job,
        *,
        via: str = "rank",
        grace_seconds: int = 30,
        scratch: Mapping[int, Path] | None = None,
        groups: Mapping[int, Sequence[str]] | None = None,
        memory_limit_bytes: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Attempt:
        """All ranks of an attempt of the job `name`. `via` other than rank: clients that no script knows.

        `scratch` gives a rank another disk, `groups` has it join cgroups; `memory_limit_bytes` is
        what all of them take for their containers' limit, and `env` is added to their own.
        """
        rendezvous = Rendezvous(host="127.0.0.1", port=free_port(), nodes=RANKS)
        spec = job.spec(self._s3)
        # Where the store is reached changes nothing in what is learnt.
        digest = hashlib.sha256(spec.model_dump_json(exclude={"storage"}).encode()).hexdigest()
        ranks, folders, disks = [], [], []
        for rank in range(RANKS):
            folder = self._folder / f"{name}-{attempt}-{rank}"
            folder.mkdir(parents=True)
            client = f"{via}-{rank}"
            storage = spec.storage.model_copy(
                update={
                    "endpoint": self._proxy.endpoint(client),
                    "uri": f"s3://{self._s3.bucket}/runs/{name}",
                }
            )
            run = RunSpec(
                namespace=_NAMESPACE, name=_NAME, uid=_UID, role="student",
                attempt=attempt, fence=attempt, inputs_digest=digest,
                spec=spec.model_copy(update={"storage": storage}), rendezvous=rendezvous,
                termination_grace_seconds=grace_seconds, memory_limit_bytes=memory_limit_bytes,
            )  # fmt: skip
            (folder / "run.json").write_text(run.model_dump_json(by_alias=True))
            disk = (scratch or {}).get(rank, folder)
            forked = self._zygote.fork(
                "kubedistill_trainer.rank",
                "0",
                env=self._environment(folder, disk, rank) | job.env | dict(env or {}),
                log=folder / "log",
                groups=(groups or {}).get(rank, ()),
            )
            ranks.append(forked)
            folders.append(folder)
            disks.append(disk)
        return Attempt(ranks, folders, disks)

    def _environment(self, folder: Path, disk: Path, rank: int) -> dict[str, str]:
        return {
            "PATH": "/usr/bin:/bin", "HOME": str(folder), "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1", "JOB_COMPLETION_INDEX": str(rank),
            "KUBEDISTILL_RUN_SPEC": str(folder / "run.json"), "KUBEDISTILL_SCRATCH": str(disk),
            "KUBEDISTILL_EXPORTER_PORT": str(free_port()), "POD_IP": "127.0.0.1",
            "AWS_ACCESS_KEY_ID": self._s3.access_key, "AWS_SECRET_ACCESS_KEY": self._s3.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def prefix(self, name: str) -> str:
        """Key prefix of a job's run: shards and log."""
        return f"runs/{name}/{_NAMESPACE}/{_NAME}-{_UID}"

    def weights(self, name: str) -> str:
        """SHA-256 of the weights that a job exported; empty where there are none, or several."""
        found = {
            hashlib.sha256(folder["model.safetensors"]).hexdigest()
            for folder in self.models(name).values()
            if "model.safetensors" in folder
        }
        return found.pop() if len(found) == 1 else ""

    def models(self, name: str) -> dict[str, dict[str, bytes]]:
        """What lies in the folders of a job's models, by folder and name."""
        found: dict[str, dict[str, bytes]] = {}
        for key, body in self.objects(f"runs/{name}/{_NAMESPACE}/{_NAME}/model/"):
            folder, _, file = key.rpartition("/")
            found.setdefault(folder.rpartition("/")[2], {})[file] = body
        return found

    def objects(self, prefix: str) -> Iterator[tuple[str, bytes]]:
        """Keys and bodies below a prefix, asked of the server itself."""
        client = self._s3.client()
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=self._s3.bucket, Prefix=prefix
        )
        for page in pages:
            for item in page.get("Contents", []):
                answer = client.get_object(Bucket=self._s3.bucket, Key=item["Key"])
                yield item["Key"], answer["Body"].read()

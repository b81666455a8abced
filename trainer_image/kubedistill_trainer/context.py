"""What a container knows of itself: the run spec, its place in the gang, its stores and folders."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from kubedistill_api import names
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.quantity import to_bytes
from kubedistill_api.runspec import RunSpec
from pydantic import BaseModel

from kubedistill_trainer.checkpoint.interval import Mean, mean_of_all
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.store import Limits, Store

_RESTART = "KUBEDISTILL_RESTART"


class Restart(BaseModel):
    """How often the ranks of this pod were started again in this attempt, and what of it matters."""

    number: int = 0
    reason: str = ""
    """Why the ranks before ended."""
    mean_seconds: float | None = None
    """Between the starts so far."""

    def to_environment(self) -> dict[str, str]:
        return {_RESTART: self.model_dump_json()}


def restart_of_environment() -> Restart:
    """What the launcher told this rank."""
    return Restart.model_validate_json(os.environ.get(_RESTART, "{}"))


@dataclass(frozen=True)
class Context:
    """One process's view of its run."""

    run: RunSpec
    scratch: Path
    rank: int = 0
    world_size: int = 1
    partition: int = 0
    restart: Restart = field(default_factory=Restart)
    _stores: dict[str, Store] = field(default_factory=dict, repr=False)

    def open_store(self, uri: str, upload_bytes_per_second: int | None = None) -> Store:
        """The store at `uri`, with the job's endpoint and region; one connection pool a URI."""
        if uri not in self._stores:
            storage = self.run.spec.storage
            limits = Limits.from_environment(upload_bytes_per_second=upload_bytes_per_second)
            self._stores[uri] = Store(
                uri,
                endpoint=storage.endpoint,
                region=storage.region,
                limits=limits,
                secret=storage.secret_ref.name if storage.secret_ref else "",
            )
        return self._stores[uri]

    @property
    def mean_seconds_between_failures(self) -> Mean | None:
        """As seen of this job: of the attempts before, and of the restarts within this one."""
        run, restart = self.run, self.restart
        means = (
            (run.mean_seconds_between_failures, run.failures_seen or 1),
            (restart.mean_seconds, restart.number),
        )
        return mean_of_all(Mean(value, of) for value, of in means if value is not None)

    @property
    def storage(self) -> Store:
        """The store at spec.storage.uri."""
        return self.open_store(self.run.spec.storage.uri)

    @property
    def run_store(self) -> Store:
        """The prefix of this run: shards and commit log."""
        run = self.run
        uri = names.run_uri(run.spec.storage.uri, run.namespace, run.name, run.uid)
        return self.open_store(uri, to_bytes(run.spec.checkpoint.max_bandwidth))

    @property
    def models_store(self) -> Store:
        """The prefix of this job's finished models."""
        run = self.run
        return self.open_store(names.models_uri(run.spec.storage.uri, run.namespace, run.name))


def read_run_spec() -> RunSpec:
    """`run.json` from the mounted ConfigMap (KUBEDISTILL_RUN_SPEC names another file).

    RunFailure where it is not the one that the pod was made for. That is nothing of the spec, and
    the next attempt gets one of its own: so it is an error that is tried again, and counted.
    """
    default = f"{names.RUN_SPEC_DIRECTORY}/{names.RUN_SPEC_FILE}"
    content = Path(os.environ.get("KUBEDISTILL_RUN_SPEC", default)).read_bytes()
    found, expected = hashlib.sha256(content).hexdigest(), os.environ.get(names.RUN_SPEC_DIGEST)
    if expected and found != expected:
        raise RunFailure(
            ExitCode.UNKNOWN,
            f"this is not the run.json that this pod was made for: its SHA-256 is {found[:12]}…, not "
            f"{expected[:12]}…; its ConfigMap was replaced by somebody: change the DistillationJob "
            "instead",
        )
    return RunSpec.model_validate_json(content)


def scratch_directory() -> Path:
    """The pod's own disk (KUBEDISTILL_SCRATCH names another folder)."""
    return Path(os.environ.get("KUBEDISTILL_SCRATCH", names.SCRATCH_DIRECTORY))


def joined_file(scratch: Path, local_rank: int) -> Path:
    """There once a rank has met its peers."""
    return scratch / f"joined-{local_rank}"


def committed_file(scratch: Path, local_rank: int) -> Path:
    """There once a rank has seen a commit of its own gang."""
    return scratch / f"committed-{local_rank}"


def imported_file(scratch: Path, local_rank: int) -> Path:
    """Where a rank names the modules that it has imported late, one a line."""
    return scratch / f"imported-{local_rank}"


def trained_file(scratch: Path, local_rank: int) -> Path:
    """There once a rank has nothing to do with its peers any more."""
    return scratch / f"trained-{local_rank}"

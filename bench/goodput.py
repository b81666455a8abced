"""How much of the training is useful when something dies every minute.

A real control plane, the operator as a process, a job of two pods on CPUs with `interval: Auto`.
First it trains undisturbed, which gives the calm rate of steps. Then, for ten minutes, a rank of one
of the pods (drawn by seed) is killed with SIGKILL every minute: its launcher and its peer's start the
ranks again in their pods, which resume from the newest commit. Useful steps are those that count at
the end: what was lost is made up for, and counts once. Last, a whole pod is killed, whose attempt
the operator ends and follows up with the next one, after imports and back-off.

The ten minutes are the measure, so this takes fifteen; --quick kills twice in forty seconds.

    uv run python bench/goodput.py [--quick] [--json]
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
from kit.common import Measure, arguments, note, report

# A benchmark is started by its path alone: the dev cluster is found from here.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "examples" / "demo"))

import corpus  # noqa: E402
from devcluster.cluster import DevCluster  # noqa: E402
from devcluster.handle import Handle  # noqa: E402
from e2e.gang import llama, put_inputs  # noqa: E402
from e2e.kit import Team, start_operator  # noqa: E402
from kubedistill_api.names import EXPORTER_PORT  # noqa: E402
from operator_kit import install_role, wait_for  # noqa: E402

GOAL = 0.95
SEED = 20
_DATA = "data/long.jsonl"
FULL, QUICK = (180.0, 10, 60.0), (15.0, 2, 20.0)
"""Seconds of calm, kills, seconds from one to the next."""


class Job:
    """A running gang of two pods."""

    def __init__(self, team: Team, name: str) -> None:
        self._team, self._name = team, name

    def step(self) -> int:
        """The step that rank 0 is at; −1 where it does not answer."""
        try:
            pod = self._team.get("pod", self._team.pod(self._name, 0))
            address = f"http://{pod['status']['podIP']}:{EXPORTER_PORT}/progress"
            with urllib.request.urlopen(address, timeout=1) as answer:
                found = json.loads(answer.read())
        except (OSError, IndexError, KeyError):
            return -1
        return int(found["step"]) if found["phase"] == "Training" else -1

    def reaches(self, step: int) -> float:
        """Seconds until this step is done."""
        began = time.monotonic()
        wait_for(lambda: self.step() >= step, f"step {step} is not reached", 600)
        return time.monotonic() - began

    def kill_rank(self, index: int) -> None:
        """SIGKILL for the rank's process of one pod, not for its launcher."""
        pod = self._team.pod(self._name, index)
        pids = self._team.handle.faults.pids(self._team.namespace, pod)
        for child in psutil.Process(pids["trainer"]).children(recursive=True):
            child.send_signal(signal.SIGKILL)

    def kill_pod(self, index: int) -> None:
        self._team.kill(self._team.pod(self._name, index))


def measure(team: Team, calm: float, kills: int, apart: float, *, as_json: bool) -> list[Measure]:
    """The figures of one job."""
    job, draw = Job(team, "struck"), random.Random(SEED)
    team.apply(
        team.tuned(
            "struck",
            # 1.8 MiB of state. The store is on the same two cores as the ranks: what a save takes of
            # them goes with its bytes, as it would not where the store is elsewhere.
            student={"config": llama(64, 2)},
            data={"sources": [{"uri": f"s3://{team.handle.s3.bucket}/{_DATA}"}]},
            training={"epochs": 1000, "maxSteps": 1_000_000, "globalBatchSize": 32},
            checkpoint={"interval": "Auto"},
            backoffLimit=100,
        )
    )
    job.reaches(20)
    first = job.step()
    time.sleep(calm)
    rate = (job.step() - first) / calm
    note(f"calm: {rate:.1f} steps a second", as_json=as_json)
    before = job.step()
    began, recoveries = time.monotonic(), list[float]()
    for number in range(kills):
        time.sleep(max(0.0, began + (number + 0.5) * apart - time.monotonic()))
        # While it restarts nobody answers: the step that it was at is asked for before.
        at = job.step()
        job.kill_rank(draw.randrange(2))
        recoveries.append(job.reaches(at + 2))
        note(f"kill {number + 1}: step {at} passed again after {recoveries[-1]:.1f} s",
             as_json=as_json)  # fmt: skip
    time.sleep(max(0.0, began + kills * apart - time.monotonic()))
    seconds = time.monotonic() - began
    useful, expected = job.step() - before, rate * seconds
    restarts = sum(a.get("rankRestarts", 0) for a in team.status("struck")["attempts"])
    at, killed = job.step(), time.monotonic()
    job.kill_pod(1)
    wait_for(lambda: len(team.status("struck")["attempts"]) > 1, "no next attempt", 120)
    job.reaches(at + 2)
    pod = time.monotonic() - killed
    attempts = len(team.status("struck")["attempts"])
    return [
        Measure(
            f"useful steps, a rank killed {kills} times in {seconds:.0f} s", useful, "steps",
            "calm run", expected, f"≥ {GOAL} ×", useful / expected >= GOAL,
        ),
        Measure("from a rank's death to the next new step", max(recoveries), "s (longest)"),
        Measure("restarts of ranks in their pods", restarts, "restarts"),
        Measure("from a pod's death to the next new step", pod, "s"),
        Measure("attempts, the pod's included", attempts, "attempts"),
    ]  # fmt: skip


def run(handle: Handle, folder: Path, quick: bool, *, as_json: bool) -> list[Measure]:
    """One operator and its job."""
    put_inputs(handle.s3)
    # Its passes must not end before the ten minutes do.
    lines = "".join(json.dumps({"text": text}) + "\n" for text in corpus.documents()[:30])
    handle.s3.client().put_object(Bucket=handle.s3.bucket, Key=_DATA, Body=lines.encode())
    account = install_role(handle, folder)
    handle.kubectl("create", "namespace", "goodput")
    operator = start_operator(account, folder / "operator.log")
    try:
        team = Team(handle, "goodput")
        return measure(team, *(QUICK if quick else FULL), as_json=as_json)
    finally:
        operator.stop()


def main() -> None:
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Containers run as another user and look for their files below this folder.
        folder.chmod(0o755)
        with DevCluster(folder / "cluster") as handle:
            measures = run(handle, folder, options.quick, as_json=options.json)
    report(measures, as_json=options.json)


if __name__ == "__main__":
    main()

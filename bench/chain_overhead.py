"""What a chain on Kubernetes costs beside the bare training loops that it runs.

The chain: a real control plane, the operator as a process, one DistillationChain whose first stage
trains a teacher and whose later stages learn from the stage before through a stream in S3.
The peer: the same containers (teacher, student) with the same specs against the same store, started
one after the other by hand, without preflight, operator or Kubernetes. Both run once, the peer
first; the difference is preflight pods, reconciling, scheduling and polling. --quick, one stage of
five steps, judges that difference alone.

    uv run python bench/chain_overhead.py [--quick] [--json]
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kit.common import Measure, arguments, note, report

# A benchmark is started by its path alone: the dev cluster and the demo's text are found from here.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "examples" / "demo"))

from devcluster.cluster import DevCluster  # noqa: E402
from devcluster.handle import Handle  # noqa: E402
from e2e.gang import Trainer, llama, model_of, put_inputs  # noqa: E402
from e2e.kit import Team, start_operator  # noqa: E402
from kubedistill_api.runspec import ResolvedModel  # noqa: E402
from operator_kit import install_role  # noqa: E402

GOAL_RATIO, GOAL_SECONDS = 1.5, 15.0
FULL, QUICK = (3, 200), (1, 5)
"""Stages, steps of each."""


def stages(count: int) -> list[dict[str, Any]]:
    """What differs between the stages: the first trains on labels, the others on the one before."""
    sizes = [(64, 3), (48, 2), (32, 1)][:count]
    students = [{"student": {"config": llama(*size)}} for size in sizes]
    return [{"fineTune": {}, **students[0]}, *({"distill": {}, **s} for s in students[1:])]


def spec_of(template: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    """A stage as a job has it; the teacher is given to the containers as a resolved model."""
    whole = copy.deepcopy(template) | stage
    if "distill" in stage:
        whole["teacher"] = {"fromJob": {"name": "previous"}, "workers": {"gpusPerReplica": 0}}
    return whole


def bare(trainer: Trainer, template: dict[str, Any], count: int) -> float:
    """Seconds of the same containers, by hand."""
    start = time.perf_counter()
    teacher: ResolvedModel | None = None
    for index, stage in enumerate(stages(count)):
        spec = trainer.spec(**spec_of(template, stage))
        name = f"bare-{index}"
        if teacher is not None:
            written = trainer.run("teacher", spec, name=name, teacher=teacher)
            assert written.codes == [0], written.log
        result = trainer.run("student", spec, name=name, teacher=teacher)
        assert set(result.codes) == {0}, result.log
        teacher = model_of(result, name)
    return time.perf_counter() - start


def chained(team: Team, template: dict[str, Any], count: int) -> float:
    """Seconds from `kubectl apply` of the chain to Succeeded=True."""
    shared = {**template, "teacher": {"workers": {"gpusPerReplica": 0}}}
    chain = {
        "apiVersion": "kubedistill.dev/v1alpha1",
        "kind": "DistillationChain",
        "metadata": {"name": "bench"},
        "spec": {
            "template": shared,
            "stages": [{"name": f"s{i}", **stage} for i, stage in enumerate(stages(count))],
        },
    }
    start = time.perf_counter()
    team.apply(chain)
    team.ends("bench", "Completed", resource="dchain")
    return time.perf_counter() - start


def measure(handle: Handle, folder: Path, count: int, steps: int) -> list[Measure]:
    """Both, against one store."""
    put_inputs(handle.s3)
    account = install_role(handle, folder)
    handle.kubectl("create", "namespace", "bench")
    team = Team(handle, "bench")
    template = team.tuned("x", training={"maxSteps": steps})["spec"]
    for part in ("fineTune", "student"):
        del template[part]
    alone = bare(Trainer(folder / "bare", handle.s3), template, count)
    operator = start_operator(account, folder / "operator.log")
    try:
        through = chained(team, template, count)
    finally:
        operator.stop()
    peer = "the same containers by hand"
    whole = f"wall time, {count} stages of {steps} steps on 2 pods"
    # A ratio says something of stages that train for a while, not of five steps.
    judged = (f"≤ {GOAL_RATIO} × the bare loops", through <= GOAL_RATIO * alone)
    added = (through - alone) / count
    return [
        Measure(whole, through, "s", peer, alone, *(judged if count > 1 else ())),
        Measure(
            "what Kubernetes adds, a stage", added, "s",
            goal=f"≤ {GOAL_SECONDS:g} s", met=added <= GOAL_SECONDS,
        ),
    ]  # fmt: skip


def main() -> None:
    options = arguments(__doc__ or "")
    count, steps = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Containers run as another user and look for their files below this folder.
        folder.chmod(0o755)
        (folder / "bare").mkdir()
        with DevCluster(folder / "cluster") as handle:
            note(f"{count} stages of {steps} steps, twice", as_json=options.json)
            measures = measure(handle, folder, count, steps)
    report(measures, as_json=options.json)


if __name__ == "__main__":
    main()

"""`make demo`: a real chain on a real control plane, from the first pod to the last figure."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import corpus
import smollm2
from devcluster import assets
from devcluster.__main__ import DEFAULT_STATE, is_up, up
from devcluster.handle import Handle
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "demo"
SYSTEM = "kubedistill-system"
RESOURCES = f"/apis/kubedistill.dev/v1alpha1/namespaces/{NAMESPACE}"
VOCAB_SIZE = 2048
console = Console(highlight=False)


def step(text: str) -> None:
    """One line a step, with the time since the start."""
    console.print(f"[bold cyan]{time.monotonic() - STARTED:5.0f} s[/]  {text}")


STARTED = time.monotonic()


def own_cluster() -> Handle:
    """The cluster of the user's kubeconfig; its nodes must be able to pull the charts' images."""
    kubeconfig = os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config"
    handle = Handle.own(Path(kubeconfig), os.environ, ROOT / ".own-cluster")
    step(f"cluster of {kubeconfig}, S3 at {handle.s3.endpoint}")
    return handle


def start_cluster(state: Path) -> Handle:
    """The control plane (built once), S3 and the node."""
    if assets.find() is None:
        step("building the control plane from its Go sources; minutes, and only once")
    step("cluster is up already" if is_up(state) else "starting control plane, S3 and node")
    return up(state)


def put_data(handle: Handle, objects: dict[str, bytes]) -> None:
    """Write objects into the demo's bucket."""
    client = handle.s3.client()
    for key, body in objects.items():
        client.put_object(Bucket=handle.s3.bucket, Key=key, Body=body)


def text_objects() -> dict[str, bytes]:
    """Keys and bodies of text and tokenizer."""
    files = corpus.tokenizer_files(VOCAB_SIZE)
    return {
        "data/topics.jsonl": corpus.jsonl(),
        **{f"tokenizer/{name}": body for name, body in files.items()},
    }


def install_operator(handle: Handle, values: Path | None) -> None:
    """The operator's chart, as on any cluster; `values` name the images of a cluster of one's own."""
    trainer_env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    handle.helm(
        "upgrade", "--install", "kubedistill", str(ROOT / "charts" / "kubedistill"),
        "--namespace", SYSTEM, "--create-namespace",
        *(("--values", str(values)) if values else ()),
        # Pods of the dev cluster share the host's network.
        "--set", "operator.bindToPodIP=true",
        "--set-json", f"trainerEnv={json.dumps(trainer_env)}",
        "--set-json", 'operator.settings={"progressPollSeconds": 2}',
        "--wait", "--timeout", "180s",
    )  # fmt: skip


def install_secret(handle: Handle) -> None:
    """Namespace, and the keys that the pods use."""
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "s3", "namespace": NAMESPACE},
        "stringData": {
            "AWS_ACCESS_KEY_ID": handle.s3.access_key,
            "AWS_SECRET_ACCESS_KEY": handle.s3.secret_key,
        },
    }
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    for item in (namespace, secret):
        handle.kubectl("apply", "-f", "-", stdin=json.dumps(item))


def install_chain(
    handle: Handle, name: str, values: str, sets: dict[str, Any], steps: int | None
) -> None:
    """The chain's chart with a values file of this folder; an earlier demo's chain is replaced."""
    if steps is not None:
        sets = {**sets, "training.maxSteps": steps}
    handle.helm("uninstall", name, "--namespace", NAMESPACE, "--wait", check=False)
    storage = {
        "uri": f"s3://{handle.s3.bucket}/runs/{int(time.time())}",
        "endpoint": handle.s3.endpoint,
        "secretName": "s3",
    }
    arguments = [f"{key}={json.dumps(value)}" for key, value in sets.items()]
    handle.helm(
        "upgrade", "--install", name, str(ROOT / "charts" / "distillation-chain"),
        "--namespace", NAMESPACE, "--values", str(ROOT / "examples" / "demo" / values),
        "--set-json", f"storage={json.dumps(storage)}",
        *(part for argument in arguments for part in ("--set-json", argument)),
    )  # fmt: skip


def condition(item: dict[str, Any], kind: str) -> dict[str, Any]:
    """A condition of an object, empty when it is not there."""
    for found in item.get("status", {}).get("conditions", []):
        if found["type"] == kind:
            return dict(found)
    return {}


def watch(handle: Handle, name: str, timeout_seconds: float) -> dict[str, dict[str, Any]]:
    """Print every change until chain and control have ended; all DistillationJobs by name."""
    shown: dict[str, str] = {}
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        chain = handle.api.get(f"{RESOURCES}/distillationchains/{name}")
        jobs = {
            item["metadata"]["name"]: item
            for item in handle.api.get(f"{RESOURCES}/distillationjobs")["items"]
            if item["metadata"]["name"].startswith(f"{name}-")
        }
        for job_name, job in jobs.items():
            line = _line(job)
            if shown.get(job_name) != line:
                shown[job_name] = line
                step(f"{job_name:14} {line}")
        items = [chain, *jobs.values()]
        failed = [i for i in items if condition(i, "Succeeded").get("status") == "False"]
        if failed:
            found = condition(failed[0], "Succeeded")
            name = failed[0]["metadata"]["name"]
            sys.exit(f"{name}: {found['reason']}: {found['message']}")
        if all(condition(i, "Succeeded").get("status") == "True" for i in items):
            return jobs
        time.sleep(2)
    sys.exit(f"not finished within {timeout_seconds:.0f} s; look at `kubectl describe distill`")


def _line(job: dict[str, Any]) -> str:
    state = condition(job, "Succeeded").get("reason", "…")
    progress = job.get("status", {}).get("progress") or {}
    if state != "Training" or not progress.get("totalSteps"):
        return str(state)
    percentage = int(progress.get("percentage", 0)) // 20 * 20
    bar = "█" * (percentage // 10) + "░" * (10 - percentage // 10)
    return f"{state:10} {bar} {percentage:3d} %"


def metric(job: dict[str, Any], name: str) -> float | None:
    """One figure of a job's evaluation."""
    for found in job.get("status", {}).get("metrics", []):
        if found["name"] == name:
            return float(found["value"])
    return None


def show(handle: Handle, jobs: dict[str, dict[str, Any]], order: list[str]) -> None:
    """The cluster's own table, then the figures, then where to look."""
    console.print()
    print(handle.kubectl("get", "distill", "-n", NAMESPACE))
    table = Table(title="Held-out figures")
    for column in ("model", "parameters", "perplexity", "teacher's", "agreement"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in order:
        job = jobs[name]
        figures = [metric(job, m) for m in ("perplexity", "teacherPerplexity", "teacherAgreement")]
        shown = ["–" if f is None else f"{f:.2f}" for f in figures]
        table.add_row(name, f"{job['status']['model']['parameters']:,}", *shown)
    console.print(table)


def next_steps(handle: Handle, model: str) -> None:
    console.print(f"The last student lies in [bold]{model}[/]", soft_wrap=True)
    if not is_up(handle.state):
        console.print(f"Look further: kubectl -n {NAMESPACE} describe distill")
        return
    console.print(f"Logs: {handle.logs}/{NAMESPACE}")
    state = os.path.relpath(handle.state, ROOT)
    console.print("Look further:")
    console.print("  eval $(PYTHONPATH=tests .venv/bin/python -m devcluster env)", markup=False)
    console.print(f"  kubectl -n {NAMESPACE} describe distill")
    console.print(f"  make down    # ends the cluster in {state}")


def run_demo(handle: Handle, steps: int | None) -> None:
    """The miniature chain and its control. With fewer steps the outcome is not judged."""
    put_data(handle, text_objects())
    step("text and tokenizer are in S3")
    bucket = f"s3://{handle.s3.bucket}"
    sets: dict[str, Any] = {
        "data.sources": [{"uri": f"{bucket}/data/topics.jsonl"}],
        "data.tokenizer": {"uri": f"{bucket}/tokenizer"},
    }
    install_chain(handle, "mini", "values.yaml", sets, steps)
    step("chain installed: mini, four sizes and a control without a teacher")
    jobs = watch(handle, "mini", 3000)
    order = ["mini-70b", "mini-30b", "mini-13b", "mini-7b", "mini-control"]
    show(handle, jobs, order)
    taught, alone = (
        metric(jobs["mini-7b"], "perplexity"),
        metric(jobs["mini-control"], "perplexity"),
    )
    assert taught is not None and alone is not None
    verdict = "beats" if taught < alone else "does NOT beat"
    console.print(
        f"The distilled student {verdict} its twin without a teacher: "
        f"perplexity {taught:.1f} against {alone:.1f} on the same tokens."
    )
    next_steps(handle, jobs["mini-7b"]["status"]["model"]["uri"])
    if steps is None and taught >= alone:
        sys.exit("the distilled student does not beat the control")


def run_smollm2(handle: Handle, steps: int | None) -> None:
    """A student of half of SmolLM2's layers. With fewer steps the outcome is not judged."""
    step("converting SmolLM2-135M-Instruct to a Hugging Face folder, unless it is cached")
    folder = smollm2.model_folder()
    client = handle.s3.client()
    for path in sorted(folder.iterdir()):
        client.upload_file(str(path), handle.s3.bucket, f"models/{folder.name}/{path.name}")
    put_data(handle, {"data/topics.jsonl": corpus.jsonl()})
    step("teacher and text are in S3")
    bucket = f"s3://{handle.s3.bucket}"
    sets: dict[str, Any] = {
        "initialTeacher.model.uri": f"{bucket}/models/{folder.name}",
        "data.sources": [{"uri": f"{bucket}/data/topics.jsonl"}],
    }
    install_chain(handle, "smollm2", "smollm2.yaml", sets, steps)
    step("chain installed: smollm2, one stage")
    job = watch(handle, "smollm2", 5000)["smollm2-half"]
    show(handle, {"smollm2-half": job}, ["smollm2-half"])
    before, after = metric(job, "initialPerplexity"), metric(job, "perplexity")
    assert before is not None and after is not None
    console.print(
        f"Held-out perplexity with half the layers gone: {before:,.0f}; "
        f"after distillation: {after:.1f}, {before / after:.1f} times less."
    )
    next_steps(handle, job["status"]["model"]["uri"])
    if steps is None and before < 3 * after:
        sys.exit("distillation should lower the perplexity at least three times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=DEFAULT_STATE)
    parser.add_argument("--smollm2", action="store_true", help="the real SmolLM2-135M as teacher")
    parser.add_argument("--steps", type=int, help="fewer steps a stage, to see the way only")
    parser.add_argument("--current", action="store_true", help="the cluster of your kubeconfig")
    parser.add_argument("--operator-values", type=Path, help="a values file for the operator")
    given = parser.parse_args()
    handle = own_cluster() if given.current else start_cluster(given.state)
    install_operator(handle, given.operator_values)
    install_secret(handle)
    step("operator installed by Helm and ready")
    if given.smollm2:
        run_smollm2(handle, given.steps)
    else:
        run_demo(handle, given.steps)
    step("done")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, TimeoutError) as error:
        sys.exit(f"error: {error}")

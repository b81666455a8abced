"""A stand-in for the trainer and the operator as a process, for tests on the dev cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from kubedistill_operator.rbac import LEASE_RULES, RULES

FAKE_TRAINER = r"""
import http.server, json, os, signal, sys, threading, time
role, run = sys.argv[1], json.load(open("/etc/kubedistill/run.json"))
behaviour = os.environ.get("BEHAVIOUR", "")
index = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))
attempt, steps = run.get("attempt", 0), int(os.environ.get("STEPS", "20"))
report = {"phase": "Starting", "attempt": attempt, "totalSteps": steps}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(report).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body)))
        self.end_headers(); self.wfile.write(body)
    def log_message(self, *a): pass

def end(code, **outcome):
    outcome.setdefault("reason", "x")
    open("/dev/termination-log", "w").write(json.dumps(outcome))
    os._exit(code)

def serve():
    http.server.ThreadingHTTPServer((os.environ["POD_IP"], 9400), Handler).serve_forever()

threading.Thread(target=serve, daemon=True).start()
def interrupted(*a):
    end(18, reason="Interrupted", message="asked to stop")

if role in ("preflight", "teacher"):
    signal.signal(signal.SIGTERM, interrupted)
if role == "preflight":
    time.sleep(float(os.environ.get("PREFLIGHT_SECONDS", "0")))
    if behaviour == "bad-data":
        end(13, reason="UnreadableInput", problems=[{"field": "spec.data.sources[0].uri",
            "found": "nothing at s3://data/x.jsonl", "expected": "upload the file"}])
    end(0, resolved={"studentParameters": 1000, "totalSteps": steps, "trainingTokens": 5})
if role == "report":
    end(0)
if role == "teacher":
    if behaviour == "teacher-fails":
        end(13, reason="UnreadableInput", message="the teacher has no config.json")
    if behaviour == "teacher-crashes":
        end(1, reason="Error", message="boom")
    stream = {"uri": "s3://runs/streams/1", "payload": "Hidden", "tokens": 10, "bytes": 100}
    quiet = "TEACHER_QUIET" in os.environ
    report.update(phase="Generating", **({} if quiet else {"teacherStream": stream}))
    time.sleep(float(os.environ.get("TEACHER_SECONDS", "1.5")))
    end(0, progress={"teacherStream": dict(stream, tokens=50, complete=True)})
micro = run.get("microBatchSize") or run["spec"]["training"]["microBatchSize"]
if behaviour == "big-batch" and micro > int(os.environ["FITS"]):
    end(14, reason="OutOfMemory", message=f"CUDA out of memory with {micro} sequences")
stopping = threading.Event()
signal.signal(signal.SIGTERM, lambda *a: stopping.set())
state = {"step": 0}
# A commit that outlives the pod: the last attempt's step, by a file that all pods of a node share.
book = os.path.join(os.environ["BOOK"], run["uid"])
start = int(open(book).read()) if os.path.exists(book) else 0
report.update(phase="Training", resumedFromStep=start or None, step=start,
              loss=3.0 / start if start else None)
interval = float(os.environ.get("STEP_SECONDS", "0.2"))
for step in range(start + 1, steps + 1):
    if not (behaviour == "stall" and attempt == 1 and step > 5):
        report.update(step=step, loss=3.0 / step, tokensPerSecond=1234.5,
                      estimatedRemainingSeconds=(steps - step) * interval, lastStepTime=time.time())
    else:
        stopping.wait(1000)
    if step % 5 == 0 and index == 0:
        open(book, "w").write(str(step))
        report.update(checkpoint={"uri": "s3://runs/c", "step": step, "digest": "ab"})
    if behaviour == "fail-once" and attempt == 1 and step == 8 and index == 1:
        end(14, reason="OutOfMemory", message="CUDA out of memory")
    if behaviour == "fail-always" and step == start + 2:
        end(1, reason="Error", message="boom")
    if behaviour == "troubled":
        report.update(saveProblem="no space" if step < 25 else "", saveSeconds=90.0, stepSeconds=0.2,
                      graceProblem="two saves take 180 s" if step < 40 else "",
                      straggler="rank 1 takes 1.5 times the median" if step > 5 else "",
                      skippedSteps=[7] if step > 8 else [])
    if stopping.wait(interval):
        if index == 0:
            open(book, "w").write(str(step))
            report.update(checkpoint={"uri": "s3://runs/c", "step": step, "digest": "ab"})
        time.sleep(float(os.environ.get("END_SECONDS", "0")))
        end(11, reason="GracefulCheckpoint", progress=report)
if index == 0:
    # As the trainer does: whatever the interval, the last step is committed.
    report.update(phase="Done", step=steps,
                  checkpoint={"uri": "s3://runs/c", "step": steps, "digest": "ab"})
    end(0, progress=report, model={"uri": "s3://runs/m", "digest": "d" * 8, "parameters": 1000},
        metrics=[{"name": "perplexity", "value": 12.5}])
end(0)
"""


def template(book: Path, behaviour: str = "", **env: str) -> dict[str, Any]:
    """A pod template that runs the stand-in."""
    variables = {"BOOK": "/book", "BEHAVIOUR": behaviour, **env}
    return {
        "spec": {
            "containers": [
                {
                    "name": "trainer",
                    "image": "local/shell",
                    "command": ["python3", "-c", FAKE_TRAINER],
                    "env": [{"name": k, "value": v} for k, v in variables.items()],
                    "volumeMounts": [{"name": "book", "mountPath": "/book"}],
                }
            ],
            "volumes": [{"name": "book", "hostPath": {"path": str(book)}}],
        }
    }


def job(name: str, pods: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """The smallest distilling job, with changes."""
    whole: dict[str, Any] = {
        "distill": {},
        "teacher": {
            "model": {"uri": "s3://models/big"},
            "workers": {"gpusPerReplica": 0, "template": pods or {}},
        },
        "student": {"fromTeacher": {"layers": 4}},
        "data": {"sources": [{"uri": "s3://data/x.jsonl"}]},
        "workers": {"nodes": 1, "gpusPerNode": 0, "template": pods or {}},
        "storage": {"uri": "s3://runs/test"},
        **spec,
    }
    return {
        "apiVersion": "kubedistill.dev/v1alpha1",
        "kind": "DistillationJob",
        "metadata": {"name": name},
        "spec": {k: v for k, v in whole.items() if v is not None},
    }


ONLINE = {"model": {"uri": "s3://models/big"}, "delivery": "Online"}
"""A teacher without pods of its own: the gang comes right after the preflight."""


def distilling(name: str, pods: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """A job of the stand-in's that commits every five steps."""
    return job(name, pods, **{"checkpoint": {"interval": 5}, **spec})


def chain(name: str, pods: dict[str, Any], *stages: dict[str, Any]) -> dict[str, Any]:
    """A chain of the stand-in's, whose teachers are within the gangs."""
    shared = job("x", pods)["spec"]
    shared.pop("teacher")
    shared["workers"] = {"nodes": 1, "gpusPerNode": 0, "template": pods}
    return {
        "apiVersion": "kubedistill.dev/v1alpha1",
        "kind": "DistillationChain",
        "metadata": {"name": name},
        "spec": {
            "initialTeacher": {"model": {"uri": "s3://models/big"}},
            "template": {**shared, "teacher": {"delivery": "Online"}},
            "stages": list(stages),
        },
    }


def wait_for(what: Callable[[], Any], text: str, seconds: float = 90) -> Any:
    """What the function returns once it is true. Raises TimeoutError with `text`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = what()
        if value:
            return value
        time.sleep(0.3)
    raise TimeoutError(text)


class Bench:
    """One namespace of a cluster, and what tests do in it."""

    def __init__(self, handle: Any, namespace: str) -> None:
        self.handle = handle
        self.namespace = namespace

    def kubectl(self, *args: str, scoped: bool = True, **options: Any) -> str:
        scope = ("-n", self.namespace) if scoped else ()
        return str(self.handle.kubectl(*scope, *args, **options))

    def apply(self, *objects: dict[str, Any], check: bool = True) -> str:
        # JSON keeps a string such as "1e-5" a string.
        whole = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        return self.kubectl("apply", "-f", "-", stdin=json.dumps(whole), check=check)

    def get(self, *args: str) -> Any:
        return json.loads(self.kubectl("get", *args, "-o", "json"))

    def status(self, name: str, kind: str = "dj") -> dict[str, Any]:
        """Without kubectl, since it is asked for again and again while a test waits."""
        plural = {"dj": "distillationjobs", "dchain": "distillationchains"}[kind]
        path = f"/apis/kubedistill.dev/v1alpha1/namespaces/{self.namespace}/{plural}/{name}"
        return dict(self.handle.api.get(path).get("status") or {})

    def condition(self, name: str, kind: str = "Succeeded", resource: str = "dj") -> dict[str, Any]:
        for condition in self.status(name, resource).get("conditions") or []:
            if condition["type"] == kind:
                return dict(condition)
        return {}

    def wait_state(
        self, name: str, *reasons: str, seconds: float = 90, resource: str = "dj"
    ) -> dict[str, Any]:
        """Wait until the reason of Succeeded is one of these; the whole status."""

        def there() -> bool:
            return self.condition(name, resource=resource).get("reason") in reasons

        try:
            wait_for(there, "", seconds)
        except TimeoutError:
            status = json.dumps(self.status(name, resource), indent=1)
            raise TimeoutError(f"{name} is not {reasons}: {status}") from None
        return self.status(name, resource)


_LEADING = '"message": "leading"'


class Operator:
    """The operator as a process, under its own role."""

    def __init__(self, kubeconfig: Path, log: Path, **settings: str) -> None:
        self.log = log
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        env |= {
            "KUBECONFIG": str(kubeconfig),
            "KUBEDISTILL_BIND_ADDRESS": "127.0.0.1",
            "KUBEDISTILL_HEALTH_PORT": "0",
            "KUBEDISTILL_NAMESPACE": "kubedistill-system",
            "KUBEDISTILL_PROGRESS_POLL_SECONDS": "1",
            "KUBEDISTILL_BACKOFF_BASE_SECONDS": "1",
            "KUBEDISTILL_LEASE_SECONDS": "15",
            "KUBEDISTILL_LEASE_RENEW_SECONDS": "12",
            "KUBEDISTILL_LEASE_RETRY_SECONDS": "1",
            "KUBEDISTILL_TERMINATION_GRACE_SECONDS": "5",
            "KUBEDISTILL_TERMINATION_MARGIN_SECONDS": "10",
        } | {f"KUBEDISTILL_{name.upper()}": value for name, value in settings.items()}
        self._env = env
        self.start()

    def start(self) -> None:
        """Start it, again after `kill` or `stop`."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kubedistill_operator.main"],
                env=self._env, stdout=output, stderr=output,
            )  # fmt: skip

    @property
    def leads(self) -> bool:
        return _LEADING in self.log.read_text()

    def restart(self) -> None:
        """Start it again after `kill`; it leads when this returns."""
        led = self.log.read_text().count(_LEADING)
        self.start()
        wait_for(lambda: self.log.read_text().count(_LEADING) > led, "it does not lead", 120)

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            return -9


def install_role(handle: Any, state: Path) -> Path:
    """CRDs, and the operator's account with exactly its rules; the kubeconfig of that account."""
    crds = Path(__file__).resolve().parents[1] / "crds"
    # On a cluster of one's own a chart may have brought them.
    handle.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(crds))
    handle.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    meta = {"name": "kubedistill-operator"}
    here = meta | {"namespace": "kubedistill-system"}
    subject = [{"kind": "ServiceAccount", **here}]
    rbac = "rbac.authorization.k8s.io"

    def binding(kind: str, role: str, metadata: dict[str, str]) -> dict[str, Any]:
        reference = {"apiGroup": rbac, "kind": role, "name": meta["name"]}
        return {"apiVersion": f"{rbac}/v1", "kind": kind, "metadata": metadata,
                "roleRef": reference, "subjects": subject}  # fmt: skip

    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": here["namespace"]}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": here},
        {"apiVersion": f"{rbac}/v1", "kind": "ClusterRole", "metadata": meta, "rules": RULES},
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": here, "rules": LEASE_RULES},
        binding("ClusterRoleBinding", "ClusterRole", meta),
        binding("RoleBinding", "Role", here),
    ]
    handle.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(objects))
    token = handle.kubectl(
        "-n", here["namespace"], "create", "token", meta["name"], "--duration=6h"
    ).strip()
    config = yaml.safe_load(handle.kubeconfig.read_text())
    config["users"] = [{"name": user["name"], "user": {"token": token}} for user in config["users"]]
    path = state / "operator.kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path

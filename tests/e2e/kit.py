"""Real training on the dev cluster: the operator as a process, real pods, a real store."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
import zstandard
from devcluster.handle import Handle
from kubedistill_operator.plan.compose import merge_patch
from kubedistill_trainer.data.template import EXAMPLE
from operator_kit import Bench, Operator, wait_for

from e2e.gang import llama, small_spec

SLOW_SECONDS = 1500.0
"""Until a real job reaches a state: each of its processes imports torch and DeepSpeed."""


def start_operator(account: Path, log: Path) -> Operator:
    """An operator whose trainers run on the CPU."""
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return Operator(
        account,
        log,
        trainer_env=json.dumps(environment),
        termination_grace_seconds="60",
        elastic_wait_seconds="4",
    )


class Team(Bench):
    """A namespace with the Secret `s3` in it, and what a team does there."""

    def __init__(self, handle: Handle, namespace: str) -> None:
        super().__init__(handle, namespace)
        self.secret("s3", handle.s3.access_key, handle.s3.secret_key)

    def secret(self, name: str, access_key: str, secret_key: str) -> None:
        self.kubectl(
            "create", "secret", "generic", name,
            f"--from-literal=AWS_ACCESS_KEY_ID={access_key}",
            f"--from-literal=AWS_SECRET_ACCESS_KEY={secret_key}",
        )  # fmt: skip

    def tuned(self, name: str, **parts: Any) -> dict[str, Any]:
        """A fineTune job on two pods; `parts` are merged over its own (RFC 7386)."""
        own = {
            "fineTune": {},
            "student": {"config": llama(48, 2)},
            "training": {"maxSteps": 12, "deepSpeed": {"zeroStage": 1}},
            "storage": {"secretRef": {"name": "s3"}},
        }
        spec = merge_patch(merge_patch(small_spec(self.handle.s3), own), parts)
        return {
            "apiVersion": "kubedistill.dev/v1alpha1",
            "kind": "DistillationJob",
            "metadata": {"name": name},
            "spec": spec,
        }

    def distilled(self, name: str, teacher: str, **parts: Any) -> dict[str, Any]:
        """A student of one layer, taught by what the job `teacher` made."""
        own: dict[str, Any] = {
            "fineTune": None,
            "distill": {},
            "teacher": {"fromJob": {"name": teacher}, "workers": {"gpusPerReplica": 0}},
            "student": {"config": None, "fromTeacher": {"layers": 1}},
            **parts,
        }
        return self.tuned(name, **own)

    def conversing(self, name: str) -> dict[str, Any]:
        """A fineTune job whose student answers small sums, and thinks first when it is told to; with
        a tokenizer that no other has."""
        bucket = f"s3://{self.handle.s3.bucket}"
        sums = f"{bucket}/data/sums.jsonl"
        return self.tuned(
            name,
            student={"config": llama(64, 2)},
            data={
                "sources": [
                    {"uri": sums, "messagesField": "turns"},
                    {"uri": sums, "promptField": "question", "responseField": "answer"},
                ],
                "tokenizer": {"uri": f"{bucket}/other-tokenizer"},
                "chatTemplate": EXAMPLE,
                "holdout": 0.01,
            },
            training={"epochs": 1000, "maxSteps": 400, "learningRate": 5e-3},
            workers={"nodes": 1},
            checkpoint={"interval": 1000},
        )

    def answers(self, uri: str) -> dict[tuple[int, int], dict[str, Any]]:
        """What lies in a stream of text, by prompt and sample."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for name, body in self.objects(uri).items():
            if name.endswith(".jsonl.zst"):
                text = zstandard.ZstdDecompressor().decompress(body).decode()
                lines = [json.loads(line) for line in text.split("\n")[:-1]]
                found |= {
                    (line["prompt"], line["sample"]): {"finished": True, **line} for line in lines
                }
        return found

    def example(self, path: Path, endpoint: str = "") -> list[dict[str, Any]]:
        """The documents of an example, with this cluster's store in place of its own, and
        `endpoint` in that of its teacher's server."""
        text = re.sub(r"http://s3\.example:8333", self.handle.s3.endpoint, path.read_text())
        text = re.sub(r"http://vllm\.example:8000/v1", endpoint, text)
        return list(yaml.safe_load_all(text))

    def ends(self, name: str, *reasons: str, resource: str = "dj") -> dict[str, Any]:
        """The status once the object has ended; it must have ended for one of these reasons."""

        def ended() -> bool:
            found = self.condition(name, resource=resource).get("status")
            return found in ("True", "False")

        try:
            wait_for(ended, "", SLOW_SECONDS)
        except TimeoutError:
            raise TimeoutError(f"{name} does not end: {self.story(name)}") from None
        status = self.status(name, resource)
        assert self.condition(name, resource=resource)["reason"] in reasons, self.story(name)
        return status

    def story(self, name: str) -> str:
        """Why a test fails: the status and the last lines of every container."""
        logs = sorted((self.handle.logs / self.namespace).glob(f"{name}-*/*.log"))
        tails = [f"--- {path.parent.name}\n{path.read_text()[-1500:]}" for path in logs]
        return json.dumps(self.status(name), indent=1) + "\n".join(tails)

    def steps(self, name: str, at_least: int) -> None:
        """Wait until a commit of this step or a later one is in status."""

        def committed() -> bool:
            status = self.status(name)
            return bool((status.get("checkpoint") or {}).get("step", 0) >= at_least)

        wait_for(committed, f"{name} has no commit of step {at_least}", SLOW_SECONDS)

    def pod(self, name: str, index: int) -> str:
        """The name of a running gang's pod."""
        selector = f"kubedistill.dev/job={name},batch.kubernetes.io/job-completion-index={index}"
        pods = self.get("pods", "-l", selector, "--field-selector=status.phase=Running")["items"]
        return str(pods[0]["metadata"]["name"])

    def kill(self, pod: str) -> None:
        """End a pod's processes at once: on our node by SIGKILL, elsewhere by a forced deletion."""
        if self.handle.has_node:
            self.handle.faults.kill(self.namespace, pod)
        else:
            self.kubectl("delete", "pod", pod, "--grace-period=0", "--force")

    def objects(self, uri: str) -> dict[str, bytes]:
        """Everything below an s3:// address, by what follows it."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        return dict(_objects(self.handle, bucket, prefix.rstrip("/") + "/"))

    def weights(self, name: str) -> bytes:
        """The exported weights of a finished job."""
        found = self.objects(self.status(name)["model"]["uri"])
        return found["model.safetensors"]


def _objects(handle: Handle, bucket: str, prefix: str) -> Iterator[tuple[str, bytes]]:
    client = handle.s3.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Contents", []):
            body = client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
            yield item["Key"].removeprefix(prefix), body

"""Runs containers of the trainer as plain processes: real ranks over gloo, a real store, no cluster."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.process import free_port
from devcluster.s3 import S3Access
from devcluster.zygote import Forked, Zygote
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import Outcome, Rendezvous, ResolvedModel, RunSpec
from kubedistill_operator.plan.compose import merge_patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "demo"))


@dataclass(frozen=True)
class Result:
    """How the containers of one role ended."""

    codes: list[int]
    outcomes: list[Outcome]
    log: str


def llama(hidden: int, layers: int) -> dict[str, Any]:
    """A small architecture."""
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }  # fmt: skip


def small_spec(s3: S3Access) -> dict[str, Any]:
    """What small jobs share: the text of `put_inputs`, two pods of one rank, frequent commits."""
    bucket = f"s3://{s3.bucket}"
    return {
        "data": {
            "sources": [{"uri": f"{bucket}/data/small.jsonl"}],
            "tokenizer": {"uri": f"{bucket}/tokenizer"},
            "sequenceLength": 64,
            "holdout": 0.2,
        },
        "training": {
            "epochs": 50, "globalBatchSize": 8, "learningRate": 3e-3, "precision": "FP32",
        },
        "workers": {"nodes": 2, "gpusPerNode": 0},
        "storage": {"uri": f"{bucket}/runs", "endpoint": s3.endpoint},
        "checkpoint": {"interval": 2},
        # What every job does at its end, in little: many tests wait for it.
        "evaluation": {"examples": 2, "maxAnswerTokens": 4, "latency": False},
    }  # fmt: skip


class Trainer:
    """Starts containers below one folder against one store."""

    def __init__(self, folder: Path, s3: S3Access, warm: Zygote | None = None) -> None:
        """`warm`: containers are forks of it, which need not import torch and DeepSpeed."""
        self._folder = folder
        self._s3 = s3
        self._warm = warm
        self.exporters: list[int] = []
        """Ports of /progress and /metrics of the pods that were started last."""

    def spec(self, **parts: Any) -> DistillationJobSpec:
        """A small job; `parts` are merged over its own (RFC 7386)."""
        own = {"training": {"maxSteps": 6, "microBatchSize": 2}}
        return DistillationJobSpec.model_validate(
            merge_patch(merge_patch(small_spec(self._s3), own), parts)
        )

    def run(
        self,
        role: str,
        spec: DistillationJobSpec,
        *,
        name: str = "job",
        attempt: int = 1,
        nodes: int | None = None,
        teacher: ResolvedModel | None = None,
        student: ResolvedModel | None = None,
        timeout_seconds: float = 600,
        strike: Callable[[list[int]], None] | None = None,
    ) -> Result:
        """Start all containers of a role and wait for them. `strike` gets their pids.

        `nodes`: fewer or more than the spec's, as after a node was lost for good.
        """
        nodes = (nodes or spec.workers.nodes) if role == "student" else 1
        rendezvous = Rendezvous(host="127.0.0.1", port=free_port(), nodes=nodes)
        run = RunSpec(
            namespace="test", name=name, uid=f"uid-{name}", role=role, attempt=attempt,
            fence=attempt, spec=spec, teacher_model=teacher, student_model=student,
            inputs_digest=hashlib.sha256(spec.model_dump_json().encode()).hexdigest(),
            rendezvous=rendezvous if role == "student" else None,
        )  # fmt: skip
        folders = [self._folder / f"{name}-{role}-{attempt}-{i}" for i in range(nodes)]
        self.exporters = [free_port() for _ in folders]
        processes = [self._start(role, run, folder, i) for i, folder in enumerate(folders)]
        try:
            if strike is not None:
                strike([process.pid for process in processes])
            codes = [process.wait(timeout_seconds) for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return Result(
            codes,
            [Outcome.model_validate_json((f / "message").read_text()) for f in folders],
            "\n".join((f / "log").read_text()[-4000:] for f in folders),
        )

    def _start(
        self, role: str, run: RunSpec, folder: Path, index: int
    ) -> subprocess.Popen[bytes] | Forked:
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(run.model_dump_json(by_alias=True))
        env = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1", "JOB_COMPLETION_INDEX": str(index),
            "KUBEDISTILL_RUN_SPEC": str(folder / "run.json"), "KUBEDISTILL_SCRATCH": str(folder),
            "KUBEDISTILL_TERMINATION_MESSAGE": str(folder / "message"),
            "KUBEDISTILL_EXPORTER_PORT": str(self.exporters[index]), "POD_IP": "127.0.0.1",
            "AWS_ACCESS_KEY_ID": self._s3.access_key, "AWS_SECRET_ACCESS_KEY": self._s3.secret_key,
        }  # fmt: skip
        module = "kubedistill_trainer.launch"
        if self._warm is not None:
            return self._warm.fork(module, role, env=env, log=folder / "log")
        with (folder / "log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, role],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def model_of(result: Result, job: str) -> ResolvedModel:
    """What a finished student's job hands on."""
    model = result.outcomes[0].model
    assert model is not None, result.log
    return ResolvedModel(uri=model.uri, digest=model.digest, job=job)


def sums() -> str:
    """Small sums with their results, each worked out by an assistant that thinks when it is told to.
    JSON lines."""
    records = []
    for a, b in itertools.product(range(8), range(8)):
        worked = f"<think>\n{a} and {b} make {a + b}\n</think>\n\n{a + b}"
        said = {"system": "Think first.", "user": f"{a} + {b}?", "assistant": worked}
        turns = [{"role": role, "content": content} for role, content in said.items()]
        records.append(
            {"question": f"{a} + {b}?", "answer": f"It is {a + b}.", "sum": a + b, "turns": turns}
        )
    return "".join(json.dumps(record) + "\n" for record in records)


def put_inputs(s3: S3Access) -> None:
    """A small part of the demo's text, questions with answers, and a tokenizer, where the examples
    look for them."""
    from pydoc_data.topics import topics

    import corpus

    lines = "".join(json.dumps({"text": text}) + "\n" for text in corpus.documents()[:12])
    pairs = "".join(
        json.dumps({"question": f"What is said of {name}?", "answer": text.split("\n\n")[1]}) + "\n"
        for name, text in sorted(topics.items())
    )
    objects = {
        "data/small.jsonl": lines.encode(),
        "data/pairs.jsonl": pairs.encode(),
        "data/sums.jsonl": sums().encode(),
    }
    tokenizer = corpus.tokenizer_files(512)
    objects |= {f"tokenizer/{name}": body for name, body in tokenizer.items()}
    other = corpus.tokenizer_files(384)
    objects |= {f"other-tokenizer/{name}": body for name, body in other.items()}
    client = s3.client()
    for key, body in objects.items():
        client.put_object(Bucket=s3.bucket, Key=key, Body=body)


def exported(access: S3Access, result: Result) -> bytes:
    """The weights that a finished run exported."""
    model = result.outcomes[0].model
    assert model is not None, result.log
    return stored(access, model.uri, "model.safetensors")


def stored(access: S3Access, uri: str, name: str) -> bytes:
    """A file of the folder `uri`."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    got = access.client().get_object(Bucket=bucket, Key=f"{prefix}/{name}")
    return bytes(got["Body"].read())


def committed(access: S3Access, run: str, records: int, seconds: float = 300) -> None:
    """Wait until the log of the run at this address has so many records beside its first."""
    prefix = f"{run.removeprefix(f's3://{access.bucket}/')}/log/"
    client, deadline = access.client(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        if client.list_objects_v2(Bucket=access.bucket, Prefix=prefix)["KeyCount"] > records:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{run} has no {records} records")

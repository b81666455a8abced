"""Logits of a server, end to end on S3: preflight, writers, manifest, reader, loss, figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from endpoint_kit import Fault, Mind, Server, serving
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import Outcome, RunSpec
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset, load_dataset
from kubedistill_trainer.data.packing import IGNORED
from kubedistill_trainer.exporter import ProgressBoard
from kubedistill_trainer.failures import InputsRefused, RunFailure
from kubedistill_trainer.losses import TeacherSparse
from kubedistill_trainer.methods import generate
from kubedistill_trainer.methods.generate import run_teacher, teacher_outputs
from kubedistill_trainer.methods.request import job_request
from kubedistill_trainer.methods.signal import joined_sparse, stream_teacher
from kubedistill_trainer.methods.student import StudentWithLoss
from kubedistill_trainer.preflight import run_preflight
from kubedistill_trainer.report.evaluate import measure
from kubedistill_trainer.teacher.endpoint_scores import pieces
from kubedistill_trainer.teacher.manifest import StreamIdentity, read_manifest
from kubedistill_trainer.teacher.partition_log import PartitionLog
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)

K, LENGTH, WRITERS = 20, 24, 2


@pytest.fixture
def server(mind: Mind, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("API_KEY", "sk-1")
    with serving(mind) as running:
        running.key = "sk-1"
        yield running


@pytest.fixture
def run(s3: S3Server, server: Server, mind: Mind) -> RunSpec:  # noqa: F811
    store = s3.store()
    texts = [f"the question {n} is the answer to {n * n} questions " for n in range(30)]
    store.put("data/a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    for name, body in mind.tokenizer.files.items():
        store.put(f"tokenizer/{name}", body)
    spec = DistillationJobSpec.model_validate(
        {
            "distill": {"objective": {"temperature": 1}},
            "teacher": {
                "endpoint": {"url": server.url, "model": "tiny", "concurrency": 4},
                "payload": "Sparse", "topK": K, "workers": {"replicas": WRITERS},
            },
            "student": {
                "config": {
                    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
                    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
                }
            },
            "data": {
                "sources": [{"uri": f"{store.uri}/data/a.jsonl"}], "holdout": 0.2,
                "tokenizer": {"uri": f"{store.uri}/tokenizer"}, "sequenceLength": LENGTH,
            },
            "training": {"globalBatchSize": 4},
            "workers": {"gpusPerNode": 0},
            "storage": {"uri": f"{store.uri}/runs", "endpoint": s3.endpoint},
            "evaluation": {"examples": 0, "latency": False},
        }
    )  # fmt: skip
    return RunSpec(namespace="n", name="j", uid="u", role="teacher", inputs_digest="d", spec=spec)


def write(run: RunSpec, scratch: Path, partition: int) -> Outcome:
    context = Context(run, scratch / f"w{partition}", partition=partition)
    return run_teacher(context, ProgressBoard())


def reader(run: RunSpec, dataset: Dataset, scratch: Path) -> Any:
    context = Context(run, scratch / "r")
    asked = job_request(run, dataset, context.open_store)
    return stream_teacher(context, dataset, asked.request, asked.config, 1.0, torch.device("cpu"))


def exact(mind: Mind, dataset: Dataset, identity: StreamIdentity, sample: int) -> TeacherSparse:
    """What the same model's writer in a pod of its own would have kept."""
    outputs = teacher_outputs(mind.model, identity, dataset.packed.take([sample]), sample)
    return joined_sparse([outputs], 1.0, torch.device("cpu"))


def test_a_server_teaches_as_its_model_would(
    run: RunSpec, server: Server, mind: Mind, tmp_path: Path
) -> None:
    context = Context(run, tmp_path)
    accepted = run_preflight(context)
    assert accepted.resolved is not None and not accepted.resolved.stream_complete
    server.seen.clear()
    server.faults = [None, Fault(503), Fault("half"), None, Fault(429, {"Retry-After": "0.1"})]
    outcomes = [write(run, tmp_path, partition) for partition in range(WRITERS)]
    status = outcomes[0].progress.teacher_stream if outcomes[0].progress else None
    assert status is not None and status.payload == "Sparse" and status.tokens > 0
    assert "student" not in {seen.path for seen in server.seen}

    dataset = load_dataset(run, context.open_store)
    request, _ = job_request(run, dataset, context.open_store)
    assert isinstance(request, StreamIdentity)
    manifest = read_manifest(context.storage, request)
    assert manifest is not None and manifest.origin is not None
    assert manifest.origin.model_dump() == {
        "url": server.url, "model": "tiny", "way": "prompt_logprobs", "temperature": 1.0,
    }  # fmt: skip
    assert manifest.identity.payloads[0].model_dump()["temperatures"] == (1.0,)

    paid = len(server.paid)
    again = run_preflight(Context(run, tmp_path))
    assert again.resolved is not None and again.resolved.stream_complete
    assert again.resolved.stream_uri == accepted.resolved.stream_uri
    for partition in range(WRITERS):
        write(run, tmp_path / "again", partition)
    # Beside the probes that each asks first: a text of the data and one of each own pod.
    assert len(server.paid) - paid == 1 + WRITERS

    torch.manual_seed(1)
    student = StudentWithLoss(Mind.tiny(seed=3).model, objective(run), dataset.tokenizer.vocab_size)
    teacher = reader(run, dataset, tmp_path)
    samples = range(len(dataset.packed))
    teacher.expect(iter([[sample] for sample in samples]))
    for sample in samples:
        row = dataset.packed.take([sample])
        tokens, positions, labels = (
            torch.from_numpy(part) for part in (row.tokens, row.positions, row.labels)
        )
        batch = teacher.batch([sample], tokens, positions)
        wanted = exact(mind, dataset, request, sample)
        learnt = labels[0] != IGNORED
        assert torch.equal(batch.ids_NK[learnt], wanted.ids_NK[learnt])
        losses = [
            float(student(tokens, positions, labels, given, float(learnt.sum())).soft)
            for given in (batch, wanted)
        ]
        # Apart by what 128 levels of a log-probability lose.
        assert losses[0] == pytest.approx(losses[1], rel=0.02)
    teacher.close()


def objective(run: RunSpec) -> Any:
    assert run.spec.distill is not None
    return run.spec.distill.objective


def test_agreement_is_measured_without_a_teacher_in_sight(
    run: RunSpec, mind: Mind, tmp_path: Path
) -> None:
    for partition in range(WRITERS):
        write(run, tmp_path, partition)
    dataset = load_dataset(run, Context(run, tmp_path).open_store)
    teacher = reader(run, dataset, tmp_path)
    module = StudentWithLoss(mind.model, objective(run), dataset.tokenizer.vocab_size)
    engine = _Engine(module)
    figures = measure(engine, teacher, dataset, 0, 1).evaluation(dataset.sources).figures
    teacher.close()
    # The student is the teacher itself: what it finds likeliest is what the stream says.
    assert figures["teacherAgreement"] == pytest.approx(1.0)
    assert "teacherKL" not in figures


class _Engine:
    """A module as DeepSpeed's engine is called."""

    device = torch.device("cpu")

    def __init__(self, module: Any) -> None:
        self._module = module

    def eval(self) -> None:
        self._module.eval()

    def __call__(self, *inputs: Any) -> Any:
        return self._module(*inputs)


def test_a_writer_that_comes_back_asks_only_for_what_is_missing(
    run: RunSpec, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server refuses the key after some texts, and the writer ends; the next one goes on."""
    monkeypatch.setattr(generate, "_FIRST_SHARD_BYTES", 1)
    context = Context(run, tmp_path)
    packed = load_dataset(run, context.open_store).packed
    texts = [len(pieces(packed.take([sample]))) for sample in range(len(packed))]
    # One for the probe.
    server.faults = [*[None] * 12, *[Fault(401)] * 5]
    with pytest.raises(InputsRefused, match="secretRef"):
        write(run, tmp_path, 0)
    request, _ = job_request(run, load_dataset(run, context.open_store), context.open_store)
    assert isinstance(request, StreamIdentity)
    log = PartitionLog(context.storage.child(request.address), 0)
    log.refresh()
    kept = sum(texts[sample] for sample in range(0, len(packed), WRITERS)[: log.committed])
    assert 0 < kept <= 11
    server.faults, before = [], len(server.paid)
    for partition in range(WRITERS):
        write(run, tmp_path, partition)
    assert len(server.paid) - before == sum(texts) - kept + WRITERS


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": "huge"}, "spec.teacher.endpoint.model"),
        ({"url": "http://127.0.0.1:9/v1", "max_retries": 0}, "spec.teacher.endpoint.url"),
    ],
)
def test_the_preflight_refuses_before_anything_is_written(
    run: RunSpec, server: Server, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    assert run.spec.teacher is not None and run.spec.teacher.endpoint is not None
    endpoint = run.spec.teacher.endpoint.model_copy(update=changes)
    teacher = run.spec.teacher.model_copy(update={"endpoint": endpoint})
    spec = run.spec.model_copy(update={"teacher": teacher})
    context = Context(run.model_copy(update={"spec": spec}), tmp_path)
    with pytest.raises(RunFailure, match=field):
        run_preflight(context)
    assert not server.seen
    assert not list(context.storage.list("streams/"))

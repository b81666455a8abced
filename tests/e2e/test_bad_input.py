"""Inputs that cannot work: one clear message each, no gang and no teacher started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.careless_store import CarelessStore
from e2e.gang import llama
from e2e.kit import SLOW_SECONDS, Team

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2 * SLOW_SECONDS)]

MANY_GPUS = 16
"""A pod may ask for so many; the node has half of it."""


def cases(team: Team, careless: str) -> dict[str, tuple[dict[str, Any], str, list[str]]]:
    """Name → what differs from a good job, the reason, and the words that must be said."""
    bucket = f"s3://{team.handle.s3.bucket}"

    def data(name: str) -> dict[str, Any]:
        return {"data": {"sources": [{"uri": f"{bucket}/{name}"}]}}

    def taught_by(model: str, delivery: str = "Stream") -> dict[str, Any]:
        teacher = {
            "model": {"uri": f"{bucket}/models/{model}"}, "delivery": delivery,
            "workers": {"gpusPerReplica": 0},
        }  # fmt: skip
        return {
            "fineTune": None, "distill": {}, "teacher": teacher,
            "student": {"config": None, "fromTeacher": {"layers": 1}},
        }  # fmt: skip

    narrow = {"spec": {"containers": [
        {"name": "trainer", "resources": {"limits": {"memory": "2Gi"}}}]}}  # fmt: skip
    return {
        "no-bucket": (
            {"storage": {"uri": "s3://elsewhere/runs"}},
            "InvalidSpec", ["bucket 'elsewhere' does not exist", "storage.uri"],
        ),
        "no-data": (
            data("data/none.jsonl"),
            "UnreadableInput",
            ["spec.data.sources[0].uri", "no such object", "data/none.jsonl", "upload the file"],
        ),
        "no-data-bucket": (
            {"data": {"sources": [{"uri": "s3://nowhere/small.jsonl"}]}},
            "UnreadableInput", ["spec.data.sources[0].uri", "bucket 'nowhere' does not exist"],
        ),
        "wrong-keys": (
            {"storage": {"secretRef": {"name": "wrong"}}},
            "InvalidSpec", ["refuses these credentials", "storage.secretRef"],
        ),
        "careless": (
            {"storage": {"endpoint": careless}},
            "InvalidSpec", ["ignores If-None-Match", careless],
        ),
        "not-json": (
            data("data/broken.jsonl"),
            "UnreadableInput", ["data/broken.jsonl line 2", "not JSON", "maxBadRecords"],
        ),
        "empty": (
            data("data/empty.jsonl"),
            "UnreadableInput", ["spec.data.sources", "no text in", "give a file that holds text"],
        ),
        "other-tokenizer": (
            {
                "student": {"config": None, "model": {"uri": f"{bucket}/models/foreign"}},
            },
            "UnreadableInput", ["spec.student", "models/foreign", "differs from"],
        ),
        "too-wide": (
            {
                "student": {"config": llama(4096, 16)},
                "workers": {"template": narrow},
            },
            "InvalidSpec", ["spec.student", "GiB", "memory limit of 2.0 GiB", "smaller"],
        ),
        "zero-student": (
            {"student": {"config": None, "model": {"uri": f"{bucket}/models/zero"}}},
            "UnreadableInput",
            ["spec.student", "only zeros in model.embed_tokens.weight", f"{bucket}/models/zero"],
        ),
        "nan-teacher": (
            taught_by("nan"),
            "UnreadableInput",
            ["spec.teacher", "NaN or infinity in model.layers.", f"{bucket}/models/nan"],
        ),
        "few-rows": (
            taught_by("narrow", "Online"),
            "UnreadableInput",
            ["spec.teacher", "an embedding of 300 rows", f"{bucket}/models/narrow", "has 512 ids"],
        ),
    }  # fmt: skip


NAMES = [
    "no-bucket", "no-data", "no-data-bucket", "wrong-keys", "careless", "not-json", "empty",
    "other-tokenizer", "too-wide", "zero-student", "nan-teacher", "few-rows",
]  # fmt: skip


@pytest.fixture(scope="module")
def bad(team: Team) -> Iterator[dict[str, tuple[str, list[str]]]]:
    """All bad jobs are applied at once; name → reason and words."""
    client, bucket = team.handle.s3.client(), team.handle.s3.bucket
    good = json.dumps({"text": "a line"})
    client.put_object(Bucket=bucket, Key="data/broken.jsonl", Body=f"{good}\nnot json\n".encode())
    client.put_object(Bucket=bucket, Key="data/empty.jsonl", Body=b"\n\n")
    _put_foreign_model(team)
    _put_models(team)
    team.secret("wrong", "nobody", "nothing")
    with CarelessStore(team.handle.s3) as careless:
        table = cases(team, careless.endpoint)
        assert list(table) == NAMES
        team.apply(*(team.tuned(name, **change) for name, (change, _, _) in table.items()))
        yield {name: (reason, words) for name, (_, reason, words) in table.items()}


def _put_foreign_model(team: Team) -> None:
    """A model's folder with a tokenizer that is not the data's; its weights are not looked at."""
    import corpus

    files = corpus.tokenizer_files(384)
    config = {**llama(48, 2), "vocab_size": 384, "architectures": ["LlamaForCausalLM"]}
    files["config.json"] = json.dumps(config).encode()
    client, bucket = team.handle.s3.client(), team.handle.s3.bucket
    for name, body in files.items():
        client.put_object(Bucket=bucket, Key=f"models/foreign/{name}", Body=body)


def _put_models(team: Team) -> None:
    """One with weights of zeros, one with a NaN in its middle layer, one with fewer rows than ids."""
    import corpus
    import torch
    from kubedistill_trainer.models.load import config_of, random_model
    from safetensors.torch import save

    client, bucket = team.handle.s3.client(), team.handle.s3.bucket
    for name, rows in {"zero": 512, "nan": 512, "narrow": 300}.items():
        config = {**llama(48, 3), "vocab_size": rows, "architectures": ["LlamaForCausalLM"]}
        weights = random_model(config_of(config, rows, "f", 64), 0, torch.float32).state_dict()
        del weights["lm_head.weight"]
        if name == "zero":
            weights = {key: torch.zeros_like(value) for key, value in weights.items()}
        if name == "nan":
            weights["model.layers.1.mlp.up_proj.weight"][5, 5] = float("nan")
        files = corpus.tokenizer_files(512) | {
            "config.json": json.dumps(config).encode(), "model.safetensors": save(weights),
        }  # fmt: skip
        for file, body in files.items():
            client.put_object(Bucket=bucket, Key=f"models/{name}/{file}", Body=body)


@pytest.mark.parametrize("name", NAMES)
def test_one_message_and_nothing_started(
    team: Team, bad: dict[str, tuple[str, list[str]]], name: str
) -> None:
    reason, words = bad[name]
    status = team.ends(name, reason)
    message = team.condition(name)["message"]
    assert [word for word in words if word not in message] == [], message
    assert team.condition(name, "Validated")["status"] == "False"
    assert not status.get("attempts")
    started = [job["metadata"]["name"] for job in team.get("jobs")["items"]]
    assert [job for job in started if job.startswith((f"{name}-a", f"{name}-teacher"))] == []


def test_a_gpu_that_no_node_has_is_a_condition(team: Team) -> None:
    many = {"workers": {"nodes": 1, "gpusPerNode": MANY_GPUS}}
    team.apply(team.tuned("greedy", training={"globalBatchSize": MANY_GPUS}, **many))
    team.wait_state("greedy", "Unschedulable", seconds=SLOW_SECONDS)
    assert "nvidia.com/gpu" in team.condition("greedy")["message"]


@pytest.fixture(scope="module")
def source(team: Team) -> str:
    """The name of a finished job: a teacher of two layers."""
    team.apply(team.tuned("source", training={"maxSteps": 2}, workers={"nodes": 1}))
    team.ends("source", "Completed")
    return "source"


def test_a_layer_that_the_teacher_does_not_have(team: Team, source: str) -> None:
    features = [{"studentLayer": 1, "teacherLayer": 9}]
    job = team.distilled("layers", source, distill={"objective": {"features": features}})
    job["spec"]["teacher"]["delivery"] = "Online"
    team.apply(job)
    status = team.ends("layers", "InvalidSpec")
    message = team.condition("layers")["message"]
    assert "spec.distill.objective.features[0].teacherLayer: found 9" in message
    assert "the teacher has 2 layers: write 1…2" in message
    assert not status.get("attempts")


def test_no_payload_within_the_bound(team: Team, source: str) -> None:
    """The teacher has to be asked; nothing is trained, and the table is in the message."""
    job = team.distilled("exact", source, distill={"objective": {"temperature": 4}})
    job["spec"]["teacher"] |= {"payload": "Auto", "maxGradientError": 1e-6}
    team.apply(job)
    team.ends("exact", "TeacherFailed")
    message = team.condition("exact")["message"]
    for words in ("spec.teacher.maxGradientError: found 1e-06", "Hidden, int8", "gradient error"):
        assert words in message
    assert team.objects(f"s3://{team.handle.s3.bucket}/runs/{team.namespace}/exact/model") == {}


def test_a_stream_of_other_data_is_refused(team: Team, source: str) -> None:
    """Its address says what it is made of; what lies there says something else."""

    def student(name: str, temperature: float, **workers: Any) -> dict[str, Any]:
        # A Sparse stream is made for its temperatures.
        job = team.distilled(
            name, "source", distill={"objective": {"temperature": temperature}},
            workers={"nodes": 1},
        )  # fmt: skip
        job["spec"]["teacher"]["payload"] = "Sparse"
        job["spec"]["teacher"]["workers"] |= workers
        return job

    team.apply(student("own", 2))
    written = team.objects(team.ends("own", "Completed")["teacherStream"]["uri"])
    # The same but for the temperature, on a node that nobody has: the address, and no stream.
    nowhere = {"spec": {"nodeSelector": {"kubedistill.dev/node": "none"}}}
    team.apply(student("waiting", 3, template=nowhere))
    team.wait_state("waiting", "Unschedulable", seconds=SLOW_SECONDS)
    uri = team.status("waiting")["resolved"]["streamUri"]
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = team.handle.s3.client()
    for key, body in written.items():
        client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=body)
    team.apply(student("foreign", 3))
    team.ends("foreign", "UnreadableInput")
    message = team.condition("foreign")["message"]
    assert "temperature" in message

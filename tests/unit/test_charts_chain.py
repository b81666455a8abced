"""The chart of a chain: what Helm renders from values, and which values it refuses."""

from __future__ import annotations

import json
import subprocess

import pytest
import yaml
from charts_kit import (
    FULL,
    MINIMAL,
    Chart,
    Object,
    chain_spec,
    job_spec,
    of_kind,
    only,
    stage_jobs,
)
from devcluster import tools
from kubedistill_api import names
from kubedistill_api.job import DistillationJobSpec
from kubedistill_operator.plan.compose import compose


def test_chain_chart_lints(chain: Chart) -> None:
    chain.lint(MINIMAL)
    chain.lint(FULL)


def test_what_is_not_set_is_not_rendered(chain: Chart) -> None:
    [found] = chain.objects(MINIMAL)
    assert found["metadata"]["name"] == "demo"
    assert found["metadata"]["namespace"] == "lab"
    assert found["spec"] == {
        "initialTeacher": MINIMAL["initialTeacher"],
        "template": {
            "data": MINIMAL["data"],
            "distill": {},
            "storage": MINIMAL["storage"],
        },
        "stages": MINIMAL["stages"],
    }
    [job] = stage_jobs(chain_spec([found]))
    assert job.training == DistillationJobSpec.model_fields["training"].default


def test_every_value_reaches_the_chain(chain: Chart) -> None:
    objects = chain.objects(FULL)
    found = only(objects, "DistillationChain")
    assert found["metadata"]["name"] == "support"
    assert found["metadata"]["labels"]["team"] == "research"
    assert found["metadata"]["annotations"] == {"note": "weekly"}
    template = found["spec"]["template"]
    for name in ("data", "training", "workers", "teacher", "distill", "checkpoint"):
        assert template[name] == FULL[name], name
    for name in ("backoffLimit", "activeDeadlineSeconds", "stallTimeoutSeconds"):
        assert template[name] == FULL[name], name
    assert template["storage"] == {
        "uri": "s3://runs/support/",
        "endpoint": "http://s3.example.com:9000",
        "region": "eu-central-1",
        "secretRef": {"name": "s3"},
    }
    assert found["spec"]["stages"] == FULL["stages"]
    assert found["spec"]["suspend"] is False
    medium, small = stage_jobs(chain_spec(objects))
    assert medium.backoff_limit == 0
    assert medium.workers.gpus_per_node == 8
    assert small.workers.gpus_per_node == 0
    assert small.training.learning_rate == 5e-4


def test_stages_of_both_methods(chain: Chart) -> None:
    """A fine-tuning stage gets no teacher and no objective from what the others share."""
    stages = [
        *MINIMAL["stages"],
        {
            "name": "polished",
            "fineTune": {},
            "data": {"sources": [{"uri": "s3://data/curated.jsonl"}]},
        },
        {
            "name": "small",
            "distill": {"objective": {"softWeight": 0.1}},
            "training": {"warmupRatio": 0},
            "student": {"fromTeacher": {"layers": 2}},
            "teacher": {"fromJob": {"name": "demo-polished"}},
        },
    ]
    values = MINIMAL | {
        "stages": stages,
        "distill": {"objective": {"temperature": 2, "softWeight": 0.7}},
        "teacher": {"delivery": "Stream"},
    }
    medium, polished, small = stage_jobs(chain_spec(chain.objects(values)))
    assert medium.distill is not None and medium.distill.objective.soft_weight == 0.7
    assert medium.teacher is not None and medium.teacher.delivery == "Stream"
    assert polished.fine_tune is not None and polished.teacher is None
    assert polished.student.from_job is not None
    assert polished.student.from_job.name == "demo-medium"
    assert small.distill is not None and small.teacher is not None
    assert small.distill.objective.temperature == 2
    assert small.distill.objective.soft_weight == 0.1
    assert small.training.warmup_ratio == 0, "a zero of a stage wins"
    assert small.teacher.from_job is not None and small.teacher.delivery == "Stream"


def test_stages_that_do_not_train(chain: Chart) -> None:
    stages = [
        *MINIMAL["stages"],
        {"name": "narrow", "prune": {"structured": {"ffn": 0.75}}},
        {"name": "sparse", "prune": {"unstructured": {"pattern": "2:4"}}},
        {"name": "int4", "quantize": {"algorithm": "RTN"},
         "gates": [{"metric": "perplexityRatio", "max": 1.1}]},
        {"name": "looked-at", "evaluate": {}},
    ]  # fmt: skip
    values = MINIMAL | {"stages": stages, "workers": {"nodes": 2, "gpusPerNode": 2}}
    _, narrow, sparse, int4, seen = stage_jobs(chain_spec(chain.objects(values)))
    assert [job.method for job in (narrow, sparse, int4, seen)] == [
        "prune", "prune", "quantize", "evaluate",
    ]  # fmt: skip
    for job in (narrow, sparse, int4, seen):
        assert job.distill is None and job.teacher is not None and job.student.from_job is not None
        assert job.teacher.from_job == job.student.from_job
    assert (int4.workers.nodes, int4.workers.gpus_per_node) == (1, 1)
    assert (narrow.workers.nodes, narrow.workers.gpus_per_node) == (2, 2)


SWEPT: Object = MINIMAL | {
    "stages": [MINIMAL["stages"][0] | {"sweep": {"temperature": [0.5, 2], "parallelism": 2}}]
}


def test_a_sweep_of_a_stage_reaches_the_chain(chain: Chart) -> None:
    spec = chain_spec(chain.objects(SWEPT))
    [stage] = spec.stages
    assert stage.sweep is not None
    assert (stage.sweep.temperature, stage.sweep.parallelism) == ([0.5, 2], 2)
    trial = job_spec(compose("demo", spec, 0, temperature=0.5))
    assert trial.teacher is not None and trial.teacher.temperatures == [0.5, 2]
    notes = chain.notes(SWEPT)
    for temperature in stage.sweep.temperature:
        job = names.trial_job_name("demo", stage.name, temperature)
        assert f"{names.models_uri('s3://runs/support', 'lab', job)}/" in notes
    assert "medium  (DistillationJobs demo-medium-t0-5, demo-medium-t2)" in notes
    assert "describe dj demo-medium-t0-5" in notes


def test_a_control_is_not_swept(chain: Chart) -> None:
    student = {"config": {"model_type": "llama"}}
    stage = SWEPT["stages"][0] | {"student": student}
    values = SWEPT | {"stages": [stage], "data": FULL["data"], "control": {"enabled": True}}
    job_spec(only(chain.objects(values), "DistillationJob")["spec"])


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({}, "missing property 'temperature'"),
        ({"temperature": [0]}, "exclusiveMinimum: got 0, want 0"),
        ({"temperature": []}, "minItems: got 0, want 1"),
        ({"temperature": [2], "select": {"goal": "Best"}}, "must be one of 'Minimize', 'Maximize'"),
        ({"learningRate": [1]}, "additional properties 'learningRate' not allowed"),
    ],
)
def test_bad_sweeps_are_refused(chain: Chart, sweep: Object, message: str) -> None:
    stage = MINIMAL["stages"][0] | {"sweep": sweep}
    assert message in chain.refusal(MINIMAL | {"stages": [stage]})


def test_control_trains_the_last_student_without_a_teacher(chain: Chart) -> None:
    objects = chain.objects(FULL)
    control = only(objects, "DistillationJob")
    assert control["metadata"]["name"] == "support-control"
    spec = job_spec(control["spec"])
    *_, last = stage_jobs(chain_spec(objects))
    assert spec.fine_tune is not None and spec.teacher is None
    for part in ("student", "data", "training", "workers", "storage", "checkpoint"):
        assert getattr(spec, part) == getattr(last, part), part
    assert not of_kind(chain.objects(MINIMAL), "DistillationJob")


def test_secret_is_made_only_when_asked_for(chain: Chart) -> None:
    assert not of_kind(chain.objects(FULL), "Secret")
    credentials = {"create": True, "accessKeyId": "key", "secretAccessKey": "0123"}
    storage = MINIMAL["storage"] | {"credentials": credentials}
    objects = chain.objects(MINIMAL | {"storage": storage})
    secret = only(objects, "Secret")
    assert secret["metadata"]["name"] == "demo-s3"
    assert secret["stringData"] == dict(zip(names.SECRET_KEYS, ("key", "0123"), strict=True))
    spec = chain_spec(objects)
    assert spec.template["storage"]["secretRef"] == {"name": "demo-s3"}
    assert "credentials" not in spec.template["storage"]
    named = MINIMAL | {"storage": storage | {"secretName": "mine"}}
    assert only(chain.objects(named), "Secret")["metadata"]["name"] == "mine"


def test_numbers_in_a_file_stay_numbers(chain: Chart) -> None:
    written = ["2.0e-5", "1e-5", "0.00001", "1E-05", "1"]
    stages = [
        f"- {{name: stage-{index}, student: {{fromTeacher: {{layers: 2}}}}, "
        f"training: {{learningRate: {number}}}}}"
        for index, number in enumerate(written)
    ]
    shared = {name: value for name, value in MINIMAL.items() if name != "stages"}
    values = yaml.safe_dump(shared) + "\n".join(["stages:", *stages])
    jobs = stage_jobs(chain_spec(chain.objects(values)))
    assert [job.training.learning_rate for job in jobs] == [float(number) for number in written]


def test_kubectl_reads_rendered_numbers_as_numbers(chain: Chart) -> None:
    rendered = chain.text(FULL | {"control": {"enabled": False}})
    result = subprocess.run(
        [str(tools.kubectl()), "annotate", "--local", "-f", "-", "read=yes", "-o", "json"],
        input=rendered, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    training = json.loads(result.stdout)["spec"]["template"]["training"]
    assert training["learningRate"] == 1e-7
    assert training["maxSteps"] == 1_000_000


def test_decimal_numbers_on_the_command_line(chain: Chart) -> None:
    """`--set` makes text of a decimal number, which is refused; `--set-json` keeps it."""
    for text in ("1e-5", "0.5"):
        refusal = chain.refusal(MINIMAL, "--set", f"training.learningRate={text}")
        assert f"at '/training/learningRate': '{text}' does not match pattern" in refusal
        assert "a number without quotes, such as 2.0e-5" in refusal
    objects = chain.objects(
        MINIMAL, "--set-json", "training.learningRate=1e-5", "--set", "training.epochs=2"
    )
    assert chain_spec(objects).template["training"] == {"learningRate": 1e-5, "epochs": 2}


STAGE: Object = MINIMAL["stages"][0]


def test_values_that_are_needed(chain: Chart) -> None:
    refusal = chain.refusal({})
    assert "missing property 'stages'" in refusal
    assert "at '/storage': missing property 'uri'" in refusal


def test_bad_values_of_a_chain_are_refused(chain: Chart) -> None:
    refusal = chain.refusal(
        {
            "storage": {"uri": "/somewhere"},
            "traning": {},
            "training": {"epoch": 1, "learningRate": 0},
            "distill": {"objective": {"softWeight": 1.5}},
            "teacher": {"model": {}},
            "workers": {"nodes": 0},
            "stages": [
                {"student": {}},
                STAGE | {"name": "Bad_Name"},
                STAGE | {"studnt": {}},
                STAGE | {"suspend": True},
            ],
        }
    )
    for message in (
        "at '/storage/uri': '/somewhere' does not match pattern",
        "additional properties 'traning' not allowed",
        "additional properties 'epoch' not allowed",
        "at '/training/learningRate': exclusiveMinimum: got 0, want 0",
        "at '/distill/objective/softWeight': maximum: got 1.5, want 1",
        "additional properties 'model' not allowed",
        "at '/workers/nodes': minimum: got 0, want 1",
        "at '/stages/0': missing property 'name'",
        "at '/stages/1/name': 'Bad_Name' does not match pattern",
        "additional properties 'studnt' not allowed",
        "additional properties 'suspend' not allowed",
    ):
        assert message in refusal
    assert "at '/stages': minItems: got 0, want 1" in chain.refusal(MINIMAL | {"stages": []})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initialTeacher": {}}, "stage medium has no teacher: set initialTeacher.model.uri"),
        ({"data": {}}, "stage medium has no data: set data.sources"),
        ({"stages": [{"name": "medium"}]}, "stage medium has no student: set student.model.uri"),
        ({"stages": [{"name": "medium", "fineTune": {}}]}, "stage medium has no student"),
        (
            {"stages": [STAGE, {"name": "polished", "fineTune": {}}], "control": {"enabled": True}},
            "the last stage polished has no student of its own",
        ),
        (
            {"stages": [STAGE | {"fineTune": {}, "distill": {}}]},
            "stage medium has 2 methods: keep one of distill, fineTune",
        ),
        ({"control": {"enabled": True}}, "student of the last stage medium is fromTeacher"),
        (
            {"storage": MINIMAL["storage"] | {"credentials": {"create": True}}},
            "storage.credentials.create needs",
        ),
    ],
)
def test_incomplete_chains_are_refused(chain: Chart, change: Object, message: str) -> None:
    assert message in chain.refusal(MINIMAL | change)


def test_chain_notes_say_where_the_models_will_lie(chain: Chart) -> None:
    notes = chain.notes(FULL)
    assert "kubectl -n lab get distill" in notes
    assert "kubectl -n lab describe dchain support" in notes
    for stage in ("medium", "small"):
        job = names.stage_job_name("support", stage)
        assert f"{names.models_uri('s3://runs/support', 'lab', job)}/" in notes
    assert "support-control" in notes

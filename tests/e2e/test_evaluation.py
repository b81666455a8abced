"""Student and teacher are asked the same: real ranks under ZeRO-3, a real teacher's pod and store."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from devcluster.s3 import S3Server
from devcluster.zygote import Zygote
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import ResolvedModel
from operator_kit import wait_for

from e2e.gang import Trainer, llama, model_of, put_inputs, stored

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]
ASKED = {"tasks": ["chain_sum", "gcd"], "examples": 3, "maxAnswerTokens": 6, "latency": True}


@dataclass(frozen=True)
class Bench:
    folder: Path
    trainer: Trainer
    server: S3Server
    teacher: ResolvedModel

    def spec(self, **parts: Any) -> DistillationJobSpec:
        own: dict[str, Any] = {
            "distill": {},
            "teacher": {"model": {"uri": self.teacher.uri}, "workers": {"gpusPerReplica": 0}},
            "student": {"fromTeacher": {"layers": 1}},
            "training": {"maxSteps": 2},
            "evaluation": ASKED,
        }
        return self.trainer.spec(**(own | parts))

    def object(self, uri: str, name: str) -> bytes:
        return stored(self.server.access, uri, name)

    def evaluations(self) -> dict[str, Any]:
        """What lies below `evaluations/`, with the time of its writing."""
        access = self.server.access
        found = access.client().list_objects_v2(Bucket=access.bucket, Prefix="runs/evaluations/")
        return {item["Key"]: item["LastModified"] for item in found.get("Contents", [])}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, warm: Zygote) -> Iterator[Bench]:
    folder: Path = tmp_path_factory.mktemp("evaluation")
    server = S3Server(folder / "s3")
    server.start()
    try:
        put_inputs(server.access)
        trainer = Trainer(folder, server.access, warm)
        made = trainer.run(
            "student",
            trainer.spec(
                fineTune={}, student={"config": llama(32, 2)}, workers={"nodes": 1},
                training={"maxSteps": 2}, evaluation=ASKED,
            ),
            name="teacher",
        )  # fmt: skip
        assert made.codes == [0], made.log
        yield Bench(folder, trainer, server, model_of(made, "teacher"))
    finally:
        server.stop()


def test_a_teachers_pod_measures_once_and_a_student_under_zero_3_reads_it(bench: Bench) -> None:
    spec = bench.spec(training={"maxSteps": 2, "deepSpeed": {"zeroStage": 3}})
    written = bench.trainer.run("teacher", spec, name="streamed", teacher=bench.teacher)
    assert written.codes == [0], written.log
    first = bench.evaluations()
    assert [key.rsplit(".")[-1] for key in sorted(first)] == ["json"]
    again = bench.trainer.run("teacher", spec, name="again", teacher=bench.teacher)
    assert again.codes == [0], again.log
    assert bench.evaluations() == first

    result = bench.trainer.run("student", spec, name="streamed", teacher=bench.teacher)
    assert result.codes == [0, 0], result.log
    outcome = result.outcomes[0]
    metrics = {metric.name: metric.value for metric in outcome.metrics}
    assert {"simpleAccuracy", "multiStepAccuracy", "hallucinationRate"} <= set(metrics)
    assert {"teacherSimpleAccuracy", "teacherHallucinationRate"} <= set(metrics)
    assert outcome.model is not None
    report = json.loads(bench.object(outcome.model.uri, "report.json"))
    assert report["notMeasured"] == {}
    assert [task["task"] for task in report["tasks"]["byTask"]] == ASKED["tasks"]
    assert all(task["teacherAccuracy"] is not None for task in report["tasks"]["byTask"])
    assert report["questions"]["asked"] == 3 and report["questions"]["teacher"] is not None
    student, teacher = report["performance"]["student"], report["performance"]["teacher"]
    assert student["weightsBytes"] < teacher["weightsBytes"]
    assert report["performance"]["ratios"]["batches"][0]["tokensPerSecond"] > 0
    weights = bench.object(outcome.model.uri, "model.safetensors")
    assert report["sizeOnDisk"]["student"] == len(weights)
    taught = bench.object(bench.teacher.uri, "model.safetensors")
    assert report["sizeOnDisk"]["teacher"] == len(taught)


def test_a_teacher_in_the_students_pods_is_asked_there(bench: Bench) -> None:
    spec = bench.spec(
        teacher={"model": {"uri": bench.teacher.uri}, "delivery": "Online"},
        workers={"nodes": 1},
        evaluation={**ASKED, "latency": False, "examples": 2},
    )
    before = bench.evaluations()
    result = bench.trainer.run("student", spec, name="online", teacher=bench.teacher)
    assert result.codes == [0], result.log
    metrics = {metric.name for metric in result.outcomes[0].metrics}
    assert {"simpleAccuracy", "teacherSimpleAccuracy", "teacherQuestionAccuracy"} <= metrics
    model = result.outcomes[0].model
    assert model is not None
    report = json.loads(bench.object(model.uri, "report.json"))
    assert (report["performance"], report["notMeasured"]) == (None, {})
    assert bench.evaluations() == before


def test_where_a_stream_was_there_and_nobody_asked_its_teacher_the_report_says_so(
    bench: Bench,
) -> None:
    spec = bench.spec(workers={"nodes": 1}, evaluation={**ASKED, "examples": 1})
    bench.trainer.run("teacher", bench.spec(), name="elder", teacher=bench.teacher)
    result = bench.trainer.run("student", spec, name="younger", teacher=bench.teacher)
    assert result.codes == [0], result.log
    model = result.outcomes[0].model
    assert model is not None
    report = json.loads(bench.object(model.uri, "report.json"))
    assert "no figures of it are in the store" in report["notMeasured"]["teacher"]
    assert report["tasks"]["byTask"][0]["teacherAccuracy"] is None
    assert "teacherSimpleAccuracy" not in report["metrics"]


def test_a_student_that_is_to_stop_while_it_is_asked_is_asked_again(bench: Bench) -> None:
    spec = bench.spec(
        fineTune={}, distill=None, teacher=None, student={"config": llama(32, 2)},
        workers={"nodes": 1}, evaluation={**ASKED, "examples": 60},
    )  # fmt: skip

    def strike(pids: list[int]) -> None:
        log = bench.folder / "stopped-student-1-0" / "log"
        wait_for(lambda: b"asking the student" in log.read_bytes(), "nobody asks", 600)
        os.kill(pids[0], signal.SIGTERM)

    stopped = bench.trainer.run("student", spec, name="stopped", strike=strike)
    assert stopped.codes == [int(ExitCode.GRACEFUL_CHECKPOINT)], stopped.log
    assert stopped.outcomes[0].message == "asked to stop while the student was evaluated"
    assert stopped.outcomes[0].model is None
    result = bench.trainer.run("student", spec, name="stopped", attempt=2)
    assert result.codes == [0], result.log
    assert result.outcomes[0].progress is not None
    assert result.outcomes[0].progress.resumed_from_step == 2
    assert "simpleAccuracy" in {metric.name for metric in result.outcomes[0].metrics}


def test_unknown_tasks_and_missing_questions_are_refused_before_anything_is_trained(
    bench: Bench,
) -> None:
    bucket = bench.server.access.bucket
    missing = {"uri": f"s3://{bucket}/data/none.jsonl"}
    cases: list[tuple[dict[str, Any], ExitCode, str]] = [
        ({"tasks": ["chain_sums"]}, ExitCode.BAD_CONFIGURATION, "such as chain_sum"),
        ({"questions": missing}, ExitCode.UNREADABLE_INPUT, "spec.evaluation.questions.uri"),
        ({"lmEval": ["arc_eazy"]}, ExitCode.BAD_CONFIGURATION, "such as arc_easy"),
    ]
    for number, (evaluation, code, words) in enumerate(cases):
        spec = bench.spec(evaluation=evaluation)
        result = bench.trainer.run("preflight", spec, name=f"bad-{number}", teacher=bench.teacher)
        assert result.codes == [int(code)], result.log
        assert words in result.outcomes[0].message

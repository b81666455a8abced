"""Every file of examples/ is applied as it is and reaches its end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from endpoint_kit import Server, serving
from operator_kit import wait_for

from e2e.endpoint import small_mind
from e2e.kit import SLOW_SECONDS, Team

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2 * SLOW_SECONDS)]
EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The endpoint that an example's teacher is behind."""
    with serving(small_mind()) as running:
        yield running


@pytest.fixture(scope="module")
def applied(team: Team, server: Server) -> dict[str, list[dict[str, Any]]]:
    """All examples at once, once the teachers that they name are in their places."""
    tiny = team.tuned("tiny", training={"maxSteps": 4}, workers={"nodes": 1})
    team.apply(tiny, team.conversing("tiny-chat"))
    client, bucket = team.handle.s3.client(), team.handle.s3.bucket
    for teacher in ("tiny", "tiny-chat"):
        model = team.objects(team.ends(teacher, "Completed")["model"]["uri"])
        for name, body in model.items():
            client.put_object(Bucket=bucket, Key=f"models/{teacher}/{name}", Body=body)
    team.kubectl("create", "secret", "generic", "vllm", "--from-literal=API_KEY=sk-1")
    documents = {path.name: team.example(path, server.url) for path in EXAMPLES}
    # Backwards, so that students are there before their teachers.
    team.apply(*[one for several in documents.values() for one in reversed(several)])
    return documents


@pytest.mark.parametrize("name", [path.name for path in EXAMPLES])
def test_it_reaches_its_end(
    team: Team, applied: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for document in applied[name]:
        resource = {"DistillationJob": "dj", "DistillationChain": "dchain"}[document["kind"]]
        team.ends(document["metadata"]["name"], "Completed", resource=resource)


def test_a_finished_chain_names_its_students(
    team: Team, applied: dict[str, list[dict[str, Any]]]
) -> None:
    status = team.ends("small-chain", "Completed", resource="dchain")
    assert [stage["state"] for stage in status["stages"]] == ["Completed"] * 3
    table = team.kubectl("get", "distill")
    assert "small-chain" in table
    assert "Completed" in table


def test_each_stage_of_the_smaller_chain_did_its_part(
    team: Team, applied: dict[str, list[dict[str, Any]]]
) -> None:
    team.ends("smaller", "Completed", resource="dchain")
    reports = {}
    for stage in ("cut", "sparse", "recovered", "int8"):
        files = team.objects(team.ends(f"smaller-{stage}", "Completed")["model"]["uri"])
        reports[stage] = json.loads(files["report.json"])
    cut = reports["cut"]["pruning"]
    # Half of 96 channels, at a multiple of the 32 that divide them and 128.
    assert (cut["after"]["ffn"], cut["after"]["heads"]) == (64, 1)
    assert reports["sparse"]["sparsity"]["share"] == pytest.approx(0.5, abs=0.01)
    assert reports["recovered"]["sparsity"] == reports["sparse"]["sparsity"]
    assert reports["int8"]["teacher"]["job"] == "smaller-recovered"
    assert reports["int8"]["metrics"]["perplexityRatio"] == pytest.approx(1, abs=0.1)


def test_two_writers_shared_a_sparse_stream(
    team: Team, applied: dict[str, list[dict[str, Any]]]
) -> None:
    stream = team.ends("sparse-stream", "Completed")["teacherStream"]
    assert (stream["payload"], stream["complete"]) == ("Sparse", True)
    written = team.objects(stream["uri"])
    assert stream["bytes"] == sum(len(body) for key, body in written.items() if "/shards/" in key)
    shards = {key.split("/")[1] for key in written if "/shards/" in key}
    assert shards == {"0", "1"}


def test_early_stopping_exports_the_best_look(
    team: Team, applied: dict[str, list[dict[str, Any]]]
) -> None:
    status = team.ends("early-stopping", "Completed")
    found = json.loads(team.objects(status["model"]["uri"])["report.json"])["earlyStopping"]
    best = min(found["looks"], key=lambda look: look["loss"])
    # Within minDelta of the least, and what was exported is what was measured there.
    taken = next(look for look in found["looks"] if look["step"] == found["bestStep"])
    assert taken["loss"] <= best["loss"] + 0.5
    [perplexity] = [m["value"] for m in status["metrics"] if m["name"] == "perplexity"]
    assert perplexity == pytest.approx(taken["perplexity"], rel=1e-4)
    assert status["progress"]["percentage"] == 100


def test_gates_are_held_against_the_figures_and_may_change(
    team: Team, applied: dict[str, list[dict[str, Any]]]
) -> None:
    first = team.ends("gates", "Completed")
    passed = team.condition("gates", "GatesPassed")
    assert (passed["status"], passed["reason"]) == ("True", "GatesMet")
    assert all(word in passed["message"] for word in ("perplexityRatio", "≤ 1.5", "≥ 0.1"))
    report = json.loads(team.objects(first["model"]["uri"])["report.json"])
    assert [gate["passed"] for gate in report["gates"]] == [True, True]

    def give(gates: list[dict[str, Any]], state: str) -> dict[str, Any]:
        patch = json.dumps({"spec": {"gates": gates}})
        team.kubectl("patch", "dj", "gates", "--type=merge", "-p", patch)
        return team.wait_state("gates", state)

    tight = give([{"metric": "perplexityRatio", "max": 0.5}], "GateFailed")
    [ratio] = [m["value"] for m in first["metrics"] if m["name"] == "perplexityRatio"]
    assert team.condition("gates")["message"].startswith(f"perplexityRatio {ratio:.4g} > 0.5")
    loose = give([{"metric": "perplexityRatio", "max": 5}], "Completed")
    for status in (tight, loose):
        assert status["model"] == first["model"]
        assert status["attempts"] == first["attempts"]


def test_auto_says_what_it_measured_and_took(
    team: Team, applied: dict[str, list[dict[str, Any]]]
) -> None:
    stream = team.ends("auto-payload", "Completed")["teacherStream"]
    rows = {row["payload"]: row for row in stream["probe"]}
    assert {"Hidden, int8", "Hidden, bfloat16", "Sparse, K=100"} <= set(rows)
    fitting = [row for row in stream["probe"] if row["gradientError"] <= 0.05]
    smallest = min(fitting, key=lambda row: row["bytesPerToken"])
    assert smallest["payload"].startswith(stream["payload"])


def test_responses_are_learnt_by_weight_and_the_template_is_exported(
    team: Team, applied: dict[str, list[dict[str, Any]]]
) -> None:
    model = team.objects(team.ends("conversations", "Completed")["model"]["uri"])
    [wanted] = applied["11-conversations.yaml"]
    assert model["chat_template.jinja"].decode() == wanted["spec"]["data"]["chatTemplate"]
    data = json.loads(model["report.json"])["data"]
    assert [file["weight"] for file in data["files"]] == [2, 0.5]
    assert data["conversations"]["whole"] > 0


@pytest.mark.parametrize("name", ["responses", "chain-of-thought"])
def test_a_student_of_text_starts_when_all_of_it_is_there(
    team: Team, applied: dict[str, list[dict[str, Any]]], name: str
) -> None:
    status = team.ends(name, "Completed")
    written = team.get("job", f"{name}-teacher")["status"]["completionTime"]
    assert status["attempts"][0]["startTime"] >= written
    stream = status["teacherStream"]
    answers = team.answers(stream["uri"])
    assert (stream["payload"], stream["complete"], stream["answers"]) == (
        "Text",
        True,
        len(answers),
    )
    assert stream["answerTokens"] == sum(answer["answer_tokens"] for answer in answers.values())
    assert stream["learnt"] in team.condition(name)["message"]
    model = team.objects(status["model"]["uri"])
    client, bucket = team.handle.s3.client(), team.handle.s3.bucket
    own = client.get_object(Bucket=bucket, Key="tokenizer/tokenizer.json")["Body"].read()
    assert model["tokenizer.json"] == own
    report = json.loads(model["report.json"])
    text = report["teacherText"]
    assert text["kept"] + sum(text["dropped"].values()) == text["asked"] == len(answers)
    assert "Teacher text" in model["report.html"].decode()
    assert {"simpleAccuracy", "teacherSimpleAccuracy"} <= set(report["metrics"])
    assert "another tokenizer" in report["notMeasured"].pop("teacher.distribution")
    assert report["notMeasured"] == {}
    assert report["data"]["files"][0]["origin"] == "Teacher"
    assert all(file["tokens"] > 0 for file in report["data"]["files"])


def test_reasoning_is_learnt_where_samples_agree_on_the_right_answer(
    team: Team, applied: dict[str, list[dict[str, Any]]]
) -> None:
    """Counted here once more, from what the teacher said: its form is known and simple."""
    status = team.ends("chain-of-thought", "Completed")
    answers = team.answers(status["teacherStream"]["uri"])
    results: dict[int, list[str]] = {}
    for (prompt, _), answer in answers.items():
        found = re.fullmatch(r"<think>\n.+\n</think>\n\n(\d+)", answer["text"])
        results.setdefault(prompt, []).append(found[1] if found and answer["finished"] else "")
    # The prompt's place in the file says which sum it is.
    right = {prompt: said.count(str(prompt // 8 + prompt % 8)) for prompt, said in results.items()}
    kept = json.loads(team.objects(status["model"]["uri"])["report.json"])["teacherText"]["kept"]
    agreed = sum(count for count in right.values() if count >= 2)
    assert 0 < kept < len(answers)
    # A reasoning of another form may pass, too; one of this form must, when it is right and agreed on.
    assert kept >= agreed


def test_student_and_teacher_are_asked_the_same(
    team: Team, applied: dict[str, list[dict[str, Any]]]
) -> None:
    status = team.ends("evaluation", "Completed")
    metrics = {metric["name"]: metric["value"] for metric in status["metrics"]}
    asked = ("simpleAccuracy", "multiStepAccuracy", "questionAccuracy", "hallucinationRate")
    taught = tuple(f"teacher{name[0].upper()}{name[1:]}" for name in asked)
    assert all(0 <= metrics[name] <= 1 for name in (*asked, *taught))
    model = team.objects(status["model"]["uri"])
    report = json.loads(model["report.json"])
    assert report["notMeasured"] == {}
    [wanted] = applied["16-evaluation.yaml"]
    settings = wanted["spec"]["evaluation"]
    assert [task["task"] for task in report["tasks"]["byTask"]] == settings["tasks"]
    assert report["questions"]["source"] == settings["questions"]["uri"]
    assert report["questions"]["asked"] == settings["examples"]
    student, teacher = report["performance"]["student"], report["performance"]["teacher"]
    assert student["memoryBytes"] > 0 and teacher["memoryBytes"] > 0
    assert report["sizeOnDisk"]["student"] == len(model["model.safetensors"])
    assert report["sizeOnDisk"]["ratio"] < 1
    assert "8 examples of `gcd`" in model["MODEL_CARD.md"].decode()


def test_a_sweep_has_one_teacher_and_its_best_student_goes_on(
    team: Team, applied: dict[str, list[dict[str, Any]]]
) -> None:
    stages = team.ends("temperature-sweep", "Completed", resource="dchain")["stages"]
    swept, small = stages
    trials = {trial["jobName"]: trial for trial in swept["trials"]}
    assert list(trials) == ["temperature-sweep-swept-t1-5", "temperature-sweep-swept-t4"]
    best = min(trials.values(), key=lambda trial: trial["perplexity"])
    assert [name for name, trial in trials.items() if trial["chosen"]] == [best["jobName"]]
    assert (swept["jobName"], swept["model"]) == (best["jobName"], best["model"])
    assert swept["choice"] in team.condition("temperature-sweep", resource="dchain")["message"]

    found = {name: team.status(name) for name in trials}
    assert len({status["teacherStream"]["digest"] for status in found.values()}) == 1
    assert [status["resolved"]["streamComplete"] for status in found.values()] == [False, True]
    writers = team.get("jobs", "-l", "kubedistill.dev/role=teacher")["items"]
    names = {job["metadata"]["name"] for job in writers}
    assert names & {f"{trial}-teacher" for trial in trials} == {f"{next(iter(trials))}-teacher"}

    taught = team.get("dj", small["jobName"])["spec"]["teacher"]
    assert taught["fromJob"] == {"name": best["jobName"]}


def test_the_reports_of_a_sweep_have_its_table(
    team: Team, applied: dict[str, list[dict[str, Any]]]
) -> None:
    def written() -> Any:
        stage = team.status("temperature-sweep", "dchain")["stages"][0]
        return stage if stage["report"] == "Written" else None

    team.ends("temperature-sweep", "Completed", resource="dchain")
    stage = wait_for(written, "the reports are not written", SLOW_SECONDS)
    for trial in stage["trials"]:
        files = team.objects(trial["model"])
        assert json.loads(files["report.json"])["sweep"]["trials"] == stage["trials"]
        assert stage["choice"] in files["report.html"].decode()

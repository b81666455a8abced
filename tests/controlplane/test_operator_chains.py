"""Chains and sweeps on a real API server; a stand-in trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from operator_kit import Bench, Operator, chain, template, wait_for

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(600)]


def test_a_chain_runs_its_stages_in_order(bench: Bench, operator: Operator, book: Path) -> None:
    stages = ({"name": "m"}, {"name": "s"}, {"name": "tuned", "fineTune": {}})
    bench.apply(chain("steps", template(book), *stages))
    status = bench.wait_state("steps", "Completed", seconds=300, resource="dchain")
    assert [s["state"] for s in status["stages"]] == ["Completed"] * 3
    assert status["progress"] == 100
    assert bench.get("dj", "steps-s")["spec"]["teacher"]["fromJob"] == {"name": "steps-m"}
    tuned = bench.get("dj", "steps-tuned")["spec"]
    assert "teacher" not in tuned
    assert tuned["student"] == {"fromJob": {"name": "steps-s"}}


def test_a_sweep_outlives_its_operator_and_a_deleted_trial(
    bench: Bench, operator: Operator, book: Path
) -> None:
    swept = {"name": "m", "sweep": {"temperature": [4, 2], "parallelism": 2}}
    bench.apply(chain("sweeps", template(book), swept, {"name": "s"}))

    def state() -> Any:
        stages = bench.status("sweeps", "dchain").get("stages")
        return stages and stages[0]["trials"][0]["state"]

    wait_for(lambda: state() == "Training", "the first trial does not train")
    uid = bench.get("dj", "sweeps-m-t4")["metadata"]["uid"]
    operator.kill()
    bench.kubectl("delete", "dj", "sweeps-m-t4")
    operator.restart()
    status = bench.wait_state("sweeps", "Completed", seconds=300, resource="dchain")
    assert bench.get("dj", "sweeps-m-t4")["metadata"]["uid"] != uid
    stage = status["stages"][0]
    table = [(t["temperature"], t["state"], t["perplexity"], t["chosen"]) for t in stage["trials"]]
    assert table == [(4, "Completed", 12.5, False), (2, "Completed", 12.5, True)]
    assert "of equals the lower temperature is taken" in stage["choice"]
    assert bench.get("dj", "sweeps-s")["spec"]["teacher"]["fromJob"] == {"name": "sweeps-m-t2"}
    wait_for(
        lambda: bench.status("sweeps", "dchain")["stages"][0]["report"] == "Written",
        "the chain does not see that the reports are written",
    )


def test_a_sweep_that_cannot_be_tried_is_refused(bench: Bench, operator: Operator) -> None:
    twice = {"name": "m", "sweep": {"temperature": [2, 4, 2]}}
    assert "a temperature is listed twice" in bench.apply(chain("twice", {}, twice), check=False)
    unknown = {"name": "m", "sweep": {"temperature": [2], "select": {"metric": "perplexty"}}}
    bench.apply(chain("unknown", {}, unknown))
    bench.wait_state("unknown", "InvalidSpec", resource="dchain")
    message = bench.condition("unknown", "Validated", "dchain")["message"]
    assert "sweep.select.metric: found perplexty (no such metric); write perplexity, or" in message


def test_a_chain_made_again_waits_for_the_jobs_of_the_one_before(
    bench: Bench, operator: Operator, book: Path
) -> None:
    whole = chain("again", template(book), {"name": "m"})
    bench.apply(whole)
    bench.wait_state("again", "Completed", seconds=300, resource="dchain")

    def hold(*finalizers: str) -> None:
        patch = json.dumps({"metadata": {"finalizers": finalizers}})
        bench.kubectl("patch", "dj", "again-m", "--type=merge", "-p", patch)

    hold("kubedistill.dev/test")
    bench.kubectl("delete", "dchain", "again")
    bench.apply(whole)
    bench.wait_state("again", "WaitingForDependency", resource="dchain")
    hold()
    bench.wait_state("again", "Completed", seconds=300, resource="dchain")
    bench.kubectl("delete", "dchain", "again")
    wait_for(lambda: not bench.get("dj")["items"], "a stage's job is left")


def test_a_chain_stops_at_a_failed_stage(bench: Bench, operator: Operator, book: Path) -> None:
    bench.apply(chain("stops", template(book, "bad-data"), {"name": "m"}, {"name": "s"}))
    bench.wait_state("stops", "StageFailed", seconds=150, resource="dchain")
    assert "stage m failed" in bench.condition("stops", resource="dchain")["message"]
    assert len(bench.get("dj")["items"]) == 1


def test_a_chain_waits_at_a_gate_until_it_is_loosened(
    bench: Bench, operator: Operator, book: Path
) -> None:
    """The stand-in has a perplexity of 12.5, and nothing is trained a second time."""

    def stages(bound: float) -> tuple[dict[str, Any], ...]:
        return {"name": "m", "gates": [{"metric": "perplexity", "max": bound}]}, {"name": "s"}

    bench.apply(chain("gated", template(book), *stages(10)))
    status = bench.wait_state("gated", "StageFailed", seconds=150, resource="dchain")
    told = "stage m failed (GateFailed): perplexity 12.5 > 10"
    assert bench.condition("gated", resource="dchain")["message"] == told
    assert (status["stages"][0]["state"], status["stages"][0]["model"]) == (
        "GateFailed",
        "s3://runs/m",
    )
    assert [j["metadata"]["name"] for j in bench.get("dj")["items"]] == ["gated-m"]
    attempts = bench.status("gated-m")["attempts"]
    bench.apply(chain("gated", template(book), *stages(15)))
    bench.wait_state("gated", "Completed", seconds=150, resource="dchain")
    assert bench.condition("gated-m", "GatesPassed")["message"] == "perplexity 12.5 ≤ 15"
    assert bench.status("gated-m")["attempts"] == attempts
    assert bench.get("dj", "gated-s")["spec"]["teacher"]["fromJob"] == {"name": "gated-m"}


def test_a_chain_goes_on_with_a_stage_whose_limit_is_raised(
    bench: Bench, operator: Operator, book: Path
) -> None:
    """The job is the same one: what it has learnt is not lost."""

    def stages(seconds: int) -> tuple[dict[str, Any], ...]:
        return {"name": "m", "activeDeadlineSeconds": seconds}, {"name": "s"}

    bench.apply(chain("late", template(book), *stages(1)))
    bench.wait_state("late", "StageFailed", seconds=150, resource="dchain")
    told = bench.condition("late", resource="dchain")["message"]
    assert told.startswith("stage m failed (DeadlineExceeded): not finished 1 s after its start")
    uid = bench.get("dj", "late-m")["metadata"]["uid"]
    bench.apply(chain("late", template(book), *stages(900)))
    bench.wait_state("late", "Completed", seconds=150, resource="dchain")
    assert bench.get("dj", "late-m")["metadata"]["uid"] == uid
    assert bench.condition("late", "Validated", "dchain")["message"] == ""

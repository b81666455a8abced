"""Somebody's hands on the operator's children, on a real API server; a stand-in trains.

However it is touched, a job ends as one that nobody touched: one student, and nothing left over.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubedistill_api.names import RUN_SPEC_DIGEST
from operator_kit import ONLINE, Bench, Operator, distilling, template, wait_for

from controlplane.conftest import Beside

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(600)]

STUDENT = ("-l", "kubedistill.dev/role=student")
PRESENT = ("Pending", "Running")
TEACHER = ("-l", "kubedistill.dev/role=teacher")
CASCADES = ("foreground", "background", "orphan")


def gang(name: str, book: Path, nodes: int = 2, **env: str) -> dict[str, Any]:
    """A job whose teacher has no pods; it trains for a dozen seconds."""
    pods = template(book, **{"STEPS": "50", **env})
    workers = {"nodes": nodes, "gpusPerNode": 0, "template": pods}
    return distilling(name, pods, teacher=ONLINE, workers=workers)


def training(bench: Bench, name: str) -> None:
    """Wait until a commit is there."""
    wait_for(lambda: bench.status(name).get("checkpoint"), f"{name} commits nothing")


def calm(bench: Bench, name: str) -> dict[str, Any]:
    """The job's status, once it has ended well and left nothing but what it always leaves."""
    status = bench.wait_state(name, "Completed", seconds=150)
    assert status["model"] == {"uri": "s3://runs/m", "digest": "d" * 8, "parameters": 1000}

    def orphans() -> list[str]:
        items = bench.get("pods,jobs,services,configmaps")["items"]
        found = [i["metadata"] for i in items if i["metadata"]["name"] != "kube-root-ca.crt"]
        return [m["name"] for m in found if not m.get("ownerReferences")]

    wait_for(lambda: not orphans(), "an orphan is left")

    def active() -> list[str]:
        pods = bench.get("pods")["items"]
        return [p["metadata"]["name"] for p in pods if p["status"]["phase"] in PRESENT]

    wait_for(lambda: not active(), "a pod is left")
    ends = [(a["startTime"], a["endTime"]) for a in status["attempts"]]
    for (_, end), (start, _) in itertools.pairwise(ends):
        assert end <= start, "two attempts at a time"
    return status


def patch(bench: Bench, kind: str, name: str, body: dict[str, Any]) -> None:
    bench.kubectl("patch", kind, name, "--type=merge", "-p", json.dumps(body))


@pytest.fixture
def slow_starts(bench: Bench) -> Iterator[Callable[[], None]]:
    """Pods start late, until it is called."""
    bench.handle.faults.delay_starts(6)
    yield lambda: bench.handle.faults.delay_starts(0)
    bench.handle.faults.delay_starts(0)


def test_the_inputs_of_pods_that_have_not_started_come_back(
    bench: Bench, operator: Operator, book: Path, slow_starts: Callable[[], None]
) -> None:
    """The preflight's and the attempt's ConfigMap, and the Service, each deleted before use."""
    bench.apply(gang("early", book))

    def preflight() -> list[Any]:
        items = bench.get("configmaps", "-l", "kubedistill.dev/role=preflight")["items"]
        return list(items)

    [inputs] = wait_for(preflight, "no preflight")
    bench.kubectl("delete", "configmap", inputs["metadata"]["name"])
    exists = ("jobs", *STUDENT)
    wait_for(lambda: bench.get(*exists)["items"], "no attempt", 90)
    bench.kubectl("delete", "configmap/early-a1", "service/early")
    slow_starts()
    assert len(calm(bench, "early")["attempts"]) == 1
    assert bench.get("service", "early")["spec"]["selector"]["kubedistill.dev/job"] == "early"


def test_the_inputs_of_a_teacher_come_back(
    bench: Bench, operator: Operator, book: Path, slow_starts: Callable[[], None]
) -> None:
    bench.apply(distilling("taught", template(book)))
    wait_for(lambda: bench.get("jobs", *TEACHER)["items"], "no teacher", 90)
    bench.kubectl("delete", "configmap", "taught-teacher")
    slow_starts()
    calm(bench, "taught")


def test_what_is_deleted_after_its_use_is_not_missed(
    bench: Bench, operator: Operator, book: Path
) -> None:
    """The accepted inputs are in the status, so a second attempt needs no ConfigMap of the first."""
    bench.apply(gang("late", book))
    training(bench, "late")
    bench.kubectl("delete", "configmap", "--all")
    bench.kubectl("delete", "service", "late")
    bench.kubectl("delete", "job", "late-a1", "--wait=false")
    status = calm(bench, "late")
    assert [a["reason"] for a in status["attempts"]][1:] == ["Completed"]
    assert bench.get("service", "late")["spec"]["clusterIP"] == "None"


def test_a_changed_service_is_mended_for_the_next_attempt(
    bench: Bench, operator: Operator, book: Path
) -> None:
    bench.apply(gang("names", book))
    training(bench, "names")
    patch(bench, "service", "names", {"spec": {"selector": {"kubedistill.dev/job": "x", "a": "b"}}})
    refused = bench.kubectl(
        "patch", "configmap", "names-a1", "--type=merge", "-p", '{"data": {"run.json": "{}"}}',
        check=False,
    )  # fmt: skip
    assert "immutable" in refused
    bench.kubectl("delete", "job", "names-a1", "--wait=false")
    calm(bench, "names")
    assert bench.get("service", "names")["spec"]["selector"] == {
        "kubedistill.dev/job": "names",
        "kubedistill.dev/role": "student",
    }


def forge(bench: Bench, name: str) -> None:
    """Another run spec in place of the one that the pods are made for, with the same owner."""
    real = bench.get("configmap", name)
    metadata = {key: real["metadata"][key] for key in ("name", "labels", "ownerReferences")}
    text = real["data"]["run.json"].replace('"nodes": 2', '"nodes": 1')
    assert text != real["data"]["run.json"]
    bench.kubectl("delete", "configmap", name)
    bench.apply({**real, "metadata": metadata, "data": {"run.json": text}})
    wait_for(lambda: bench.get("configmap", name)["data"] == real["data"], "it stays forged", 60)
    [container] = bench.get("job", name)["spec"]["template"]["spec"]["containers"]
    pin = {e["name"]: e.get("value") for e in container["env"]}[RUN_SPEC_DIGEST]
    assert pin == hashlib.sha256(real["data"]["run.json"].encode()).hexdigest()


def outdate(bench: Bench, name: str) -> None:
    """Gone, and not to be made again as it was: the spec says something else since."""
    patch(bench, "dj", name.removesuffix("-a1"), {"spec": {"backoffLimit": 5}})
    bench.kubectl("delete", "configmap", name)


def test_pods_that_have_not_started_train_by_the_run_spec_that_they_are_made_for(
    bench: Bench,
    beside: Beside,
    operator: Operator,
    book: Path,
    slow_starts: Callable[[], None],
) -> None:
    """Or not at all: then another attempt follows, which is not counted."""

    def case(bench: Bench, given: tuple[Callable[[Bench, str], None], list[str]]) -> None:
        change, ends = given
        bench.apply(gang("forged", book, PREFLIGHT_SECONDS="5"))

        def checked() -> bool:
            return any(p["status"]["phase"] == "Running" for p in bench.get("pods")["items"])

        wait_for(checked, "no preflight", 90)
        bench.handle.faults.delay_starts(25)
        wait_for(lambda: bench.get("jobs", *STUDENT)["items"], "no attempt", 90)
        change(bench, "forged-a1")
        status = calm(bench, "forged")
        assert [a["reason"] for a in status["attempts"]] == ends
        assert not status["attempts"][0]["charged"]

    beside(case, [(forge, ["Completed"]), (outdate, ["Interrupted", "Completed"])])


def take_service(bench: Bench) -> Callable[[], bool]:
    bench.kubectl("delete", "service", "kept")
    return lambda: "kept" in [s["metadata"]["name"] for s in bench.get("services")["items"]]


def take_selector(bench: Bench) -> Callable[[], bool]:
    patch(bench, "service", "kept", {"spec": {"selector": {"kubedistill.dev/job": "x"}}})
    return lambda: bench.get("service", "kept")["spec"]["selector"]["kubedistill.dev/job"] == "kept"


def take_owner(bench: Bench) -> Callable[[], bool]:
    patch(bench, "job", "kept-a1", {"metadata": {"ownerReferences": None}})
    uid = bench.get("dj", "kept")["metadata"]["uid"]

    def back() -> bool:
        owners = bench.get("job", "kept-a1")["metadata"].get("ownerReferences") or []
        return [(o["uid"], o["controller"]) for o in owners] == [(uid, True)]

    return back


def test_what_is_taken_from_a_gang_that_trains_comes_back(
    beside: Beside, operator: Operator, book: Path
) -> None:
    """Its Service, by which ranks that are started again find each other, and the owner of its Job."""

    def case(bench: Bench, take: Callable[[Bench], Callable[[], bool]]) -> None:
        bench.apply(gang("kept", book, STEPS="250"))
        training(bench, "kept")
        back = take(bench)
        wait_for(back, "it does not come back", 60)
        assert bench.condition("kept")["reason"] == "Training"
        assert len(calm(bench, "kept")["attempts"]) == 1

    beside(case, [take_service, take_selector, take_owner])


def test_a_deleted_attempt_is_followed_by_another(
    beside: Beside, operator: Operator, book: Path
) -> None:
    def case(bench: Bench, cascade: str) -> None:
        bench.apply(gang("cut", book))
        training(bench, "cut")
        before = {p["metadata"]["uid"] for p in bench.get("pods", *STUDENT)["items"]}
        bench.kubectl("delete", "job", "cut-a1", f"--cascade={cascade}", "--wait=false")
        status = calm(bench, "cut")
        assert len(status["attempts"]) == 2
        # Its pods were told to stop, and committed; the stand-in's ranks do not keep step.
        first, second = status["attempts"]
        assert (first["reason"], first["charged"]) == ("GracefulCheckpoint", False)
        assert second["resumedFromStep"] >= first["lastStep"] - 3
        left = {p["metadata"]["uid"] for p in bench.get("pods", *STUDENT)["items"]}
        assert not left & before

    beside(case, CASCADES)


def test_a_deleted_pod_ends_its_attempt(beside: Beside, operator: Operator, book: Path) -> None:
    def case(bench: Bench, options: tuple[str, ...]) -> None:
        bench.apply(gang("poked", book))
        training(bench, "poked")
        pods = bench.get("pods", *STUDENT)["items"]
        bench.kubectl("delete", "pod", pods[1]["metadata"]["name"], "--wait=false", *options)
        status = calm(bench, "poked")
        assert len(status["attempts"]) == 2
        assert status["attempts"][1]["resumedFromStep"] >= 5

    beside(case, [(), ("--grace-period=0", "--force")])


def test_a_deleted_teacher_is_made_again(beside: Beside, operator: Operator, book: Path) -> None:
    def case(bench: Bench, cascade: str) -> None:
        bench.apply(distilling("school", template(book, STEPS="110", TEACHER_SECONDS="6")))
        wait_for(
            lambda: any(
                p["status"]["phase"] == "Running" for p in bench.get("pods", *TEACHER)["items"]
            ),
            "no teacher",
        )
        bench.kubectl("delete", "job", "school-teacher", f"--cascade={cascade}", "--wait=false")
        status = calm(bench, "school")
        assert status["teacherStream"]["complete"]

    beside(case, CASCADES)


def test_an_edited_gang_does_not_idle(beside: Beside, operator: Operator, book: Path) -> None:
    def case(bench: Bench, edited: tuple[dict[str, Any], str]) -> None:
        bench.apply(gang("held", book))
        training(bench, "held")
        edit, words = edited
        patch(bench, "job", "held-a1", {"spec": edit})
        status = calm(bench, "held")
        first = status["attempts"][0]
        assert words in first["message"]
        assert not first["charged"]
        assert len(status["attempts"]) == 2

    beside(
        case,
        [
            ({"suspend": True}, "somebody suspended"),
            ({"parallelism": 0}, "somebody set parallelism"),
        ],
    )


def test_an_edited_teacher_goes_on(beside: Beside, operator: Operator, book: Path) -> None:
    def case(bench: Bench, edit: dict[str, Any]) -> None:
        bench.apply(distilling("class", template(book, STEPS="110", TEACHER_SECONDS="6")))
        wait_for(lambda: bench.get("pods", *TEACHER)["items"], "no teacher")
        patch(bench, "job", "class-teacher", {"spec": edit})
        calm(bench, "class")

    beside(case, [{"suspend": True}, {"parallelism": 0}])


def test_children_whose_labels_are_taken_off_are_found(
    beside: Beside, operator: Operator, book: Path
) -> None:
    """One gang trains all the time: it is not taken for deleted, and not started twice."""

    def case(bench: Bench, label: str) -> None:
        bench.apply(gang("masked", book, STEPS="110"))
        training(bench, "masked")
        first = bench.get("pods", *STUDENT)["items"][0]["metadata"]["name"]
        bench.kubectl("label", "pod", first, f"{label}-")
        bench.kubectl("label", "job", "masked-a1", f"{label}-")

        def back() -> bool:
            found = (bench.get("job", "masked-a1"), bench.get("pod", first))
            return all(label in item["metadata"]["labels"] for item in found)

        wait_for(back, "the labels do not come back", 60)
        assert len(calm(bench, "masked")["attempts"]) == 1

    beside(case, ["app.kubernetes.io/managed-by", "kubedistill.dev/job", "kubedistill.dev/job-uid"])


def test_labels_that_went_while_no_operator_ran(
    bench: Bench, operator: Operator, book: Path
) -> None:
    bench.apply(gang("unseen", book, STEPS="150"))
    training(bench, "unseen")
    operator.kill()
    bench.kubectl("label", "job", "unseen-a1", "app.kubernetes.io/managed-by-")
    bench.kubectl("label", "pod", "--all", "app.kubernetes.io/managed-by-")
    operator.restart()
    assert len(calm(bench, "unseen")["attempts"]) == 1


def test_a_quota_is_told_and_waited_for(bench: Bench, operator: Operator, book: Path) -> None:
    bench.kubectl("create", "quota", "few", "--hard=count/jobs.batch=1")
    wait_for(lambda: bench.get("quota", "few")["status"].get("used"), "no quota")
    bench.apply(gang("poor", book, STEPS="20"))
    bench.wait_state("poor", "CreationRefused")
    assert "exceeded quota: few" in bench.condition("poor")["message"]
    version = bench.get("dj", "poor")["metadata"]["resourceVersion"]
    assert "CreationRefused" in {e["reason"] for e in bench.get("events")["items"]}
    bench.kubectl("delete", "quota", "few")
    assert len(calm(bench, "poor")["attempts"]) == 1
    assert bench.get("dj", "poor")["metadata"]["resourceVersion"] != version


def test_a_name_that_is_taken_is_told(bench: Bench, operator: Operator, book: Path) -> None:
    bench.kubectl("create", "configmap", "twin-a1")
    bench.apply(gang("twin", book, STEPS="20"))
    bench.wait_state("twin", "NameTaken")
    assert "twin-a1 belongs to something else" in bench.condition("twin")["message"]
    bench.kubectl("delete", "configmap", "twin-a1")
    assert len(calm(bench, "twin")["attempts"]) == 1


def test_pods_that_a_quota_forbids_are_told(bench: Bench, operator: Operator, book: Path) -> None:
    bench.kubectl("create", "quota", "none", "--hard=pods=0")
    wait_for(lambda: bench.get("quota", "none")["status"].get("used"), "no quota")
    bench.apply(gang("alone", book, STEPS="20"))
    bench.wait_state("alone", "PodNotStarting")
    assert "none of 1 pods for 30 s: `kubectl describe job" in bench.condition("alone")["message"]
    bench.kubectl("delete", "quota", "none")
    calm(bench, "alone")

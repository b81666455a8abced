"""The dev cluster's node on a real control plane: what a kubelet would do, and the faults."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from devcluster.cluster import DevCluster
from devcluster.handle import Handle
from devcluster.kit import Kit, container, state
from devcluster.programs import API_CALL, ON_TERM, PEER, READY, RESTRICTED, SLEEP

pytestmark = pytest.mark.controlplane


@pytest.fixture
def kit(devcluster: DevCluster, cluster: Handle, namespace: str) -> Kit:
    """Of the node that is tested here: nothing of it is on a cluster of one's own."""
    return Kit(cluster, namespace)


def test_indexed_job_whose_pods_find_each_other(kit: Kit) -> None:
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app": "gang"}}
    kit.create("services", {"metadata": {"name": "gang"}, "spec": service})
    pod_ip = {"fieldRef": {"fieldPath": "status.podIP"}}
    main = container(PEER) | {
        "env": [
            {"name": "POD_IP", "valueFrom": pod_ip},
            {"name": "HEAD", "value": "gang-a0-0.gang"},
        ]
    }
    template = {
        "metadata": {"labels": {"app": "gang"}},
        "spec": {"subdomain": "gang", "restartPolicy": "Never", "containers": [main]},
    }
    spec = {
        "completions": 2, "parallelism": 2, "completionMode": "Indexed", "backoffLimit": 0,
        "template": template,
    }  # fmt: skip
    kit.create("jobs", {"metadata": {"name": "gang-a0"}, "spec": spec})
    path = f"/apis/batch/v1/namespaces/{kit.namespace}/jobs/gang-a0"
    kit.cluster.wait("Complete", lambda: _job(kit, path, "Complete"))
    head, peer = sorted(kit.pods_of("app=gang"), key=lambda pod: pod["spec"]["hostname"])
    log = kit.cluster.log(kit.namespace, head["metadata"]["name"])
    assert log == f"heard rank 1 from {peer['status']['podIP']}\n"
    assert head["status"]["podIP"] != peer["status"]["podIP"]


def _job(kit: Kit, path: str, kind: str) -> dict[str, Any] | None:
    conditions = kit.cluster.api.get(path).get("status", {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind and c["status"] == "True"), None)


def test_exit_code_decides_by_pod_failure_policy(kit: Kit) -> None:
    codes = {"containerName": "main", "operator": "In", "values": [42]}
    template = {"restartPolicy": "Never", "containers": [container("raise SystemExit(42)")]}
    spec = {
        "backoffLimit": 5,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]},
        "template": {"metadata": {"labels": {"app": "f"}}, "spec": template},
    }
    kit.create("jobs", {"metadata": {"name": "f"}, "spec": spec})
    path = f"/apis/batch/v1/namespaces/{kit.namespace}/jobs/f"
    failed = kit.cluster.wait("Failed", lambda: _job(kit, path, "Failed"))
    assert failed["reason"] == "PodFailurePolicy"
    assert "exit code 42" in failed["message"]


def test_missing_secret_then_missing_key_then_runs(kit: Kit) -> None:
    key = {"secretKeyRef": {"name": "s3", "key": "token"}}
    kit.run(
        "import os; print(os.environ['TOKEN'], os.environ['BOTH'])",
        container={
            "env": [
                {"name": "TOKEN", "valueFrom": key},
                {"name": "BOTH", "value": "$(TOKEN)-$$(TOKEN)"},
            ]
        },
    )
    assert kit.waiting("CreateContainerConfigError") == 'secret "s3" not found'
    kit.create("secrets", {"metadata": {"name": "s3"}, "stringData": {"other": "x"}})
    wanted = f"couldn't find key token in Secret {kit.namespace}/s3"
    kit.cluster.wait("the key", lambda: kit.waiting("CreateContainerConfigError") == wanted)
    assert kit.pod()["status"]["phase"] == "Pending"
    path = f"/api/v1/namespaces/{kit.namespace}/secrets/s3"
    kit.cluster.api.patch(path, {"stringData": {"token": "abc"}})
    kit.phase("Succeeded")
    assert kit.cluster.log(kit.namespace, "p") == "abc abc-$(TOKEN)\n"


def test_missing_volume_is_an_event_and_no_message(kit: Kit) -> None:
    volume = {"name": "run", "configMap": {"name": "run"}}
    kit.run(
        "print(open('/run-spec/run.json').read())",
        pod={"volumes": [volume]},
        container={"volumeMounts": [{"name": "run", "mountPath": "/run-spec"}]},
    )
    events = f"/api/v1/namespaces/{kit.namespace}/events?fieldSelector=reason%3DFailedMount"
    [event] = kit.cluster.wait("an Event", lambda: kit.cluster.api.get(events)["items"])
    text = 'MountVolume.SetUp failed for volume "run" : configmap "run" not found'
    assert event["message"] == text
    assert state(kit.pod()) == {"waiting": {"reason": "ContainerCreating"}}
    kit.create("configmaps", {"metadata": {"name": "run"}, "data": {"run.json": "{}"}})
    kit.phase("Succeeded")


def test_unknown_image(kit: Kit) -> None:
    kit.run("", container={"image": "registry.example/other:1"})
    assert "registry.example/other:1" in kit.waiting("ImagePullBackOff")


def test_refused_image(kit: Kit) -> None:
    kit.cluster.faults.refuse_image("local/shell:refused")
    try:
        kit.run("print(1)", container={"image": "local/shell:refused"})
        kit.waiting("ImagePullBackOff")
    finally:
        kit.cluster.faults.allow_images()
    kit.phase("Succeeded")


def test_how_containers_end(kit: Kit) -> None:
    write = "import sys; open('/dev/termination-log', 'w').write('x' * 5000); sys.exit(3)"
    kit.run(write, "says")
    fallback = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    kit.run("print('last words'); raise SystemExit(1)", "logs", container=fallback)
    limit = {"resources": {"limits": {"memory": "64Mi"}}}
    kit.run("x = bytearray(10**9)", "eats", container=limit)
    kit.run("", "lacks", container={"command": ["no-such-program"]})
    ends = {
        name: state(kit.phase("Failed", name))["terminated"]
        for name in ("says", "logs", "eats", "lacks")
    }
    assert (ends["says"]["exitCode"], ends["says"]["message"]) == (3, "x" * 4096)
    assert (ends["logs"]["exitCode"], ends["logs"]["message"]) == (1, "last words\n")
    assert (ends["eats"]["exitCode"], ends["eats"]["reason"]) == (137, "OOMKilled")
    assert (ends["lacks"]["exitCode"], ends["lacks"]["reason"]) == (128, "StartError")


def test_restarts_with_back_off(kit: Kit) -> None:
    kit.run("print('try'); raise SystemExit(1)", pod={"restartPolicy": "OnFailure"})
    kit.waiting("CrashLoopBackOff")
    pod = kit.cluster.wait("a restart", lambda: kit.pod() if _restarts(kit.pod()) else None)
    [entry] = pod["status"]["containerStatuses"]
    assert entry["lastState"]["terminated"]["exitCode"] == 1
    assert kit.pod()["status"]["phase"] == "Running"


def _restarts(pod: dict[str, Any]) -> int:
    return int(pod["status"]["containerStatuses"][0]["restartCount"])


def test_init_container_and_sidecar(kit: Kit) -> None:
    shared = {"volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}
    sidecar = container("open('/shared/side', 'w').close();" + SLEEP) | shared
    first = container("open('/shared/first', 'w').close()") | shared
    probe = {"exec": {"command": ["test", "-e", "/shared/side"]}, "periodSeconds": 1}
    kit.run(
        "import os; print(sorted(os.listdir('/shared')))",
        container=shared,
        pod={
            "volumes": [{"name": "shared", "emptyDir": {}}],
            "initContainers": [
                first | {"name": "first"},
                sidecar | {"name": "side", "restartPolicy": "Always", "startupProbe": probe},
            ],
            "terminationGracePeriodSeconds": 1,
        },
    )
    kit.phase("Succeeded")
    assert kit.cluster.log(kit.namespace, "p") == "['first', 'side']\n"


def test_readiness_gates_ready_and_the_name(kit: Kit) -> None:
    service = {"clusterIP": "None", "selector": {"app": "web"}}
    kit.create("services", {"metadata": {"name": "web"}, "spec": service})
    probe = {"exec": {"command": ["cat", "/tmp/ready"]}, "periodSeconds": 1, "failureThreshold": 1}
    kit.run(
        f"import signal; signal.signal(signal.SIGUSR1, lambda *_: {READY}); print('up', flush=True);"
        + SLEEP,
        "web",
        container={"readinessProbe": probe},
        pod={"hostname": "web", "subdomain": "web"},
    )
    look = "import socket, time\nwhile True:\n try: print(socket.gethostbyname('web.web'), flush=True)\n"
    kit.run(look + " except OSError: print('none', flush=True)\n time.sleep(0.2)", "look")
    kit.logged("up", "web")
    kit.logged("none", "look")
    time.sleep(1.5)
    assert kit.condition("Ready", "web") == "False"
    assert "127." not in kit.cluster.log(kit.namespace, "look")
    kit.cluster.faults.signal(kit.namespace, "web", "SIGUSR1")
    kit.cluster.wait("Ready", lambda: kit.condition("Ready", "web") == "True")
    address = kit.pod("web")["status"]["podIP"]
    kit.cluster.wait("name", lambda: address in kit.cluster.log(kit.namespace, "look"))


def test_liveness_restarts(kit: Kit) -> None:
    probe = {"exec": {"command": ["false"]}, "periodSeconds": 1, "failureThreshold": 1}
    pod = {"restartPolicy": "Always", "terminationGracePeriodSeconds": 1}
    kit.run(SLEEP, container={"livenessProbe": probe}, pod=pod)
    kit.cluster.wait("a restart", lambda: _restarts(kit.phase("Running")) > 0)


def test_delete_gives_time_and_ends_with_the_process(kit: Kit) -> None:
    kit.run(ON_TERM, pod={"terminationGracePeriodSeconds": 20})
    kit.logged("up")
    uid = kit.pod()["metadata"]["uid"]
    pid = kit.cluster.faults.pids(kit.namespace, "p")["main"]
    kit.delete()
    kit.logged("got SIGTERM")
    assert not kit.gone()
    kit.cluster.wait("gone", kit.gone)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not (kit.cluster.state / "nodes/dev-node/pods" / uid / "volumes").exists()


def test_delete_kills_who_does_not_listen(kit: Kit) -> None:
    # As PID 1 without a handler it does not even notice SIGTERM.
    kit.run("print('up', flush=True);" + SLEEP, pod={"terminationGracePeriodSeconds": 2})
    kit.logged("up")
    begun = time.monotonic()
    kit.delete()
    kit.cluster.wait("gone", kit.gone)
    assert time.monotonic() - begun >= 2


def test_eviction_marks_the_pod(kit: Kit) -> None:
    kit.run(ON_TERM, pod={"terminationGracePeriodSeconds": 20})
    kit.logged("up")
    path = f"/api/v1/namespaces/{kit.namespace}/pods/p"
    # A finalizer keeps the object, as the Job controller's does.
    kit.cluster.api.patch(path, {"metadata": {"finalizers": ["example.com/keep"]}})
    try:
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "p"}}
        kit.cluster.api.post(f"{path}/eviction", eviction)
        pod = kit.phase("Failed")
        [target] = [c for c in pod["status"]["conditions"] if c["type"] == "DisruptionTarget"]
        assert (target["status"], target["reason"]) == ("True", "EvictionByEvictionAPI")
        assert state(pod)["terminated"]["exitCode"] == 7
        assert state(pod)["terminated"]["message"] == "checkpoint written"
    finally:
        kit.cluster.api.patch(
            path, {"metadata": {"$deleteFromPrimitiveList/finalizers": ["example.com/keep"]}}
        )
    kit.cluster.wait("gone", kit.gone)


def test_restricted_pod(kit: Kit) -> None:
    mounts = {"scratch": "/scratch", "shm": "/dev/shm", "config": "/config"}
    kit.create("configmaps", {"metadata": {"name": "c"}, "data": {"a": "1"}})
    kit.run(
        RESTRICTED,
        container={
            "volumeMounts": [{"name": n, "mountPath": path} for n, path in mounts.items()],
            "workingDir": "/scratch",
            "securityContext": {
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            },
        },
        pod={
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1234,
                "runAsGroup": 99,
                "fsGroup": 77,
            },
            "volumes": [
                {"name": "scratch", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
                {"name": "config", "configMap": {"name": "c", "defaultMode": 0o440}},
            ],
        },
    )
    kit.phase("Succeeded")
    assert kit.cluster.log(kit.namespace, "p").splitlines() == [
        "1234 99 [77] /scratch",
        "/ Read-only file system",
        "/etc Read-only file system",
        "/usr Read-only file system",
        "/tmp Read-only file system",
        "/dev/shm writable",
        "/scratch writable",
        "/config Read-only file system",
        "0o440 False",
        "1",
    ]


def test_root_is_refused_where_the_pod_says_so(kit: Kit) -> None:
    kit.run("", pod={"securityContext": {"runAsNonRoot": True, "runAsUser": 0}})
    assert "runAsNonRoot" in kit.waiting("CreateContainerConfigError")


def test_kubectl_logs(kit: Kit) -> None:
    kit.run("print('one'); print('two', flush=True);" + SLEEP)
    kit.logged("two")
    logs = ("logs", "-n", kit.namespace, "p")
    assert kit.cluster.kubectl(*logs) == "one\ntwo\n"
    assert kit.cluster.kubectl(*logs, "--tail=1") == "two\n"


def test_deployment_under_its_own_account(kit: Kit) -> None:
    kit.create("serviceaccounts", {"metadata": {"name": "op"}})
    rule = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}
    kit.create("roles", {"metadata": {"name": "op"}, "rules": [rule]})
    binding = {
        "metadata": {"name": "op"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "op"},
        "subjects": [{"kind": "ServiceAccount", "name": "op", "namespace": kit.namespace}],
    }
    kit.create("rolebindings", binding)
    template = {
        "metadata": {"labels": {"app": "op"}},
        "spec": {
            "serviceAccountName": "op",
            "containers": [container(API_CALL)],
            "terminationGracePeriodSeconds": 1,
        },
    }
    spec = {"replicas": 1, "selector": {"matchLabels": {"app": "op"}}, "template": template}
    kit.create("deployments", {"metadata": {"name": "op"}, "spec": spec})
    path = f"/apis/apps/v1/namespaces/{kit.namespace}/deployments/op"
    kit.cluster.wait(
        "available", lambda: kit.cluster.api.get(path).get("status", {}).get("availableReplicas")
    )
    [pod] = kit.pods_of("app=op")
    log = kit.logged("done", pod["metadata"]["name"])
    assert log.splitlines() == ["pods ['op']", "secrets 403", "done"]


def test_kill_and_freeze(kit: Kit) -> None:
    tick = """
import itertools, time
for number in itertools.count():
    print(number, flush=True)
    time.sleep(0.05)
"""
    # A child in a session of its own, as torchrun's workers are.
    start = f"subprocess.run([sys.executable, '-c', {tick!r}], start_new_session=True)"
    kit.run(f"import subprocess, sys; {start}")
    kit.logged("3")
    kit.cluster.faults.freeze(kit.namespace, "p")
    time.sleep(0.2)
    before = kit.cluster.log(kit.namespace, "p")
    time.sleep(0.5)
    assert kit.cluster.log(kit.namespace, "p") == before
    kit.cluster.faults.thaw(kit.namespace, "p")
    kit.cluster.wait("more", lambda: kit.cluster.log(kit.namespace, "p") != before)
    kit.cluster.faults.kill(kit.namespace, "p")
    end = state(kit.phase("Failed"))["terminated"]
    assert (end["exitCode"], end["reason"]) == (137, "Error")
    after = kit.cluster.log(kit.namespace, "p")
    time.sleep(0.3)
    assert kit.cluster.log(kit.namespace, "p") == after


def test_a_pod_that_the_node_has_no_memory_for(kit: Kit) -> None:
    kit.run("print('up', flush=True);" + SLEEP, pod={"terminationGracePeriodSeconds": 60})
    kit.phase("Running")
    kit.cluster.faults.evict(kit.namespace, "p")
    failed = kit.phase("Failed")
    assert failed["status"]["reason"] == "Evicted"
    told = [c for c in failed["status"]["conditions"] if c["type"] == "DisruptionTarget"]
    assert [(c["status"], c["reason"]) for c in told] == [("True", "TerminationByKubelet")]


def test_lost_node_comes_back(kit: Kit) -> None:
    kit.run("print('up', flush=True);" + SLEEP, pod={"terminationGracePeriodSeconds": 1})
    kit.phase("Running")
    kit.cluster.faults.lose()
    try:
        kit.delete()
        time.sleep(2.5)
        assert kit.pod()["metadata"]["deletionTimestamp"]
    finally:
        kit.cluster.faults.come_back()
    kit.cluster.wait("gone", kit.gone)

"""What pods need from the API server: ConfigMaps, Secrets, tokens; and what the node tells it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from devcluster.node.api import Api, ApiError, Object
from devcluster.node.container import now
from devcluster.node.environment import ConfigError
from devcluster.node.volumes import decoded

_log = logging.getLogger(__name__)
_PLURALS = {"ConfigMap": "configmaps", "Secret": "secrets"}
# The Node authorizer learns of a new pod a moment after the node does.
_GRAPH_SECONDS = 0.6


def read(api: Api, namespace: str, kind: str, name: str) -> dict[str, str]:
    """The data of a ConfigMap or Secret. Raises ConfigError when it is not there."""
    deadline = time.monotonic() + _GRAPH_SECONDS
    while True:
        try:
            return decoded(api.get(f"/api/v1/namespaces/{namespace}/{_PLURALS[kind]}/{name}"))
        except ApiError as error:
            # What is not there is a 403 too until the authorizer knows that the pod asks for it.
            if error.code == 403 and time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            if error.code in (403, 404):
                raise ConfigError(f'{kind.lower()} "{name}" not found') from error
            raise ConfigError(error.message) from error
        except Exception as error:  # the API server may be down: a kubelet tries again
            raise ConfigError(str(error)) from error


def token(api: Api, pod: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """A token of the pod's service account, bound to the pod."""
    meta = pod["metadata"]
    bound = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
    spec: Object = {
        "audiences": [source["audience"]] if source.get("audience") else [],
        "expirationSeconds": source.get("expirationSeconds") or 3600,
        "boundObjectRef": bound,
    }
    account = pod["spec"].get("serviceAccountName") or "default"
    path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/{account}/token"
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    try:
        return str(api.post(path, body)["status"]["token"])
    except ApiError as error:
        raise ConfigError(f"failed to fetch token: {error.message}") from error
    except Exception as error:  # the API server may be down: a kubelet tries again
        raise ConfigError(str(error)) from error


def forget(api: Api, pod: Object, stop: threading.Event) -> None:
    """Remove the pod's object: its processes are gone."""
    meta = pod["metadata"]
    body = {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "gracePeriodSeconds": 0,
        "preconditions": {"uid": meta["uid"]},
    }
    while not stop.is_set():
        try:
            api.delete(f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}", body)
            return
        except ApiError as error:
            if error.code in (404, 409):
                return
            _log.warning("delete %s: %s", meta["name"], error)
        except Exception as error:  # the API server may be down: a kubelet goes on
            _log.warning("delete %s: %s", meta["name"], error)
        stop.wait(0.5)


def event(api: Api, node: str, pod: Object, kind: str, reason: str, message: str) -> None:
    """Write an Event about the pod; never waits, never fails."""
    meta = pod["metadata"]
    about = {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]}
    body = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{meta['name']}.", "namespace": meta["namespace"]},
        "involvedObject": {**about, "namespace": meta["namespace"]},
        "type": kind,
        "reason": reason,
        "message": message[:1024],
        "source": {"component": "kubelet", "host": node},
        "reportingComponent": "kubelet",
        "reportingInstance": node,
        "firstTimestamp": now(),
        "lastTimestamp": now(),
        "count": 1,
    }

    def post() -> None:
        try:
            api.post(f"/api/v1/namespaces/{meta['namespace']}/events", body)
        except Exception as error:  # Events are best effort
            _log.info("event: %s", error)

    threading.Thread(target=post, daemon=True).start()

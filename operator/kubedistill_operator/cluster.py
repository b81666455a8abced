"""The only module that talks to the API server: JSON in, JSON out.

Objects are plain dictionaries: what the API server sent is kept whole, and nothing is lost to a
client's older models.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
from kubedistill_api.base import CHAIN_PLURAL, GROUP, JOB_PLURAL, VERSION
from kubernetes.aio import client, config

from kubedistill_operator.clock import ServerClock
from kubedistill_operator.wire import yaml_safe_json

FIELD_MANAGER = "kubedistill-operator"
STATUS_MANAGER = "kubedistill-status"
_LIST_CHUNK = 500
_USER_AGENT = "kubedistill-operator"


@dataclass(frozen=True)
class Resource:
    """A kind of object, as paths of the API name it."""

    prefix: str
    plural: str

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        parts = [f"/{self.prefix}"]
        if namespace:
            parts.append(f"namespaces/{quote(namespace)}")
        parts.append(self.plural)
        parts += [quote(part) for part in (name, subresource) if part]
        return "/".join(parts)


DISTILLATION_JOBS = Resource(f"apis/{GROUP}/{VERSION}", JOB_PLURAL)
DISTILLATION_CHAINS = Resource(f"apis/{GROUP}/{VERSION}", CHAIN_PLURAL)
BATCH_JOBS = Resource("apis/batch/v1", "jobs")
PODS = Resource("api/v1", "pods")
SERVICES = Resource("api/v1", "services")
CONFIG_MAPS = Resource("api/v1", "configmaps")
EVENTS = Resource("api/v1", "events")
LEASES = Resource("apis/coordination.k8s.io/v1", "leases")

_APPLY = "application/apply-patch+yaml; charset=utf-8"
"""With a parameter, so that the client sends the text as it is given."""


class ApiError(Exception):
    """The API server refused a call."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


class NotFound(ApiError):
    """404."""


class Conflict(ApiError):
    """409: the object is there already, or has changed since it was read."""


class NotLeading(RuntimeError):
    """A write was refused by ourselves: this process does not hold the Lease."""


API_FAILURES = (ApiError, NotLeading, aiohttp.ClientError, TimeoutError, OSError)
"""What a call may end with: whatever wanted it tries again."""
_SENSELESS = (400, 405, 415, 422)
"""Statuses of requests that no API server would take: those are bugs of ours."""


def log_failure(log: logging.Logger, message: str, error: BaseException, **extra: object) -> None:
    """The traceback's last line where the API server was away or refused; all of it for our bugs."""
    senseless = isinstance(error, ApiError) and error.status in _SENSELESS
    if isinstance(error, API_FAILURES) and not senseless:
        last = "".join(traceback.format_exception_only(error)).strip()
        log.warning(message, extra={"error": last, **extra})
    else:
        log.error(message, exc_info=error, extra=extra)


_CHECK: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)
"""Of the write that a task makes: raises where it may not be made any more."""


def _asked_again() -> aiohttp.TraceConfig:
    """Asks for a write once more when it has its connection, which it may have waited for long: in a
    process that was paused meanwhile another leads by now. What follows is done without waiting."""

    async def check(*_: Any) -> None:
        asked = _CHECK.get()
        if asked is not None:
            asked()

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(check)
    trace.on_connection_reuseconn.append(check)
    return trace


class Cluster:
    """Calls to the API server. Writes pass only while `may_write` says so."""

    def __init__(
        self,
        api: client.ApiClient,
        timeout_seconds: float = 30.0,
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        self.api = api
        # Read when the first call makes the pool.
        api.configuration.trace_configs = [_asked_again()]
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self.may_write = may_write
        self.calls: dict[str, int] = {}
        self.clock = ServerClock()

    @classmethod
    async def connect(cls, timeout_seconds: float, connections: int) -> Cluster:
        """With the pod's service account, or else the kubeconfig that KUBECONFIG names."""
        configuration = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            await config.load_kube_config(client_configuration=configuration)
        configuration.connection_pool_maxsize = connections
        api = client.ApiClient(configuration=configuration)
        api.user_agent = _USER_AGENT
        return cls(api, timeout_seconds)

    async def close(self) -> None:
        await self.api.close()

    async def get(self, resource: Resource, namespace: str, name: str) -> dict[str, Any]:
        return await self._call("GET", resource.path(namespace, name))

    async def list(
        self, resource: Resource, namespace: str = "", selector: str = ""
    ) -> AsyncIterator[dict[str, Any]]:
        """All objects of a kind, in chunks; of one namespace, or of all."""
        query: dict[str, str] = {"limit": str(_LIST_CHUNK)}
        if selector:
            query["labelSelector"] = selector
        while True:
            page = await self._call("GET", resource.path(namespace), query)
            for item in page.get("items") or []:
                yield item
            following = page.get("metadata", {}).get("continue")
            if not following:
                return
            query["continue"] = following

    async def create(self, resource: Resource, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create an object; Conflict when it is there already."""
        query = {"fieldManager": FIELD_MANAGER}
        path = resource.path(body["metadata"]["namespace"])
        return await self._write("POST", path, query, body, "application/json")

    async def merge_patch(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        patch: Mapping[str, Any],
        subresource: str = "",
    ) -> dict[str, Any]:
        query = {"fieldManager": FIELD_MANAGER}
        path = resource.path(namespace, name, subresource)
        return await self._write("PATCH", path, query, patch, "application/merge-patch+json")

    async def apply_status(
        self, resource: Resource, raw: Mapping[str, Any], status: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Server-side apply of a whole status over the version in `raw`; Conflict if it changed."""
        metadata = raw["metadata"]
        body = {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": raw["kind"],
            "metadata": {
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "resourceVersion": metadata["resourceVersion"],
                "uid": metadata["uid"],
            },
            "status": status,
        }
        path = resource.path(metadata["namespace"], metadata["name"], "status")
        query = {"fieldManager": STATUS_MANAGER, "force": "true"}
        return await self._write("PATCH", path, query, yaml_safe_json(body), _APPLY)

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        propagation: str = "Background",
        grace_seconds: int | None = None,
        **preconditions: str,
    ) -> dict[str, Any] | None:
        """Delete an object. What is left of it, or None when it was not there.

        `grace_seconds` of a pod: None for its own; 0 waits for nobody.
        `preconditions` are of its `uid` and `resourceVersion`: Conflict where one does not hold.
        """
        body: dict[str, Any] = {
            "kind": "DeleteOptions",
            "apiVersion": "v1",
            "propagationPolicy": propagation,
        }
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        if preconditions:
            body["preconditions"] = preconditions
        path = resource.path(namespace, name)
        try:
            return await self._write("DELETE", path, {}, body, "application/json")
        except NotFound:
            return None

    async def get_lease(self, namespace: str, name: str) -> dict[str, Any]:
        return await self._call("GET", LEASES.path(namespace, name))

    async def create_lease(self, lease: Mapping[str, Any]) -> dict[str, Any]:
        """Not held back by `may_write`: it is what leadership comes from."""
        return await self._call("POST", LEASES.path(lease["metadata"]["namespace"]), {}, lease)

    async def replace_lease(self, lease: Mapping[str, Any]) -> dict[str, Any]:
        """Conflict when somebody else changed it since it was read."""
        metadata = lease["metadata"]
        return await self._call(
            "PUT", LEASES.path(metadata["namespace"], metadata["name"]), {}, lease
        )

    async def _write(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | str,
        content_type: str,
    ) -> dict[str, Any]:
        def check() -> None:
            if not self.may_write():
                raise NotLeading(f"{method} {path}")

        check()
        token = _CHECK.set(check)
        try:
            return await self._call(method, path, query, body, content_type)
        finally:
            _CHECK.reset(token)

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | str | None = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        self.calls[method] = self.calls.get(method, 0) + 1
        headers = {"Accept": "application/json", "Content-Type": content_type}
        # param_serialize refreshes tokens and adds them; the query it leaves to us.
        _, url, headers, _, _ = await self.api.param_serialize(
            method, path, header_params=headers, auth_settings=["BearerToken"]
        )
        if query:
            url = f"{url}?{urlencode(query)}"
        response = await self.api.rest_client.request(
            method, url, headers=headers, body=body, _request_timeout=self._timeout
        )
        self.clock.heard(response.headers.get("Date"))
        text = await response.read()
        document = _json(text)
        if response.status >= 400:
            told = (
                {"message": text[:200].decode(errors="replace")} if document is None else document
            )
            raise _error(response.status, told, response.reason or "")
        if document is None:
            # As an empty one it would say that nothing is there any more.
            raise aiohttp.ClientPayloadError(
                f"{method} {path}: {response.status} without an object"
            )
        return document


def _json(text: bytes) -> dict[str, Any] | None:
    """An object; None where the text is none."""
    try:
        document = json.loads(text)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _error(status: int, document: Mapping[str, Any], reason: str) -> ApiError:
    kinds: dict[int, type[ApiError]] = {404: NotFound, 409: Conflict}
    kind = kinds.get(status, ApiError)
    return kind(status, document.get("reason") or reason, document.get("message") or "")

"""Keeps the /etc/hosts of this node's pods as a cluster's DNS would answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from devcluster.node import names
from devcluster.node.api import Api, Object


class Dns:
    """Follows all pods and Services of the cluster: peers may run on another node.

    `local` gives this node's (pod, hosts file) pairs; the pods carry their addresses already.
    """

    def __init__(self, api: Api, local: Callable[[], list[tuple[Object, Path]]]) -> None:
        self._api = api
        self._local = local
        self._lock = threading.Lock()
        self._pods: dict[str, Object] = {}
        self._services: dict[str, Object] = {}

    def start(self, stop: threading.Event) -> None:
        """Follow in threads until `stop`."""
        for path, found in (("/api/v1/pods", self._pods), ("/api/v1/services", self._services)):

            def changed(kind: str, item: Object, found: dict[str, Object] = found) -> None:
                self._changed(found, kind, item)

            watch = threading.Thread(
                target=self._api.watch, args=(path, changed, stop), daemon=True
            )
            watch.start()

    def _changed(self, found: dict[str, Object], kind: str, item: Object) -> None:
        with self._lock:
            if kind == "SYNC":
                found.clear()
                found.update({i["metadata"]["uid"]: i for i in item["items"]})
            elif kind == "DELETED":
                found.pop(item["metadata"]["uid"], None)
            elif kind in ("ADDED", "MODIFIED"):
                found[item["metadata"]["uid"]] = item
        self.write()

    def write(self) -> None:
        """Rewrite what changed, in place: the file is mounted into running containers."""
        with self._lock:
            entries: dict[str, dict[str, str]] = {}
            for pod, path in self._local():
                home = pod["metadata"]["namespace"]
                if home not in entries:
                    entries[home] = names.hosts(self._services.values(), self._pods.values(), home)
                text = names.hosts_file(pod, entries[home])
                if path.exists() and path.read_text() != text:
                    _overwrite(path, text)


def _overwrite(path: Path, text: str) -> None:
    """In one write, then cut to length: a reader never sees an empty file."""
    with path.open("r+b", buffering=0) as file:
        file.write(text.encode())
        file.truncate()

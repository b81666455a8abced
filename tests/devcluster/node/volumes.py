"""A pod's volumes as folders on the host, and where its containers see them."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.node.environment import ConfigError, Read, field_value


@dataclass(frozen=True)
class Mount:
    """One bind mount into a container."""

    source: str
    target: str
    read_only: bool = False


Tokens = Callable[[Mapping[str, Any], Mapping[str, Any]], str]
"""(pod, serviceAccountToken source) → a token of the pod's service account."""


class Volumes:
    """The volumes of one pod below `folder`."""

    def __init__(self, folder: Path, pod: Mapping[str, Any], read: Read, tokens: Tokens) -> None:
        self._folder = folder
        self._pod = pod
        self._read = read
        self._tokens = tokens
        self._made: dict[str, Path] = {}

    def prepare(self) -> None:
        """Make all volumes. Raises ConfigError in the kubelet's words when one cannot be made."""
        for volume in self._pod["spec"].get("volumes") or []:
            self._made[volume["name"]] = self._make(volume)

    def mounts(self, container: Mapping[str, Any]) -> list[Mount]:
        """The mounts of one container."""
        found = []
        for entry in container.get("volumeMounts") or []:
            if entry["name"] not in self._made:
                raise ConfigError(f"volume {entry['name']} is not there")
            source = self._made[entry["name"]]
            if entry.get("subPath"):
                source = source / entry["subPath"]
            found.append(Mount(str(source), entry["mountPath"], bool(entry.get("readOnly"))))
        return found

    def _make(self, volume: Mapping[str, Any]) -> Path:
        name = volume["name"]
        folder = self._folder / name
        if "hostPath" in volume:
            return Path(volume["hostPath"]["path"])
        folder.mkdir(parents=True, exist_ok=True)
        if "emptyDir" in volume:
            folder.chmod(0o777)
        elif "configMap" in volume:
            self._project(folder, "ConfigMap", volume["configMap"], volume["configMap"]["name"])
        elif "secret" in volume:
            self._project(folder, "Secret", volume["secret"], volume["secret"]["secretName"])
        elif "downwardAPI" in volume:
            self._downward(folder, volume["downwardAPI"].get("items") or [])
        elif "projected" in volume:
            for source in volume["projected"].get("sources") or []:
                self._projected(folder, source)
        else:
            raise ConfigError(f"volume {name}: unsupported kind {sorted(volume)}")
        return folder

    def _projected(self, folder: Path, source: Mapping[str, Any]) -> None:
        if "configMap" in source:
            self._project(folder, "ConfigMap", source["configMap"], source["configMap"]["name"])
        elif "secret" in source:
            self._project(folder, "Secret", source["secret"], source["secret"]["name"])
        elif "downwardAPI" in source:
            self._downward(folder, source["downwardAPI"].get("items") or [])
        elif "serviceAccountToken" in source:
            spec = source["serviceAccountToken"]
            write(folder / spec["path"], self._tokens(self._pod, spec))

    def _project(self, folder: Path, kind: str, source: Mapping[str, Any], name: str) -> None:
        try:
            data = self._read(kind, name)
        except ConfigError:
            if source.get("optional"):
                return
            raise
        items = source.get("items") or [{"key": key, "path": key} for key in data]
        for item in items:
            if item["key"] not in data:
                raise ConfigError(f"references non-existent {kind.lower()} key: {item['key']}")
            write(folder / item["path"], data[item["key"]])

    def _downward(self, folder: Path, items: list[Mapping[str, Any]]) -> None:
        for item in items:
            write(folder / item["path"], field_value(self._pod, item["fieldRef"]["fieldPath"]))

    def remove(self) -> None:
        """Delete what was made; host paths stay."""
        shutil.rmtree(self._folder, ignore_errors=True)


def write(path: Path, text: str) -> None:
    """Write a file that any user can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.chmod(path, 0o644)  # noqa: PTH101


def decoded(secret: Mapping[str, Any]) -> dict[str, str]:
    """The data of a Secret as text."""
    return {k: base64.b64decode(v).decode() for k, v in (secret.get("data") or {}).items()}

"""A pod's volumes as folders on the host, and where its containers see them."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.node.environment import ConfigError, Object, Read, expand, field_value, optionally

_TOKEN_AGE_LIMIT = 0.8


@dataclass(frozen=True)
class Mount:
    """One bind mount into a container."""

    source: str
    target: str
    read_only: bool = False


Tokens = Callable[[Object, Object], str]
"""(pod, serviceAccountToken source) → a token of the pod's service account."""


class Volumes:
    """The volumes of one pod below `folder`."""

    def __init__(self, folder: Path, pod: Object, read: Read, tokens: Tokens) -> None:
        self._folder = folder
        self._pod = pod
        self._read = read
        self._tokens = tokens
        self._made: dict[str, Path] = {}
        self._token_due: dict[Path, float] = {}
        group = (pod["spec"].get("securityContext") or {}).get("fsGroup")
        # In a user namespace there is one group only.
        self._group: int | None = group if os.geteuid() == 0 else None

    def prepare(self) -> None:
        """Make all volumes. Raises ConfigError in the kubelet's words when one cannot be made."""
        for volume in self._pod["spec"].get("volumes") or []:
            try:
                self._made[volume["name"]] = self._make(volume)
            except ConfigError as error:
                raise ConfigError(
                    f'MountVolume.SetUp failed for volume "{volume["name"]}" : {error}'
                ) from error

    def refresh(self) -> None:
        """Bring changed ConfigMaps, Secrets and ageing tokens to the files, as a kubelet does."""
        for volume in self._pod["spec"].get("volumes") or []:
            if _is_projection(volume):
                with contextlib.suppress(ConfigError, OSError):
                    self._make(volume)

    def mounts(self, container: Object, env: Mapping[str, str]) -> list[Mount]:
        """The mounts of one container."""
        projections = {
            v["name"] for v in self._pod["spec"].get("volumes") or [] if _is_projection(v)
        }
        found = []
        for entry in container.get("volumeMounts") or []:
            source = self._made[entry["name"]]
            inside = entry.get("subPath") or expand(entry.get("subPathExpr") or "", env)
            if inside:
                source = source / inside
                if not source.exists():
                    source.mkdir(parents=True)
                    source.chmod(0o777)
            read_only = bool(entry.get("readOnly")) or entry["name"] in projections
            found.append(Mount(str(source), entry["mountPath"], read_only))
        return found

    def _make(self, volume: Object) -> Path:
        folder: Path = self._folder / str(volume["name"])
        if "hostPath" in volume:
            return _host_path(volume["hostPath"])
        folder.mkdir(parents=True, exist_ok=True)
        if "emptyDir" in volume:
            folder.chmod(0o2777 if self._group is not None else 0o777)
            if self._group is not None:
                os.chown(folder, -1, self._group)
        elif "projected" in volume:
            mode = int(volume["projected"].get("defaultMode") or 0o644)
            for source in volume["projected"].get("sources") or []:
                self._project(folder, source, mode)
        elif _is_projection(volume):
            [kind] = set(volume) - {"name"}
            self._project(folder, volume, int(volume[kind].get("defaultMode") or 0o644))
        else:
            raise ConfigError(f"this node has no volumes of kind {sorted(set(volume) - {'name'})}")
        return folder

    def _project(self, folder: Path, source: Object, mode: int) -> None:
        """One source: a projected volume has several, of the same shapes as the volumes."""
        if "configMap" in source:
            name = source["configMap"]["name"]
            self._data(folder, "ConfigMap", source["configMap"], name, mode)
        elif "secret" in source:
            name = source["secret"].get("name") or source["secret"]["secretName"]
            self._data(folder, "Secret", source["secret"], name, mode)
        elif "downwardAPI" in source:
            for item in source["downwardAPI"].get("items") or []:
                if "fieldRef" not in item:
                    raise ConfigError("this node projects fieldRef only")
                text = field_value(self._pod, item["fieldRef"]["fieldPath"])
                self._write(folder / item["path"], text, int(item.get("mode") or mode))
        elif "serviceAccountToken" in source:
            self._token(folder, source["serviceAccountToken"])
        else:
            raise ConfigError(f"this node projects no {sorted(source)}")

    def _token(self, folder: Path, spec: Object) -> None:
        path = folder / spec["path"]
        if time.time() < self._token_due.get(path, 0.0):
            return
        self._write(path, self._tokens(self._pod, spec), 0o644)
        lifetime = float(spec.get("expirationSeconds") or 3600)
        self._token_due[path] = time.time() + _TOKEN_AGE_LIMIT * lifetime

    def _data(self, folder: Path, kind: str, source: Object, name: str, mode: int) -> None:
        data = optionally(source, kind, self._read, name)
        for item in source.get("items") or [{"key": key, "path": key} for key in data]:
            if item["key"] in data:
                self._write(folder / item["path"], data[item["key"]], int(item.get("mode") or mode))
            elif not source.get("optional"):
                what = "secret" if kind == "Secret" else "config"
                prefix = "" if kind == "Secret" else "configmap "
                raise ConfigError(f"{prefix}references non-existent {what} key: {item['key']}")

    def _write(self, path: Path, text: str, mode: int) -> None:
        """Write a file in one step: a container may be reading the old one."""
        content = text.encode(errors="surrogateescape")
        if path.exists() and path.read_bytes() == content:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.new")
        scratch.write_bytes(content)
        if self._group is not None:
            os.chown(scratch, -1, self._group)
            mode |= (mode & 0o400) >> 3
        scratch.chmod(mode)
        scratch.rename(path)

    def remove(self) -> None:
        """Delete what was made; host paths stay."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _is_projection(volume: Object) -> bool:
    return bool({"configMap", "secret", "downwardAPI", "projected"} & set(volume))


def _host_path(source: Object) -> Path:
    path = Path(source["path"])
    kind = source.get("type") or ""
    if kind == "DirectoryOrCreate":
        path.mkdir(parents=True, exist_ok=True)
    elif kind == "FileOrCreate":
        path.touch()
    elif not path.exists() or (kind == "Directory" and not path.is_dir()):
        raise ConfigError(f"hostPath type check failed: {path} is not a {kind or 'path'}")
    return path


def decoded(item: Object) -> dict[str, str]:
    """All data of a ConfigMap or Secret; bytes that are no text survive as surrogates."""
    secret = item.get("kind") == "Secret"
    encoded = item.get("data") if secret else item.get("binaryData")
    plain: dict[str, Any] = {} if secret else dict(item.get("data") or {})
    return plain | {
        key: base64.b64decode(value).decode(errors="surrogateescape")
        for key, value in (encoded or {}).items()
    }

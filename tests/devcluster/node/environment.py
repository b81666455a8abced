"""A container's environment and arguments, as a kubelet makes them. Pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

Object = Mapping[str, Any]
Read = Callable[[str, str], Mapping[str, str]]
"""(kind, name) → data of a ConfigMap or Secret of the pod's namespace. Raises ConfigError."""

_REFERENCE = re.compile(r"\$(\$|\(([^()]*)\))")
_KINDS = (("ConfigMap", "configMap"), ("Secret", "secret"))


class ConfigError(RuntimeError):
    """The container cannot be made yet; the text is the kubelet's."""


def expand(text: str, values: Mapping[str, str]) -> str:
    """`$(NAME)` → its value, `$$` → `$`; unknown names stay as they are."""

    def replacement(found: re.Match[str]) -> str:
        if found.group(1) == "$":
            return "$"
        return values.get(found.group(2), found.group(0))

    return _REFERENCE.sub(replacement, text)


def environment(
    container: Object,
    pod: Object,
    service: Mapping[str, str],
    read: Read,
    allocatable: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """`service`, then envFrom, then env in order; later ones see and replace earlier ones.

    The image's own variables are not part of it: `$(PATH)` sees nothing, as in a cluster.
    """
    values = dict(service)
    for source in container.get("envFrom") or []:
        for kind, key in _KINDS:
            if f"{key}Ref" in source:
                data = optionally(source[f"{key}Ref"], kind, read)
                values |= {source.get("prefix", "") + k: v for k, v in data.items()}
    for entry in container.get("env") or []:
        source = entry.get("valueFrom")
        if not source:
            values[entry["name"]] = expand(entry.get("value") or "", values)
        elif (value := _value_from(entry, pod, container, read, allocatable)) is not None:
            values[entry["name"]] = value
    return values


def optionally(reference: Object, kind: str, read: Read, name: str = "") -> Mapping[str, str]:
    """The data of what is referred to; nothing when it is optional and not there."""
    try:
        return read(kind, name or reference["name"])
    except ConfigError:
        if reference.get("optional"):
            return {}
        raise


def _value_from(
    entry: Object,
    pod: Object,
    container: Object,
    read: Read,
    allocatable: Mapping[str, str] | None,
) -> str | None:
    source = entry["valueFrom"]
    if "fieldRef" in source:
        return field_value(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        return resource_value(source["resourceFieldRef"], pod, container, allocatable or {})
    for kind, key in _KINDS:
        reference = source.get(f"{key}KeyRef")
        if reference is None:
            continue
        data = optionally(reference, kind, read)
        if reference["key"] in data:
            return data[reference["key"]]
        if reference.get("optional"):
            return None
        namespace, name = pod["metadata"]["namespace"], reference["name"]
        raise ConfigError(f"couldn't find key {reference['key']} in {kind} {namespace}/{name}")
    raise ConfigError(f"environment variable {entry['name']}: unknown source {sorted(source)}")


def resource_value(
    source: Object, pod: Object, container: Object, allocatable: Mapping[str, str]
) -> str:
    """A resource of a container in units of the divisor, rounded up; the node's where unset."""
    named = source.get("containerName")
    for other in pod["spec"]["containers"]:
        if named and other["name"] == named:
            container = other
    group, _, name = source["resource"].partition(".")
    given = ((container.get("resources") or {}).get(group) or {}).get(name)
    if given is None:
        given = allocatable.get(name, "0") if group == "limits" else "0"
    divisor = quantity(source.get("divisor") or "1") or 1
    return str(math.ceil(quantity(given) / divisor))


def field_value(pod: Object, path: str) -> str:
    """A downward-API field of the pod, such as status.podIP or metadata.labels['x']."""
    keyed = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
    if keyed:
        return str((pod["metadata"].get(keyed.group(1)) or {}).get(keyed.group(2), ""))
    if path in ("metadata.labels", "metadata.annotations"):
        items = pod["metadata"].get(path.split(".")[1]) or {}
        return "\n".join(f'{key}="{value}"' for key, value in sorted(items.items()))
    if path in ("status.podIPs", "status.hostIPs"):
        return str((pod.get("status") or {}).get(path.removeprefix("status.")[:-1], ""))
    value: Any = pod
    for part in path.split("."):
        value = (value or {}).get(part)
    return "" if value is None else str(value)


def arguments(
    container: Object,
    entrypoint: tuple[str, ...],
    command: tuple[str, ...],
    values: Mapping[str, str],
) -> list[str]:
    """command replaces ENTRYPOINT (and drops CMD), args replaces CMD."""
    first = container.get("command")
    rest = container.get("args")
    if not first:
        first = list(entrypoint)
        rest = rest or list(command)
    found = [expand(part, values) for part in [*first, *(rest or [])]]
    if not found:
        raise ConfigError("no command specified")
    return found


_UNITS = {
    "": 1, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50,
}  # fmt: skip


def quantity(text: str | float) -> float:
    """A resource quantity as a number."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)", str(text))
    if found is None or found.group(2) not in _UNITS:
        raise ValueError(f"not a quantity: {text!r}")
    return float(found.group(1)) * _UNITS[found.group(2)]

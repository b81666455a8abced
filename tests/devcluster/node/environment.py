"""A container's environment and arguments, as a kubelet makes them. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Read = Callable[[str, str], Mapping[str, str]]
"""(kind, name) → data of a ConfigMap or Secret of the pod's namespace. Raises ConfigError."""

_REFERENCE = re.compile(r"\$(\$|\(([A-Za-z_][A-Za-z0-9_.-]*)\))")


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
    container: Mapping[str, Any], pod: Mapping[str, Any], image: Mapping[str, str], read: Read
) -> dict[str, str]:
    """envFrom, then env in order; later ones see and replace earlier ones."""
    values = dict(image)
    for source in container.get("envFrom") or []:
        for kind, key in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
            if key in source:
                data = _optional(source[key], lambda k=kind, s=source[key]: read(k, s["name"]))
                values |= {source.get("prefix", "") + k: v for k, v in (data or {}).items()}
    for entry in container.get("env") or []:
        value = _value(entry, values, pod, container, read)
        if value is not None:
            values[entry["name"]] = value
    return values


def _optional(reference: Mapping[str, Any], get: Callable[[], Any]) -> Any:
    try:
        return get()
    except ConfigError:
        if reference.get("optional"):
            return None
        raise


def _value(
    entry: Mapping[str, Any],
    values: Mapping[str, str],
    pod: Mapping[str, Any],
    container: Mapping[str, Any],
    read: Read,
) -> str | None:
    source = entry.get("valueFrom")
    if not source:
        return expand(entry.get("value") or "", values)
    if "fieldRef" in source:
        return field_value(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        group, _, name = source["resourceFieldRef"]["resource"].partition(".")
        return str((container.get("resources") or {}).get(group, {}).get(name, ""))
    for kind, key in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
        if key in source:
            reference = source[key]
            return _optional(reference, lambda k=kind, r=reference: _key(k, r, pod, read))
    raise ConfigError(f"environment variable {entry['name']}: unknown source {sorted(source)}")


def _key(kind: str, reference: Mapping[str, Any], pod: Mapping[str, Any], read: Read) -> str:
    data = read(kind, reference["name"])
    if reference["key"] not in data:
        namespace = pod["metadata"]["namespace"]
        raise ConfigError(
            f"couldn't find key {reference['key']} in {kind} {namespace}/{reference['name']}"
        )
    return data[reference["key"]]


def field_value(pod: Mapping[str, Any], path: str) -> str:
    """A downward-API field of the pod, such as status.podIP or metadata.labels['x']."""
    keyed = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
    if keyed:
        return str((pod["metadata"].get(keyed.group(1)) or {}).get(keyed.group(2), ""))
    if path in ("metadata.labels", "metadata.annotations"):
        items = pod["metadata"].get(path.split(".")[1]) or {}
        return "".join(f'{key}="{value}"\n' for key, value in sorted(items.items()))
    if path == "status.podIPs":
        return str(pod.get("status", {}).get("podIP", ""))
    value: Any = pod
    for part in path.split("."):
        value = (value or {}).get(part)
    return "" if value is None else str(value)


def arguments(
    container: Mapping[str, Any],
    entrypoint: tuple[str, ...],
    command: tuple[str, ...],
    values: Mapping[str, str],
) -> list[str]:
    """command replaces ENTRYPOINT (and drops CMD), args replaces CMD."""
    first = container.get("command")
    rest = container.get("args")
    if first is None:
        first = list(entrypoint)
        rest = list(command) if rest is None else rest
    return [expand(part, values) for part in [*first, *(rest or [])]]


_UNITS = {
    "": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip


def quantity(text: str | float) -> float:
    """A resource quantity as a number."""
    found = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)", str(text))
    if found is None or found.group(2) not in _UNITS:
        raise ValueError(f"not a quantity: {text!r}")
    return float(found.group(1)) * _UNITS[found.group(2)]

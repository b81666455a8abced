"""Merging of pod templates, as `kubectl patch --type=strategic` does it.

Objects merge key by key and null removes a key; lists whose items have a merge key merge item by
item; other lists are replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MERGE_KEYS = {
    "containers": "name", "initContainers": "name", "volumes": "name", "env": "name",
    "imagePullSecrets": "name", "volumeMounts": "mountPath", "volumeDevices": "devicePath",
    "ports": "containerPort", "tolerations": "key", "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey", "schedulingGates": "name",
    "resourceClaims": "name",
}  # fmt: skip


def strategic_merge(base: Any, patch: Any, field: str = "") -> Any:
    """`patch` merged over `base`, neither changed. Merging it again changes nothing."""
    if isinstance(base, Mapping) and isinstance(patch, Mapping):
        return _merge_objects(base, patch)
    if isinstance(patch, Mapping):
        return _merge_objects({}, patch)
    if _is_list(base) and _is_list(patch) and field in _MERGE_KEYS:
        return _merge_lists(base, patch, _MERGE_KEYS[field])
    if _is_list(patch) and field in _MERGE_KEYS:
        return _merge_lists([], patch, _MERGE_KEYS[field])
    return patch


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _merge_objects(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = strategic_merge(base.get(name), value, name)
    return result


def _merge_lists(base: Sequence[Any], patch: Sequence[Any], key: str) -> list[Any]:
    result = list(base)
    for item in patch:
        name = item.get(key) if isinstance(item, Mapping) else None
        place = next(
            (
                i
                for i, old in enumerate(result)
                if name is not None and isinstance(old, Mapping) and old.get(key) == name
            ),
            None,
        )
        if place is not None:
            merged = strategic_merge(result[place], item)
            # A variable has one source: a new one replaces the old one.
            if key == "name" and "value" in item and "valueFrom" not in item:
                merged.pop("valueFrom", None)
            elif key == "name" and "valueFrom" in item and "value" not in item:
                merged.pop("value", None)
            result[place] = merged
        elif item not in result:
            result.append(strategic_merge(None, item))
    return result

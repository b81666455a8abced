"""What the watches and our own writes have shown, by object, the newest version of each.

Watches may run behind our own writes: a version is never replaced by an older one, and what was
deleted does not come back with an older version. (What lost its labels looks deleted, and comes back
with a newer one.) Versions of one kind are ordered numbers (so the
API server has them since 1.35). Deleted pods and Jobs are remembered for a while, because a pod's
last words may arrive with its deletion.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kubedistill_api.names import LABEL_CHAIN, LABEL_JOB

from kubedistill_operator.plan.inputs import dependency_names

Raw = dict[str, Any]
Name = tuple[str, str]
_MEMORY_SECONDS = 900.0


def version_of(raw: Raw) -> int:
    """The resourceVersion as a number; 0 where it is none."""
    text = raw["metadata"].get("resourceVersion", "")
    return int(text) if text.isdigit() else 0


def name_of(raw: Raw) -> Name:
    return raw["metadata"].get("namespace", ""), raw["metadata"]["name"]


class Kind:
    """Objects of one kind, grouped by (namespace, value of one label)."""

    def __init__(self, group_label: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._label = group_label
        self._clock = clock
        self._objects: dict[Name, Raw] = {}
        self._groups: dict[Name, dict[str, Raw]] = defaultdict(dict)
        self._gone: dict[Name, dict[str, tuple[float, Raw]]] = defaultdict(dict)

    def group_of(self, raw: Raw) -> Name:
        namespace, name = name_of(raw)
        if not self._label:
            return namespace, name
        return namespace, (raw["metadata"].get("labels") or {}).get(self._label, "")

    def put(self, raw: Raw) -> bool:
        """Take an object in; False when something as new is known already."""
        name = name_of(raw)
        old = self._objects.get(name)
        if old is not None and old["metadata"]["uid"] == raw["metadata"]["uid"]:
            if version_of(old) >= version_of(raw):
                return False
        elif self._known_gone(raw):
            return False
        self._drop(name)
        self._gone.get(self.group_of(raw), {}).pop(raw["metadata"]["uid"], None)
        self._objects[name] = raw
        self._groups[self.group_of(raw)][name[1]] = raw
        return True

    def remove(self, raw: Raw) -> bool:
        """Take an object out, and remember it; False when it was not there."""
        name = name_of(raw)
        group = self._gone[self.group_of(raw)]
        group[raw["metadata"]["uid"]] = (self._clock(), raw)
        old = self._objects.get(name)
        if old is None or old["metadata"]["uid"] != raw["metadata"]["uid"]:
            return False
        self._drop(name)
        return True

    def _known_gone(self, raw: Raw) -> bool:
        """Whether it was deleted. A newer version of it had only lost the labels we look by."""
        known = self._gone.get(self.group_of(raw), {}).get(raw["metadata"]["uid"])
        return known is not None and version_of(known[1]) >= version_of(raw)

    def _drop(self, name: Name) -> None:
        old = self._objects.pop(name, None)
        if old is not None:
            group = self.group_of(old)
            self._groups[group].pop(name[1], None)
            if not self._groups[group]:
                del self._groups[group]

    def get(self, namespace: str, name: str) -> Raw | None:
        return self._objects.get((namespace, name))

    def group(self, namespace: str, value: str) -> Iterable[Raw]:
        return list(self._groups.get((namespace, value), {}).values())

    def gone(self, namespace: str, value: str) -> Iterable[Raw]:
        """Objects of a group that were deleted not long ago."""
        found = self._gone.get((namespace, value))
        if not found:
            return []
        oldest = self._clock() - _MEMORY_SECONDS
        for uid in [uid for uid, (when, _) in found.items() if when < oldest]:
            del found[uid]
        return [raw for _, raw in found.values()]

    def forget(self, namespace: str, value: str) -> None:
        """Drop what is remembered of a group's deleted objects."""
        self._gone.pop((namespace, value), None)

    def all(self) -> Iterator[Raw]:
        return iter(list(self._objects.values()))

    def __len__(self) -> int:
        return len(self._objects)


class Cache:
    """All kinds that the operator looks at, and who waits for whom."""

    def __init__(self) -> None:
        self.jobs = Kind(LABEL_CHAIN)
        self.chains = Kind()
        self.batch_jobs = Kind(LABEL_JOB)
        self.pods = Kind(LABEL_JOB)
        self._dependents: dict[Name, set[str]] = defaultdict(set)
        self._depends_on: dict[Name, tuple[str, ...]] = {}

    def put_job(self, raw: Raw) -> bool:
        """Take in a DistillationJob and what it depends on."""
        fresh = self.jobs.put(raw)
        if fresh:
            self._link(name_of(raw), dependency_names(raw.get("spec") or {}))
        return fresh

    def remove_job(self, raw: Raw) -> None:
        if self.jobs.remove(raw):
            self._link(name_of(raw), ())

    def _link(self, name: Name, wanted: tuple[str, ...]) -> None:
        for old in self._depends_on.pop(name, ()):
            self._dependents[name[0], old].discard(name[1])
        if wanted:
            self._depends_on[name] = wanted
        for new in wanted:
            self._dependents[name[0], new].add(name[1])

    def dependents(self, namespace: str, name: str) -> list[str]:
        """Jobs that use this job's model."""
        return sorted(self._dependents.get((namespace, name), ()))

    def depends_on(self, namespace: str, name: str) -> tuple[str, ...]:
        return self._depends_on.get((namespace, name), ())

    @staticmethod
    def chain_of(raw: Raw) -> str:
        """The chain that a job belongs to; empty for none."""
        return str((raw["metadata"].get("labels") or {}).get(LABEL_CHAIN, ""))

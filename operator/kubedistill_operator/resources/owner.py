"""What all children carry: labels to find them by and an owner whose deletion removes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kubedistill_api import names
from kubedistill_api.base import API_VERSION, JOB_KIND


@dataclass(frozen=True)
class Owner:
    """The DistillationJob that children belong to."""

    namespace: str
    name: str
    uid: str
    chain: str = ""
    stage: str = ""

    def labels(self, role: str, attempt: int = 0) -> dict[str, str]:
        """Labels of a child in a role; of an attempt, where it belongs to one."""
        result = {
            names.LABEL_MANAGED_BY: names.MANAGER,
            names.LABEL_JOB: self.name,
            names.LABEL_ROLE: role,
            names.LABEL_JOB_UID: self.uid,
        }
        if attempt:
            result[names.LABEL_ATTEMPT] = str(attempt)
        if self.chain:
            result[names.LABEL_CHAIN] = self.chain
        if self.stage:
            result[names.LABEL_STAGE] = self.stage
        return result

    def made(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a Job with this metadata has the name that we give one of its role.

        Labels alone do not tell: somebody's copy of a Job has them too.
        """
        labels, name = metadata.get("labels") or {}, metadata["name"]
        match labels.get(names.LABEL_ROLE):
            case names.ROLE_PREFLIGHT:
                return bool(name.startswith(names.preflight_name(self.name, "")))
            case names.ROLE_TEACHER:
                return bool(name == names.teacher_name(self.name))
            case names.ROLE_REPORT:
                return bool(name == names.report_name(self.name))
            case names.ROLE_STUDENT:
                number = labels.get(names.LABEL_ATTEMPT, "")
                known = number.isdigit()
                return known and bool(name == names.attempt_name(self.name, int(number)))
        return False

    def reference(self) -> dict[str, Any]:
        """What makes a child go with it."""
        return owner_reference(API_VERSION, JOB_KIND, self.name, self.uid)

    def metadata(self, name: str, labels: dict[str, str], **annotations: str) -> dict[str, Any]:
        """Metadata of a child that goes with its owner."""
        result: dict[str, Any] = {
            "name": name,
            "namespace": self.namespace,
            "labels": labels,
            "ownerReferences": [self.reference()],
        }
        if annotations:
            result["annotations"] = annotations
        return result


def owner_reference(api_version: str, kind: str, name: str, uid: str) -> dict[str, Any]:
    """A controller's reference; foreground deletion of the owner waits for the child."""
    return {
        "apiVersion": api_version,
        "kind": kind,
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def owners_with(
    metadata: Mapping[str, Any], reference: dict[str, Any]
) -> list[dict[str, Any]] | None:
    """An object's owners with this one put back; None where it is among them.

    An object has one controller at most: where somebody gave it another, ours is an owner beside it.
    """
    found = list(metadata.get("ownerReferences") or [])
    if any(owner["uid"] == reference["uid"] for owner in found):
        return None
    controlled = any(owner.get("controller") for owner in found)
    return [*found, {**reference, "controller": False} if controlled else reference]

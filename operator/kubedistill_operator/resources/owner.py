"""What all children carry: labels to find them by and an owner whose deletion removes them."""

from __future__ import annotations

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

    def metadata(self, name: str, labels: dict[str, str], **annotations: str) -> dict[str, Any]:
        """Metadata of a child that goes with its owner."""
        result: dict[str, Any] = {
            "name": name,
            "namespace": self.namespace,
            "labels": labels,
            "ownerReferences": [owner_reference(API_VERSION, JOB_KIND, self.name, self.uid)],
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

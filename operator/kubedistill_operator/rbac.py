"""What the operator may do: exactly what it does. The chart carries these rules."""

from __future__ import annotations

from typing import Any

from kubedistill_api.base import CHAIN_PLURAL, GROUP, JOB_PLURAL

WATCH = ["get", "list", "watch"]

RULES: list[dict[str, Any]] = [
    {
        "apiGroups": [GROUP],
        "resources": [JOB_PLURAL],
        # Create and patch: jobs of a chain's stages, and their suspension. Delete: ttlSecondsAfterFinished.
        "verbs": [*WATCH, "create", "patch", "delete"],
    },
    {"apiGroups": [GROUP], "resources": [CHAIN_PLURAL], "verbs": WATCH},
    {
        "apiGroups": [GROUP],
        "resources": [f"{JOB_PLURAL}/status", f"{CHAIN_PLURAL}/status"],
        "verbs": ["patch"],
    },
    {
        # blockOwnerDeletion, where the admission plugin OwnerReferencesPermissionEnforcement runs.
        "apiGroups": [GROUP],
        "resources": [f"{JOB_PLURAL}/finalizers", f"{CHAIN_PLURAL}/finalizers"],
        "verbs": ["update"],
    },
    {
        "apiGroups": ["batch"],
        "resources": ["jobs"],
        "verbs": [*WATCH, "create", "patch", "delete"],
    },
    # Patch: labels that somebody took off. Delete: pods that a Job left behind as orphans.
    {"apiGroups": [""], "resources": ["pods"], "verbs": [*WATCH, "patch", "delete"]},
    # The phase of a pod whose node is lost and cannot say so.
    {"apiGroups": [""], "resources": ["pods/status"], "verbs": ["patch"]},
    # Patch: a selector that somebody changed.
    {"apiGroups": [""], "resources": ["services"], "verbs": ["get", "create", "patch"]},
    {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "create", "delete"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
]
"""In a ClusterRole, or in a Role of each namespace of `watch_namespaces`."""

LEASE_RULES: list[dict[str, Any]] = [
    {
        "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"],
        "verbs": ["get", "create", "update"],
    }
]
"""In a Role of the operator's own namespace."""

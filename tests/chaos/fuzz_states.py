"""What the status of a mutated object tells: whether it has a verdict, stands, and how it ended."""

from __future__ import annotations

import json
import re
from typing import Any

from chaos.operator_state import cleaned_of

State = dict[str, Any]
_SAYS_WHY = {
    "SecretNotFound", "DependencyNotFound", "WaitingForDependency", "DependencyCycle",
    "DependencyFailed", "Suspended", "Queued", "Unschedulable", "ManagedElsewhere",
}  # fmt: skip
"""Reasons for not being validated yet that tell the user what is waited for."""
_STANDS = _SAYS_WHY | {"PodNotStarting", "CreationRefused"}
"""Reasons with which an object may stay as it is."""
_NONCE = re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
"""Of a key that a preflight of the trainer's own tried the store with, in its message."""


def condition(whole: State, kind: str = "Succeeded") -> State:
    """A condition of an object; one without a status where there is none."""
    for found in (whole.get("status") or {}).get("conditions") or []:
        if found["type"] == kind:
            return dict(found)
    return {"status": "", "reason": ""}


def has_verdict(whole: State) -> bool:
    """Whether the operator has said something of an object."""
    return (
        condition(whole, "Validated")["status"] in ("True", "False")
        or condition(whole)["reason"] in _SAYS_WHY
    )


def looked_at(whole: State) -> bool:
    """Whether the status is of the spec that there is."""
    observed = (whole.get("status") or {}).get("observedGeneration")
    return bool(whole["metadata"]["generation"] == observed)


def stands(whole: State | None) -> bool:
    """Whether an object will not change by itself, or not soon. None: it was deleted."""
    if whole is None:
        return True
    if not looked_at(whole):
        return False
    found = condition(whole)
    # A chain waits for what its stages' jobs wait for.
    waits = [stage.get("state") for stage in (whole.get("status") or {}).get("stages") or []]
    # A writer that fails is tried again by its Job, whose waits grow to ten minutes.
    retried = any((whole.get("status") or {}).get("teacherFailures") or [])
    known = found["status"] in ("True", "False") or retried
    return known or bool(_STANDS & {found["reason"], *waits})


def end(whole: State | None, names: tuple[str, str]) -> State:
    """All of a status that does not differ between two objects with one spec, which have these names."""
    if whole is None:
        return {"deleted": True}
    name, other = names
    text = _NONCE.sub("", json.dumps(cleaned_of(whole)).replace(other, name))
    found: State = json.loads(text)
    return found

"""A gang for which there is no room: with `workers.minNodes` it goes on with fewer pods."""

from __future__ import annotations

from kubedistill_api import reasons
from kubedistill_api.status import Attempt

from kubedistill_operator.plan import shape
from kubedistill_operator.plan.draft import Pass
from kubedistill_operator.plan.exits import Verdict
from kubedistill_operator.plan.times import duration_text, parse_time
from kubedistill_operator.plan.views import PodView

_OF_WAITING = frozenset({reasons.PEER_LOST, reasons.STALLED, reasons.ERROR})
"""Ends of a pod that waited in vain for those that have no place."""


def in_vain(step: Pass, pods: list[PodView], verdict: Verdict) -> Verdict:
    """Of pods that gave up waiting for others that found no place: nobody failed."""
    why = _unplaced(pods, verdict) or _unmade(step, pods, verdict)
    if not why:
        return verdict
    step.draft.change_attempt(placed_nodes=sum(p.placed for p in pods))
    return Verdict(reasons.UNSCHEDULABLE, why[:1000], retry=True, charged=False)


def _unplaced(pods: list[PodView], verdict: Verdict) -> str:
    unplaced = [p for p in pods if p.unschedulable and not p.placed]
    if not unplaced or verdict.reason not in _OF_WAITING:
        return ""
    return f"pod {unplaced[0].name} found no place while the others waited: {unplaced[0].unschedulable}"


def _unmade(step: Pass, pods: list[PodView], verdict: Verdict) -> str:
    """Of a gang that was never whole: a quota forbids a pod, or a webhook.

    Only pods that waited tell: others may fail while their Job still makes the rest of them. One that
    has made a step was whole: then what is missing was deleted while nobody looked.
    """
    attempt = step.draft.attempt
    if attempt is None or attempt.last_step or attempt.resumed_from_step is not None:
        return ""
    nodes, made = shape.nodes_of(step.spec, attempt), len({p.index for p in pods})
    if made >= nodes or not made or verdict.reason != reasons.PEER_LOST:
        return ""
    name = step.draft.attempt_name(attempt.number)
    return (
        f"{made} of {nodes} pods were made, and waited for the others in vain: `kubectl describe job "
        f"{name}` says why (a quota, an admission webhook, Pod Security)"
    )


def shortage(
    step: Pass, attempt: Attempt, pods: list[PodView], trouble: tuple[str, str]
) -> Verdict | str:
    """Why the attempt is to end for lack of room, or what to add to the message of its trouble.

    A pod that a quota forbids has no place either. The wait counts from when a pod last found a
    place, or found none: as long as nodes are added one by one, it goes on.
    """
    draft, spec = step.draft, step.spec
    active = [p for p in pods if p.active]
    nodes, placed = shape.nodes_of(spec, attempt), sum(p.placed for p in active)
    short = any(p.unschedulable for p in active) or len(pods) < nodes
    if spec.workers.min_nodes is None or not short:
        return ""
    fewer = shape.fewer_nodes(spec, nodes, placed)
    if fewer is None:
        return f"; it waits: {shape.why_not_fewer(spec, nodes, placed)}"
    wait = draft.timing.elastic_wait
    changes = [p.placed_at for p in active if p.placed_at]
    since = max(changes, default=parse_time(attempt.start_time) or draft.now)
    left = wait - (draft.now - since).total_seconds()
    if left > 0:
        draft.look_again(left)
        return f"; it goes on with fewer pods after {duration_text(wait)} (workers.minNodes)"
    draft.change_attempt(placed_nodes=placed)
    text = (
        f"{placed} of {nodes} pods found a place within {duration_text(wait)}: the next attempt has "
        f"{fewer} (workers.minNodes {spec.workers.min_nodes}); {trouble[1]}"
    )
    return Verdict(reasons.UNSCHEDULABLE, text[:1000], retry=True, charged=False)

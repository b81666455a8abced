"""How many pods an attempt has, and how many sequences each rank takes at once.

The batch of a step never changes: `globalBatchSize` is divided by the ranks, and a rank's share by
the micro-batch, both without a rest. So fewer nodes and smaller micro-batches are the same
mathematics with more accumulation steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from kubedistill_api import reasons
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.status import Attempt

from kubedistill_operator.plan.times import seconds_since

WAITS_BEFORE_GROWING = 10
"""An attempt asks for all nodes again once the last shortage is this many waits ago."""


def ranks_per_node(spec: DistillationJobSpec) -> int:
    """One rank a GPU, or one a pod on the CPU."""
    return max(1, spec.workers.gpus_per_node)


def share_of_rank(spec: DistillationJobSpec, nodes: int) -> int:
    """Sequences of a step that each rank of `nodes` pods takes."""
    return spec.training.global_batch_size // (nodes * ranks_per_node(spec))


def nodes_of(spec: DistillationJobSpec, attempt: Attempt) -> int:
    """Pods of an attempt."""
    return attempt.nodes or spec.workers.nodes


def micro_batch(spec: DistillationJobSpec, nodes: int, limit: int = 0) -> int:
    """Sequences that a rank takes at once: the largest divisor of its share within all bounds.

    `limit`: the bound since an attempt ran out of memory; 0 for none.
    """
    wanted = spec.training.micro_batch_size
    return _largest_divisor(share_of_rank(spec, nodes), min(wanted, limit) if limit else wanted)


def smaller_micro_batch(spec: DistillationJobSpec, attempt: Attempt, limit: int) -> int | None:
    """At most half of what an attempt's ranks took at once; None where that was one sequence."""
    nodes = nodes_of(spec, attempt)
    present = attempt.micro_batch_size or micro_batch(spec, nodes, limit)
    return _largest_divisor(share_of_rank(spec, nodes), present // 2) if present > 1 else None


def _largest_divisor(number: int, at_most: int) -> int:
    return next(d for d in range(max(1, min(number, at_most)), 0, -1) if number % d == 0)


def fewer_nodes(spec: DistillationJobSpec, present: int, placed: int) -> int | None:
    """The most nodes below `present` for which there is room, or `minNodes`; None where none fits.

    `placed`: pods that found a place. The batch must be a multiple of the ranks.
    """
    least = spec.workers.min_nodes
    if least is None:
        return None
    most = min(max(placed, least), present - 1)
    batch, ranks = spec.training.global_batch_size, ranks_per_node(spec)
    return next((n for n in range(most, least - 1, -1) if batch % (n * ranks) == 0), None)


def why_not_fewer(spec: DistillationJobSpec, present: int, placed: int) -> str:
    """Why `fewer_nodes` knows none; empty without `minNodes`."""
    least = spec.workers.min_nodes
    if least is None:
        return ""
    if present <= least:
        return f"{present} pods are the fewest that workers.minNodes allows"
    most = min(max(placed, least), present - 1)
    ranks = ranks_per_node(spec)
    places = f"{least} pods" if most == least else f"{least} to {most} pods"
    return (
        f"training.globalBatchSize {spec.training.global_batch_size} is no multiple of the ranks of "
        f"{places} ({ranks} a pod), so that workers.minNodes is of no use here"
    )


def next_nodes(
    spec: DistillationJobSpec, attempts: Sequence[Attempt], now: datetime, wait_seconds: float
) -> int:
    """Pods of the attempt after these; 0 for all of `workers.nodes`.

    After one that found no room there are fewer. All are asked for again by the first attempt that
    starts when the last shortage is `WAITS_BEFORE_GROWING` waits ago: a look that is in vain costs
    one wait, so at most a tenth of the time goes into looking.
    """
    short = next((a for a in reversed(attempts) if a.reason == reasons.UNSCHEDULABLE), None)
    if short is None or spec.workers.min_nodes is None:
        return 0
    if short.number == attempts[-1].number:
        present = nodes_of(spec, short)
        return fewer_nodes(spec, present, short.placed_nodes) or short.nodes
    if seconds_since(short.end_time, now) < WAITS_BEFORE_GROWING * wait_seconds:
        return attempts[-1].nodes
    return 0

"""Ranks wait for a streamed teacher together.

Each rank needs other samples, in a shuffled order: one may have to wait for the far end of a stream that
is still written while its peers have all they need. If they began their step, they would wait in its
collectives, whose time-outs take a slow teacher for a dead rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from kubedistill_trainer.methods.signal import Ids, Signal

LOOK_SECONDS = 5.0
"""Between two words of the ranks to each other."""


def gather_teacher(
    teacher: Signal,
    samples: Ids,
    group: Any,
    *,
    asked: Callable[[], bool],
    alive: Callable[[], object],
) -> bool:
    """Collective: wait until the teacher's outputs for every rank's `samples` are there.

    False as soon as a rank is `asked` to stop. `alive` is called while the ranks wait. Raises what
    `Signal.there` raises, such as StreamStalled, on the rank whose samples do not come.
    """
    while True:
        there = teacher.there(samples, LOOK_SECONDS)
        word = torch.tensor([float(not there), float(asked())])
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=group)
        lacking, stop = word.tolist()
        if stop or not lacking:
            return not stop
        alive()

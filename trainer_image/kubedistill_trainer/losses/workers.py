"""Threads for the pointwise part on a CPU, each with its share of the tokens.

An operator of torch divides its work among threads and joins them before it returns. The pointwise
part is some twenty operators a block of tokens, each well under a millisecond: on cores that are
shared with anything else the joins cost more than the work (twice the time of the whole loss was
seen). A worker takes its tokens from the first operator to the last and joins once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import torch


def each(calls: Sequence[Callable[[], None]]) -> None:
    """Make all calls, in threads of their own where there are several; without gradients.

    Each runs its operators on one core.
    """
    if len(calls) < 2:
        for call in calls:
            call()
        return
    without_gradients = torch.no_grad()
    for done in [_pool(torch.get_num_threads()).submit(without_gradients(call)) for call in calls]:
        done.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, "loss", initializer=torch.set_num_threads, initargs=(1,))
    barrier = Barrier(threads)
    for begun in [pool.submit(barrier.wait) for _ in range(threads)]:
        begun.result()
    # The number is a thread's own, but what a thread set last is also what new threads begin with.
    torch.set_num_threads(threads)
    return pool

"""Imports of torch, transformers and DeepSpeed: most of the time that a container takes to start."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_collector() -> Iterator[None]:
    """No garbage collection inside the block, and what it made is never scanned again.

    Imports make millions of objects and next to no garbage: the collector takes a seventh of their
    time for nothing, and later passes would walk over all of them again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

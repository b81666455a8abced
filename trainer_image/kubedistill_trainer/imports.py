"""Imports of torch, transformers and DeepSpeed: most of the time that a container takes to start."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_NO_COMPILER = "TORCHDYNAMO_DISABLE"
"""PyTorch reads it at each use of `torch.compile`."""


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


@contextmanager
def uncompiled() -> Iterator[None]:
    """What is given to `torch.compile` inside the block stays as it is, and no compiler is imported.

    For imports of what is never called: DeepSpeed's ZeRO imports its Muon optimizer, whose decorators
    would bring in all of TorchInductor, more than a second of every rank's start. What is decorated
    after the block is compiled as ever.
    """
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_COMPILER]
        if before is not None:
            os.environ[_NO_COMPILER] = before

"""Imports of torch, transformers and DeepSpeed: most of the time that a container takes to start."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NO_COMPILER = "TORCHDYNAMO_DISABLE"
"""PyTorch reads it at each use of `torch.compile`."""

_LATE = "transformers."


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


def tell_late_imports(file: Path) -> None:
    """Write the names of transformers' modules that are there, one a line.

    Which they are depends on the model, which a rank knows once it has read the inputs: a third of a
    second, which ranks that are started again need not spend. Where there is no room, they spend it.
    """
    names = sorted(name for name in sys.modules if name.startswith(_LATE))
    partial = file.with_name(f"{file.name}.partial")
    with suppress(OSError):
        partial.write_text("\n".join(names))
        partial.rename(file)


def import_as_told(file: Path) -> bool:
    """Import what `tell_late_imports` has written; whether there was something."""
    try:
        names = file.read_text().split()
    except OSError:
        return False
    with quiet_collector():
        for name in names:
            # The file is a rank's, which may write what it likes.
            if name.startswith(_LATE):
                with suppress(ImportError):
                    importlib.import_module(name)
    return True

"""DeepSpeed's state and the generators' ↔ files in a folder of the rank's own."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kubedistill_trainer.checkpoint import rng
from kubedistill_trainer.checkpoint.errors import CheckpointFailed

_TAG = "state"
_SHARED_PREFIX = f"{_TAG}/mp_rank_"


@dataclass(frozen=True)
class Snapshot:
    """What a rank has to upload: files below `folder`, as relative paths."""

    folder: Path
    paths: list[str]
    generators: dict[str, JsonValue]

    @property
    def size_bytes(self) -> int:
        """On disk."""
        return sum((self.folder / path).stat().st_size for path in self.paths)


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise CheckpointFailed when the disk has less than `needed_bytes` (the last snapshot's size).

    Asked before a snapshot: a rank that fails inside one leaves its peers in a barrier.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise CheckpointFailed(
            f"{folder}: {free_bytes} bytes free, a snapshot takes {needed_bytes}; give the pods "
            "more ephemeral storage"
        )


def take(engine: Any, folder: Path, rank: int) -> Snapshot:
    """Write this rank's part of the engine's state into `folder`. Collective over all ranks.

    Under ZeRO the parts are: every rank its optimizer partition; rank 0 the module (stages 1 and
    2), or every rank its own part of it (stage 3).
    """
    state = folder / _TAG
    state.mkdir(parents=True)
    engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
    generators = rng.capture()
    (folder / _rng_path(rank)).write_text(json.dumps(generators))
    # DeepSpeed adds scripts for people; what is not ours to load is not ours to store.
    paths = sorted(f"{_TAG}/{file.name}" for file in state.glob("*.pt"))
    return Snapshot(folder, [_rng_path(rank), *paths], generators)


def is_shared(path: str) -> bool:
    """True for a file that rank 0 writes and every rank loads."""
    return path.startswith(_SHARED_PREFIX)


def load(engine: Any, folder: Path, rank: int) -> None:
    """Load what `take` wrote. Collective over all ranks; raises CheckpointFailed.

    DeepSpeed's files are pickles: call this only on files whose SHA-256 was checked against a
    COMMIT of our own log, never on anything that came from a user.
    """
    loaded, _ = engine.load_checkpoint(str(folder), tag=_TAG)
    if loaded is None:
        raise CheckpointFailed(f"{folder}: DeepSpeed found no state in it")
    rng.restore(json.loads((folder / _rng_path(rank)).read_text()))


def empty(folder: Path) -> Path:
    """`folder`, existing and empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _rng_path(rank: int) -> str:
    return f"rng-{rank:05d}.json"

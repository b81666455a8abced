"""DeepSpeed's state and the generators', taken from an engine and put back into one.

DeepSpeed hands its files to a checkpoint engine. Ours copies what they would hold (`staging`) and
leaves the writing to the upload, which runs beside training.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from kubedistill_trainer.checkpoint import rng
from kubedistill_trainer.checkpoint.errors import CheckpointFailed
from kubedistill_trainer.checkpoint.staged import Staged
from kubedistill_trainer.checkpoint.staging import HostMemory, Written, save_state

TAG = "state"
"""The folder of DeepSpeed's files."""
RNG_PREFIX = "rng-"


@dataclass(frozen=True)
class Snapshot:
    """What a rank has to upload."""

    files: list[Staged]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def on_disk_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files if file.on_disk)


def take(engine: Any, folder: Path, rank: int, memory: HostMemory) -> Snapshot:
    """This rank's part of the engine's state. Collective over all ranks.

    Under ZeRO the parts are: every rank its optimizer partition; rank 0 the module (stages 1 and
    2), or every rank its own part of it (stage 3). `folder` is emptied and takes what finds no room in
    memory. What goes wrong on this rank's disk or in its memory is raised after the collectives, so
    that a rank that fails leaves no peer waiting.
    """
    stage = _Stage(folder, memory)
    remove(folder)
    stage.makedirs(str(folder / TAG))
    usual, engine.checkpoint_engine = engine.checkpoint_engine, stage
    # A script for people, which DeepSpeed writes to the disk of rank 0 whether there is room or not.
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script
    if stage.error is not None:
        raise stage.error
    memory.settle()
    generators = rng.capture()
    text = json.dumps(generators).encode()
    files = sorted(stage.files, key=lambda file: file.path)
    return Snapshot([Staged(_rng_path(rank), len(text), lambda: io.BytesIO(text)), *files])


class _Stage(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """Where DeepSpeed saves to."""

    def __init__(self, folder: Path, memory: HostMemory) -> None:
        super().__init__()
        self.name = "kubedistill"
        self.files: list[Staged] = []
        self.error: Exception | None = None
        self._folder = folder
        self._memory = memory

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """A disk that has no room for a folder is told after the collectives too."""
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error = error

    def create(self, info: Any) -> None:
        """Nothing is begun by a name."""

    def save(self, state_dict: Any, path: str) -> None:
        """Keep a copy. An error waits until the peers are through (see `take`)."""
        if self.error is not None:
            return
        try:
            self.files.append(self._staged(state_dict, path))
        except Exception as error:
            self.error = error

    def load(self, path: str, map_location: Any = None) -> Any:
        """As DeepSpeed's own does: only for files of our own commits (see the module's `load`)."""
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: Any) -> bool:
        """A commit is the log's affair."""
        return True

    def _staged(self, state: Any, path: str) -> Staged:
        name = PurePath(path).relative_to(self._folder).as_posix()
        copied = self._memory.copy(name, state)
        if copied is not None:
            size = self._memory.size_of(name)
            return Staged(name, size, lambda: Written(lambda file: save_state(copied, file)))
        file = Path(path)
        try:
            save_state(state, file)
        except (OSError, RuntimeError) as error:  # torch's own writer says RuntimeError
            free = shutil.disk_usage(self._folder).free
            raise CheckpointFailed(
                f"{self._folder}: no room for a snapshot in memory, and {free} bytes free on disk "
                f"({error}); give the pods more memory or ephemeral storage"
            ) from error
        return Staged(name, file.stat().st_size, lambda: file.open("rb"), on_disk=True)


def load(engine: Any, folder: Path, rank: int) -> None:
    """Load what `take` wrote. Collective over all ranks; raises CheckpointFailed.

    DeepSpeed's files are pickles: call this only on files whose SHA-256 was checked against a
    COMMIT of our own log, never on anything that came from a user.
    """
    loaded, _ = engine.load_checkpoint(str(folder), tag=TAG)
    if loaded is None:
        raise CheckpointFailed(f"{folder}: DeepSpeed found no state in it")
    rng.restore(json.loads((folder / _rng_path(rank)).read_text()))


def empty(folder: Path) -> Path:
    """`folder`, existing and empty. Raises OSError."""
    remove(folder)
    folder.mkdir(parents=True)
    return folder


def remove(folder: Path) -> None:
    """No more of `folder` than cannot be removed."""
    shutil.rmtree(folder, ignore_errors=True)


def _rng_path(rank: int) -> str:
    return f"{RNG_PREFIX}{rank:05d}.json"

"""A commit of one number of ranks, loaded by another: through DeepSpeed's universal checkpoint.

See https://www.deepspeed.ai/tutorials/universal-checkpointing/. The conversion needs every rank's
shards, so one process of a node does it for all of its ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

from kubedistill_trainer.checkpoint import rng
from kubedistill_trainer.checkpoint.errors import CheckpointFailed
from kubedistill_trainer.checkpoint.snapshot import TAG

_SHARDS, _UNIVERSAL = "shards", "universal"


def shard_folder(folder: Path) -> Path:
    """Where the shards of all ranks have to be for `convert`."""
    return folder / _SHARDS


def convert(folder: Path) -> None:
    """Turn the shards below `folder` into a universal checkpoint beside them, and remove them.

    Raises CheckpointFailed when DeepSpeed cannot.
    """
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=str(shard_folder(folder) / TAG),
        output_folder=str(folder / _UNIVERSAL / TAG),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # What only Megatron's checkpoints have.
        inject_missing_state=True,
    )
    said = io.StringIO()  # it tells its steps, and standard output is for JSON
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ds_to_universal.main(arguments)
    except Exception as error:
        raise CheckpointFailed(
            f"{folder}: DeepSpeed cannot convert the checkpoint for another number of ranks "
            f"({type(error).__name__}: {error})"
        ) from error
    shutil.rmtree(shard_folder(folder))


def load(engine: Any, folder: Path, *, rank: int, step: int) -> None:
    """Load what `convert` made. Collective over all ranks; raises CheckpointFailed.

    The generators of another number of ranks say nothing: each rank's begin anew, by step and rank.
    """
    config = engine._config
    usual, config.load_universal_checkpoint = config.load_universal_checkpoint, True
    try:
        loaded, _ = engine.load_checkpoint(str(folder / _UNIVERSAL), tag=TAG)
    finally:
        config.load_universal_checkpoint = usual
    if loaded is None:
        raise CheckpointFailed(f"{folder}: DeepSpeed found no universal state in it")
    rng.seed(step, rank)

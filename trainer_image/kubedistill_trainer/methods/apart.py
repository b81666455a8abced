"""A model quantised or made sparse by a process apart.

llm-compressor does otherwise where it finds itself in a process group, as every rank is in one; and
what it needs of memory is free again when the process ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.pruning import Sparse
from kubedistill_api.quantization import Quantize

from kubedistill_trainer.compress.oneshot import Task
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.shrink import calibration_samples

_PROGRAM = "kubedistill_trainer.compress.oneshot"
_OF_A_GANG = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TAIL = 1000
"""Characters of what a failed process said that are told."""


def changed(
    context: Context,
    dataset: Dataset,
    source: Path,
    method: Quantize | Sparse,
    folder: Path,
    tick: Callable[[], None],
) -> None:
    """Write the model of the folder `source`, as `method` makes it, to `folder`, the tokenizer beside
    it. In one process of a gang.

    `tick` is called while it goes on; what it raises ends it. RunFailure where it fails.
    """
    part = dataset.packed.take(
        calibration_samples(dataset.split.training, method.calibration_sequences)
    )
    given = context.scratch / "calibration.npz"
    np.savez(given, tokens=part.tokens, positions=part.positions, labels=part.labels)
    training = context.run.spec.training
    task = Task(
        source=source,
        target=folder,
        calibration=given,
        precision=training.precision,
        batch_size=training.micro_batch_size,
        quantize=method if isinstance(method, Quantize) else None,
        sparse=method if isinstance(method, Sparse) else None,
    )
    told = context.scratch / "task.json"
    told.write_text(task.model_dump_json(by_alias=True))
    environment = {k: v for k, v in os.environ.items() if k not in _OF_A_GANG}
    said = context.scratch / "apart.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", _PROGRAM, str(told)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(process, tick)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        text = said.read_text(errors="replace")[-_TAIL:]
        code = ExitCode.OUT_OF_MEMORY if "OutOfMemoryError" in text else ExitCode.UNKNOWN
        raise RunFailure(
            code, f"the process that changes the model ended with {process.returncode}: {text}"
        )
    for name, body in dataset.tokenizer.files.items():
        (folder / name).write_bytes(body)


def _wait(process: subprocess.Popen[bytes], tick: Callable[[], None]) -> None:
    while True:
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            tick()
        else:
            return

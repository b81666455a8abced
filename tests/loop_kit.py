"""The training loop around an engine and a checkpointer that only keep account of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from kubedistill_api.training import Training
from kubedistill_trainer.checkpoint import CommitInfo
from kubedistill_trainer.checkpoint.results import Flight, Rejected, Restored
from kubedistill_trainer.data.order import Order, Part
from kubedistill_trainer.data.packing import pack
from kubedistill_trainer.exporter import ProgressBoard
from kubedistill_trainer.losses import LossParts
from kubedistill_trainer.methods.signal import NoTeacher
from kubedistill_trainer.methods.train import Loop


class Commits:
    """A checkpointer that keeps cursors only, as JSON."""

    def __init__(self) -> None:
        self.cursors: list[str] = []
        self.kept: list[int | None] = []
        self.loaded: list[int | None] = []
        self.damaged: int | None = None
        self.failures: list[Exception] = []
        """What the next saves end with, in order."""
        self.rejected: list[Rejected] = []
        """What the next restore passes over."""
        self.flight: Flight | None = None

    def start(self, engine: Any, step: int, cursor: Any, keep_step: int | None, then: Any) -> None:
        assert self.flight is None, "one save is in flight at a time"
        self.flight = Flight(step)
        if self.failures:
            self.flight.error = self.failures.pop(0)
        else:
            self.cursors.append(json.dumps(cursor, allow_nan=False))
            self.kept.append(keep_step)
            self.flight.info = CommitInfo("", step, "", 0, 0.0, 0.0, "")
            then(self.flight.info)
        self.flight.ended.set()

    def finish(self) -> CommitInfo | None:
        flight, self.flight = self.flight, None
        if flight is None:
            return None
        if flight.error is not None:
            raise flight.error
        return flight.info

    def restore(self, engine: Any, step: int | None = None) -> Any:
        self.loaded.append(step)
        if not self.cursors:
            return None
        cursors = [json.loads(cursor) for cursor in self.cursors]
        cursor = next((c for c in cursors if c["step"] == step != self.damaged), cursors[-1])
        rejected, self.rejected = self.rejected, []
        return Restored(cursor["step"], cursor, "", rejected)


class Engine:
    """Its loss is the mean sample id, so that it tells one step from another."""

    device = torch.device("cpu")
    optimizer = SimpleNamespace(param_groups=[{}])

    def __init__(self, sick: frozenset[int] = frozenset()) -> None:
        """`sick`: samples whose loss is no number."""
        self.sick = sick
        self.taken: list[int] = []
        """Samples in the order in which they were learnt from."""

    def train_micro_batch_size_per_gpu(self) -> int:
        return 1

    gradient_accumulation_steps = train_micro_batch_size_per_gpu

    def train(self, *loss: Any) -> None:
        """Nothing is learnt."""

    step = backward = get_global_grad_norm = train

    def __call__(self, tokens: Any, positions: Any, labels: Any, *rest: Any) -> Any:
        loss = tokens.double().mean()
        self.taken.append(int(loss))
        if int(loss) in self.sick:
            loss = loss * math.nan
        return LossParts(total=loss, soft=loss * math.nan, hard=loss)


class Clock:
    """Asks to stop once the engine has made so many steps; never for 0."""

    def __init__(self, after: int, engine: Engine) -> None:
        self._after = after
        self._engine = engine

    @property
    def asked(self) -> bool:
        return 0 < self._after <= len(self._engine.taken)

    def remaining_seconds(self) -> float:
        return 1e6

    def has_work(self) -> None:
        """It always has."""


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[None]:
    meeting = f"file://{tmp_path / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run_of(training: Training, interval: int) -> Any:
    """What the loop asks of a run spec."""
    spec = SimpleNamespace(
        training=training,
        checkpoint=SimpleNamespace(interval=interval),
        student=SimpleNamespace(config={}),
    )
    return SimpleNamespace(
        spec=spec,
        rendezvous=None,
        termination_grace_seconds=30,
        save_seconds=None,
    )


def loop(
    commits: Commits,
    stop_after: int = 0,
    heldout: Callable[[], float] | None = None,
    engine: Engine | None = None,
    rank: int = 0,
    world_size: int = 1,
    **training: Any,
) -> Loop:
    """Ten steps of a rank; `heldout` gives the perplexity whenever it is asked for."""
    fields = {"globalBatchSize": world_size, "learningRate": 0.1, **training}
    context = SimpleNamespace(
        run=run_of(Training.model_validate(fields), interval=4),
        world_size=world_size,
        rank=rank,
        mean_seconds_between_failures=None,
    )
    dataset = SimpleNamespace(
        total_steps=10,
        order=Order([Part(np.arange(6))], world_size, seed=0),
        packed=pack([np.full(3, i) for i in range(6)], 3),
    )

    def look(tick: Any) -> float:
        assert heldout is not None
        return heldout()

    engine = engine or Engine()
    # Namespaces stand for what the loop takes of a run.
    parts: list[Any] = [
        context, dataset, engine, NoTeacher(), commits, ProgressBoard(),
        Clock(stop_after, engine), None, look if heldout else None,
    ]  # fmt: skip
    return Loop(*parts)

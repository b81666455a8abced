"""The training loop of every method that trains, resumable at any commit."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.status import CheckpointStatus
from pydantic import JsonValue

from kubedistill_trainer import exporter
from kubedistill_trainer.checkpoint import Checkpointer, fits_grace
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.history import History
from kubedistill_trainer.methods.interruption import Interruption
from kubedistill_trainer.methods.overfitting import overfitting
from kubedistill_trainer.methods.schedule import learning_rate
from kubedistill_trainer.methods.signal import Signal
from kubedistill_trainer.methods.watch import Watch

_log = logging.getLogger(__name__)
Ids = npt.NDArray[np.int64]
_GRACE_MARGIN_SECONDS = 5.0
_INITIAL = "initialPerplexity"
_HISTORY = "history"
_WATCH = "heldOut"


@dataclass
class Timings:
    """Recent step and save times, in seconds."""

    steps: deque[float] = field(default_factory=lambda: deque(maxlen=200))
    saves: list[float] = field(default_factory=list)


class Losses(NamedTuple):
    """Mean losses a token of one step, over all ranks."""

    soft: float
    hard: float
    features: float
    total: float


class Loop:
    """Trains `engine` from wherever the newest good commit is to the last step."""

    def __init__(
        self,
        context: Context,
        dataset: Dataset,
        engine: Any,
        teacher: Signal,
        checkpointer: Checkpointer,
        board: exporter.ProgressBoard,
        interruption: Interruption,
        control_group: Any,
        heldout_perplexity: Callable[[], float] | None = None,
    ) -> None:
        """`heldout_perplexity` measures the student as it is; a collective over all ranks."""
        self._context = context
        self._dataset = dataset
        self._engine = engine
        self._teacher = teacher
        self._checkpointer = checkpointer
        self._board = board
        self._interruption = interruption
        self._control_group = control_group
        self._heldout_perplexity = heldout_perplexity
        self.initial_perplexity: float | None = None
        self.exported_step: int | None = None
        """The step whose weights the engine has at the end."""
        self.history = History()
        self.watch = Watch(context.run.spec.training.early_stopping)
        self._timings = Timings()
        self._committed_step = -1
        spec = context.run.spec
        self._training = spec.training
        self._per_rank = spec.training.global_batch_size // context.world_size
        self._micro = int(engine.train_micro_batch_size_per_gpu())

    def run(self) -> int:
        """Restore, train, commit the last step; the number of steps is returned.

        Where the held-out loss was best before the last step, the engine has that commit's weights.

        Raises RunFailure: GRACEFUL_CHECKPOINT or INTERRUPTED after SIGTERM, UNKNOWN when the loss
        stops being finite.
        """
        total = self._dataset.total_steps
        step = self._restore()
        if step == 0 and self._heldout_perplexity is not None and self._starts_with_weights:
            self.initial_perplexity = self._heldout_perplexity()
        self._board.update(phase="Training", total_steps=total, step=step)
        self._teacher.expect(self._micro_batches(step))
        self._engine.train()
        started, first = time.monotonic(), step
        while step < total and not self.watch.stopped:
            begun = time.monotonic()
            parts = self._step(step)
            step += 1
            asked, losses = self._agree(parts)
            self._timings.steps.append(time.monotonic() - begun)
            if not math.isfinite(losses.total):
                exporter.NONFINITE.inc()
                raise RunFailure(ExitCode.UNKNOWN, f"the loss of step {step} is {losses.total}")
            speed = (step - first) / (time.monotonic() - started)
            self.history.record(step, losses.soft, losses.hard, losses.total, self._rate(step - 1))
            self._report(step, total, losses, speed)
            if asked:
                self._stop(step)
            best = self.watch.due(step, total) and self._look(step)
            asked_for = self._context.run.spec.checkpoint.interval
            interval = 100 if asked_for == "Auto" else int(asked_for)
            if best or (step % interval == 0 and step < total):
                self._commit(step)
        if self._committed_step != step:
            self._commit(step)
        self._take_best(step)
        return step

    @property
    def _starts_with_weights(self) -> bool:
        # Random weights say nothing: there only what comes of them is worth a figure.
        return self._context.run.spec.student.config is None

    def _look(self, step: int) -> bool:
        """Measure the held-out loss; whether it is the best so far."""
        assert self._heldout_perplexity is not None
        perplexity = self._heldout_perplexity()
        self._engine.train()
        exporter.EVALUATION.labels("perplexity").set(perplexity)
        best = self.watch.record(step, math.log(perplexity))
        _log.info("held out", extra={"step": step, "perplexity": perplexity, "best": best})
        if found := overfitting(self.watch.looks, self.history.points, self.watch.min_delta):
            _log.warning("overfitting: %s", found.sentence(), extra={"step": step})
        return best

    def _take_best(self, step: int) -> None:
        """Load the commit with the least held-out loss, if that is not the one that is here."""
        best = self.watch.best_step
        if self.watch.stopped:
            self._board.update(step=step, total_steps=step)
        self.exported_step = step
        if best is None or best == step:
            return
        _log.info("going back to the best step", extra={"step": best, "from": step})
        restored = self._checkpointer.restore(self._engine, step=best)
        if restored is not None:
            self.exported_step = restored.step
        if self.exported_step != best:
            _log.warning(
                "the best step's commit is damaged: the newest good one is exported",
                extra={"best": best, "exported": self.exported_step},
            )

    def _restore(self) -> int:
        with exporter.CHECKPOINT_DURATION.labels("restore").time():
            restored = self._checkpointer.restore(self._engine)
        if restored is None:
            return 0
        _log.info("resumed", extra={"step": restored.step, "commit": restored.uri})
        self._board.update(
            resumed_from_step=restored.step,
            rejected_checkpoints=[str(rejected) for rejected in restored.rejected][:8],
        )
        self._committed_step = restored.step
        began = restored.cursor.get(_INITIAL)
        self.initial_perplexity = float(began) if isinstance(began, int | float) else None
        self.history = History.from_cursor(restored.cursor.get(_HISTORY))
        self.watch = Watch.from_cursor(self._training.early_stopping, restored.cursor.get(_WATCH))
        return int(restored.step)

    def _micro_batches(self, first_step: int) -> Iterator[Ids]:
        """This rank's sample ids from `first_step` on, a micro-batch at a time."""
        for step in range(first_step, self._dataset.total_steps):
            yield from self._micro_batches_of(self._dataset.order.batch(step))

    def _micro_batches_of(self, batch: Ids) -> Iterator[Ids]:
        mine = batch[self._context.rank * self._per_rank :][: self._per_rank]
        for start in range(0, self._per_rank, self._micro):
            yield mine[start : start + self._micro]

    def _step(self, step: int) -> torch.Tensor:
        """One optimizer step; this rank's share of its `Losses`, float64 [4]."""
        rate = self._rate(step)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        exporter.LEARNING_RATE.set(rate)
        batch = self._dataset.order.batch(step)
        # All ranks know all data, so the step's valid tokens need no communication.
        valid = self._dataset.packed.take(batch).valid_tokens
        sums = torch.zeros(len(Losses._fields), dtype=torch.float64)
        # DeepSpeed divides by the ranks and by the accumulation steps; the normaliser already
        # speaks of the whole step.
        scale = self._context.world_size * self._engine.gradient_accumulation_steps()
        for samples in self._micro_batches_of(batch):
            parts = self._forward(samples, float(max(1, valid)))
            self._engine.backward(parts.total * scale)
            self._engine.step()
            features = torch.zeros_like(parts.total) if parts.features is None else parts.features
            shares = (parts.soft, parts.hard, features, parts.total)
            sums += torch.stack([share.detach() for share in shares]).double().cpu()
            exporter.TOKENS.labels("student").inc(
                samples.size * self._dataset.packed.sequence_length
            )
        return sums

    def _rate(self, step: int) -> float:
        return learning_rate(step, self._dataset.total_steps, self._training)

    def _forward(self, samples: Ids, normalizer: float) -> Any:
        device = self._engine.device
        sequences = self._dataset.packed.take(samples)
        tokens = torch.from_numpy(sequences.tokens).to(device)
        positions = torch.from_numpy(sequences.positions).to(device)
        labels = torch.from_numpy(sequences.labels).to(device)
        with exporter.STEP_DURATION.labels("teacher").time():
            teacher = self._teacher.batch(samples, tokens, positions)
        return self._engine(tokens, positions, labels, teacher, normalizer)

    def _agree(self, sums: torch.Tensor) -> tuple[bool, Losses]:
        """One small all-reduce a step: was any rank asked to stop; the losses of all ranks."""
        message = torch.cat([torch.tensor([float(self._interruption.asked)]).double(), sums])
        dist.all_reduce(message, group=self._control_group)
        asked, *losses = message.tolist()
        return asked > 0, Losses(*losses)

    def _report(self, step: int, total: int, losses: Losses, speed: float) -> None:
        now = time.time()
        exporter.STEP.set(step)
        exporter.LAST_STEP.set(now)
        exporter.STEP_DURATION.labels("step").observe(self._timings.steps[-1])
        for component, value in losses._asdict().items():
            exporter.LOSS.labels(component).set(value)
        norm = self._engine.get_global_grad_norm()
        if norm is not None:
            exporter.GRADIENT_NORM.set(float(norm))
        batch_tokens = self._training.global_batch_size * self._dataset.packed.sequence_length
        self._board.update(
            step=step,
            loss=losses.total,
            last_step_time=now,
            tokens_per_second=speed * batch_tokens,
            estimated_remaining_seconds=(total - step) / speed if speed else None,
            step_seconds=max(self._timings.steps),
            teacher_stream=self._teacher.status(),
        )
        if step == 1 or step % 50 == 0 or step == total:
            _log.info("step", extra={"step": step, "of": total, "loss": round(losses.total, 4)})

    def _commit(self, step: int) -> None:
        with exporter.CHECKPOINT_DURATION.labels("save").time():
            cursor: dict[str, JsonValue] = {"step": step, _HISTORY: self.history.to_cursor()}
            # JSON knows no NaN.
            if self.initial_perplexity is not None and math.isfinite(self.initial_perplexity):
                cursor[_INITIAL] = self.initial_perplexity
            if self.watch.looks:
                cursor[_WATCH] = self.watch.to_cursor()
            info = self._checkpointer.save(
                self._engine, step=step, cursor=cursor, keep_step=self.watch.best_step
            )
        self._committed_step = step
        self._timings.saves.append(info.duration_seconds)
        exporter.LAST_COMMIT.set(time.time())
        self._board.update(
            checkpoint=CheckpointStatus(
                uri=info.uri, step=step, time=info.time, digest=info.digest
            ),
            save_seconds=max(self._timings.saves),
        )
        _log.info("committed", extra={"step": step, "seconds": round(info.duration_seconds, 2)})

    def _stop(self, step: int) -> None:
        """All ranks are here: commit when the grace allows, or start nothing."""
        remaining = torch.tensor([self._interruption.remaining_seconds()], dtype=torch.float64)
        dist.all_reduce(remaining, op=dist.ReduceOp.MIN, group=self._control_group)
        fits = fits_grace(
            list(self._timings.steps), self._timings.saves, remaining.item(), _GRACE_MARGIN_SECONDS
        )
        if self._committed_step == step:
            fits = True
        elif fits:
            self._commit(step)
        if not fits:
            raise RunFailure(
                ExitCode.INTERRUPTED,
                f"asked to stop after step {step} with {remaining.item():.0f} s of grace: "
                "too little to commit",
            )
        raise RunFailure(ExitCode.GRACEFUL_CHECKPOINT, f"asked to stop; committed step {step}")

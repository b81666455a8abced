"""The training loop of every method that trains, resumable at any commit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from kubedistill_api.exit_codes import ExitCode
from pydantic import JsonValue

from kubedistill_trainer import exporter
from kubedistill_trainer.checkpoint import Checkpointer, CheckpointError, fits_grace
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.agreement import Agreed, Losses, Word, agree, any_rank
from kubedistill_trainer.methods.gathering import gather_teacher
from kubedistill_trainer.methods.history import History
from kubedistill_trainer.methods.interruption import Interruption
from kubedistill_trainer.methods.overfitting import overfitting
from kubedistill_trainer.methods.pace import Pace
from kubedistill_trainer.methods.saving import GRACE_MARGIN_SECONDS, Saver
from kubedistill_trainer.methods.schedule import learning_rate
from kubedistill_trainer.methods.signal import Signal
from kubedistill_trainer.methods.straggler import StragglerWatch
from kubedistill_trainer.methods.watch import Watch
from kubedistill_trainer.store import StoreError

_log = logging.getLogger(__name__)
Ids = npt.NDArray[np.int64]
_INITIAL = "initialPerplexity"
_HISTORY = "history"
_WATCH = "heldOut"
_SKIPPED = "skipped"
_MOST_SKIPPED = 10


class _AskedToStop(Exception):
    """Raised on all ranks at once."""


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
        heldout_perplexity: Callable[[Tick], float] | None = None,
    ) -> None:
        """`heldout_perplexity` measures the student as it is; a collective over all ranks."""
        run = context.run
        nodes = run.rendezvous.nodes if run.rendezvous else 1
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
        self.watch = Watch(run.spec.training.early_stopping)
        self.skipped: list[int] = []
        """Steps (from 0) whose batch is left out, since their loss was no number."""
        self._saver = Saver(
            checkpointer,
            run.spec.checkpoint,
            board,
            grace_seconds=run.termination_grace_seconds,
            nodes=nodes,
            mtbf_seconds=context.mean_seconds_between_failures,
            known_save_seconds=context.run.save_seconds,
        )
        self._stragglers = StragglerWatch(max(1, context.world_size // nodes))
        self._training = run.spec.training
        self._per_rank = self._training.global_batch_size // context.world_size
        self._micro = int(engine.train_micro_batch_size_per_gpu())

    def run(self) -> int:
        """Restore, train, commit the last step; the number of steps is returned.

        Where the held-out loss was best before the last step, the engine has that commit's weights.

        Raises RunFailure: GRACEFUL_CHECKPOINT or INTERRUPTED after SIGTERM, NON_FINITE_LOSS when the
        loss stops being finite and that is not to be skipped.
        """
        total = self._dataset.total_steps
        step = self._restore()
        self._interruption.has_work()
        if step == 0 and self._heldout_perplexity is not None and self._starts_with_weights:
            self.initial_perplexity = self._held_out(step)
        self._board.update(phase="Training", total_steps=total, step=step)
        if step == 0 and self._training.on_non_finite_loss == "Skip":
            self._saver.save(self._engine, *self._state(step))  # there is something to go back to
        step = self._train(step, total)
        self._saver.settle()
        if self._saver.committed_step != step:
            self._saver.save(self._engine, *self._state(step))
        self._take_best(step)
        return step

    def _train(self, step: int, total: int) -> int:
        """From `step` on until the end, or until the held-out loss says stop; the step then."""
        self._teacher.expect(self._micro_batches(step))
        self._engine.train()
        self._make_up(step)
        pace, together = Pace(step), False
        while step < total and not self.watch.stopped:
            if step in self.skipped:
                step += 1
                pace.left_out()
                self._board.update(step=step)
                continue
            if not together and not self._gather_teacher(step):
                self._stop(step)
            begun = time.monotonic()
            agreed = self._agree(step, *self._step(step))
            seconds = time.monotonic() - begun
            together = not agreed.lacks_teacher
            if self._diverged(agreed.losses):
                step, together = self._go_back(step, agreed.losses), False
                pace.begin(step)
                continue
            step += 1
            self._saver.stepped(seconds)
            self._stragglers.record(seconds, agreed.own_seconds)
            losses = agreed.losses
            self.history.record(step, losses.soft, losses.hard, losses.total, self._rate(step - 1))
            self._report(step, total, losses, pace.speed(step), seconds)
            self._save_or_stop(step, total, agreed)
        return step

    def _save_or_stop(self, step: int, total: int, agreed: Agreed) -> None:
        """What follows a step: the same on all ranks."""
        if agreed.save_failed:
            self._saver.settle()
        if agreed.asked_to_stop:
            self._stop(step)
        best = self.watch.due(step, total) and self._look(step)
        if best or (agreed.save_is_due and step < total):
            self._saver.start(self._engine, *self._state(step))

    def _diverged(self, losses: Losses) -> bool:
        """Whether the loss or the gradient is no number: then the weights are worth nothing now."""
        norm = self._engine.get_global_grad_norm()
        return not math.isfinite(losses.total + (0.0 if norm is None else float(norm)))

    def _go_back(self, step: int, losses: Losses) -> int:
        """By policy: load the newest commit, and leave this step's batch out; its step."""
        exporter.NONFINITE.inc()
        found = f"the loss of step {step + 1:,} is {losses.total}"
        if math.isfinite(losses.total):
            found = f"the gradient of step {step + 1:,} is no number"
        if self._training.on_non_finite_loss == "Stop":
            raise RunFailure(
                ExitCode.NON_FINITE_LOSS,
                f"{found}; lower spec.training.learningRate, or set onNonFiniteLoss: Skip",
            )
        if len(self.skipped) == _MOST_SKIPPED:
            raise RunFailure(
                ExitCode.NON_FINITE_LOSS, f"{found}, after {_MOST_SKIPPED} steps that were left out"
            )
        skipped = [*self.skipped, step]
        self._saver.settle()
        back = self._restore(again=True)
        # The commit knows of fewer: what it does not know of was found since.
        self.skipped = skipped
        _log.warning("%s: its batch is left out", found, extra={"step": step + 1, "from": back})
        self._board.update(step=back, skipped_steps=[s + 1 for s in self.skipped])
        self._teacher.expect(self._micro_batches(back))
        self._engine.train()
        self._make_up(back)
        return back

    @property
    def _starts_with_weights(self) -> bool:
        # Random weights say nothing: there only what comes of them is worth a figure.
        return self._context.run.spec.student.config is None

    def _make_up(self, step: int) -> None:
        """Look now where the commit of this step was made by SIGTERM, before or in its own look.

        Else a resumed run would decide otherwise than one that never stopped.
        """
        trained = step > 0 and step - 1 not in self.skipped
        if trained and self.watch.due(step, self._dataset.total_steps):
            self._look(step)

    def _tick(self) -> None:
        """Between two sequences of a look, on all ranks: life, and whether one is to stop."""
        self._board.show_life()
        if any_rank(self._interruption.asked, self._control_group):
            raise _AskedToStop

    def _held_out(self, step: int) -> float:
        """Held-out perplexity after this step, or `_stop`."""
        assert self._heldout_perplexity is not None
        try:
            return self._heldout_perplexity(self._tick)
        except _AskedToStop:
            self._stop(step)

    def _look(self, step: int) -> bool:
        """Measure the held-out loss; whether it is the best so far."""
        perplexity = self._held_out(step)
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
            self._saver.tell_rejected(restored)
            self.exported_step = restored.step
        if self.exported_step != best:
            _log.warning(
                "the best step's commit is damaged: the newest good one is exported",
                extra={"best": best, "exported": self.exported_step},
            )

    def _restore(self, *, again: bool = False) -> int:
        """Load the newest good commit; its step. `again`: not at the attempt's start."""
        with exporter.CHECKPOINT_DURATION.labels("restore").time():
            restored = self._checkpointer.restore(self._engine)
        if restored is None:
            return 0
        _log.info("resumed", extra={"step": restored.step, "commit": restored.uri})
        if not again:
            self._board.update(resumed_from_step=restored.step)
        self._saver.tell_rejected(restored)
        self._saver.committed_step = restored.step
        cursor = restored.cursor
        began, skipped = cursor.get(_INITIAL), cursor.get(_SKIPPED)
        self.initial_perplexity = float(began) if isinstance(began, int | float) else None
        self.history = History.from_cursor(cursor.get(_HISTORY))
        self.watch = Watch.from_cursor(self._training.early_stopping, cursor.get(_WATCH))
        steps = skipped if isinstance(skipped, list) else []
        self.skipped = [step for step in steps if isinstance(step, int)]
        skipped_steps = [step + 1 for step in self.skipped]
        self._board.update(skipped_steps=skipped_steps, loss=self.history.latest_loss)
        return int(restored.step)

    def _micro_batches(self, first_step: int) -> Iterator[Ids]:
        """This rank's sample ids from `first_step` on, a micro-batch at a time."""
        for step in range(first_step, self._dataset.total_steps):
            if step not in self.skipped:
                yield from self._micro_batches_of(step)

    def _mine(self, step: int) -> Ids:
        """This rank's sample ids of a step; none where there is no such step."""
        if step >= self._dataset.total_steps:
            return np.empty(0, np.int64)
        return self._dataset.order.batch(step)[self._context.rank * self._per_rank :][
            : self._per_rank
        ]

    def _gather_teacher(self, step: int) -> bool:
        """Collective: wait until all ranks can make this step; False when one is asked to stop."""
        return gather_teacher(
            self._teacher,
            self._mine(step),
            self._control_group,
            asked=lambda: self._interruption.asked,
            alive=lambda: self._board.update(last_step_time=time.time()),
        )

    def _micro_batches_of(self, step: int) -> Iterator[Ids]:
        mine = self._mine(step)
        for start in range(0, self._per_rank, self._micro):
            yield mine[start : start + self._micro]

    def _step(self, step: int) -> tuple[torch.Tensor, float]:
        """One optimizer step; this rank's share of its `Losses`, float64 [4], and its own seconds.

        Its own are those until the first micro-batch's loss is there: from then on ranks wait for
        each other. (Under ZeRO-3 they do within a forward pass too.)
        """
        rate = self._rate(step)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        exporter.LEARNING_RATE.set(rate)
        # All ranks know all data, so the step's valid tokens need no communication.
        valid = self._dataset.packed.take(self._dataset.order.batch(step)).valid_tokens
        sums = torch.zeros(len(Losses._fields), dtype=torch.float64)
        # DeepSpeed divides by the ranks and by the accumulation steps; the normaliser already
        # speaks of the whole step.
        scale = self._context.world_size * self._engine.gradient_accumulation_steps()
        begun, own_seconds = time.monotonic(), 0.0
        for samples in self._micro_batches_of(step):
            parts = self._forward(samples, float(max(1, valid)))
            features = torch.zeros_like(parts.total) if parts.features is None else parts.features
            shares = (parts.soft, parts.hard, features, parts.total)
            # To the host, which waits for a GPU: so the time is the forward pass's.
            sums += torch.stack([share.detach() for share in shares]).double().cpu()
            own_seconds = own_seconds or time.monotonic() - begun
            self._engine.backward(parts.total * scale)
            self._engine.step()
            exporter.TOKENS.labels("student").inc(
                samples.size * self._dataset.packed.sequence_length
            )
        return sums, own_seconds

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

    def _agree(self, step: int, sums: torch.Tensor, own_seconds: float) -> Agreed:
        word = Word(
            asked_to_stop=self._interruption.asked,
            save_is_due=self._saver.due(step + 1),
            save_failed=self._saver.failed,
            lacks_teacher=not self._teacher.there(self._mine(step + 1)),
            own_seconds=own_seconds,
            losses=sums,
        )
        return agree(word, self._context.rank, self._context.world_size, self._control_group)

    def _report(self, step: int, total: int, losses: Losses, speed: float, seconds: float) -> None:
        now = time.time()
        exporter.STEP.set(step)
        exporter.LAST_STEP.set(now)
        exporter.STEP_DURATION.labels("step").observe(seconds)
        for component, value in losses._asdict().items():
            exporter.LOSS.labels(component).set(value)
        norm = self._engine.get_global_grad_norm()
        if norm is not None:
            exporter.GRADIENT_NORM.set(float(norm))
        batch_tokens = self._training.global_batch_size * self._dataset.packed.sequence_length
        self._board.update(
            step=step,
            loss=self.history.latest_loss,
            last_step_time=now,
            tokens_per_second=speed * batch_tokens,
            estimated_remaining_seconds=(total - step) / speed if speed else None,
            step_seconds=self._saver.longest_step,
            teacher_stream=self._teacher.status(),
            straggler=self._stragglers.sentence,
        )
        if step == 1 or step % 50 == 0 or step == total:
            _log.info("step", extra={"step": step, "of": total, "loss": round(losses.total, 4)})

    def _state(self, step: int) -> tuple[int, dict[str, JsonValue], int | None]:
        """The step, what a commit of it says beside the engine's state, and the commit to keep."""
        cursor: dict[str, JsonValue] = {"step": step, _HISTORY: self.history.to_cursor()}
        # JSON knows no NaN.
        if self.initial_perplexity is not None and math.isfinite(self.initial_perplexity):
            cursor[_INITIAL] = self.initial_perplexity
        if self.watch.looks:
            cursor[_WATCH] = self.watch.to_cursor()
        if self.skipped:
            cursor[_SKIPPED] = [*self.skipped]
        return step, cursor, self.watch.best_step

    def _stop(self, step: int) -> NoReturn:
        """All ranks are here: commit when the grace allows, or start nothing.

        A save that is in flight is waited for as long as the grace lasts: `Interruption` ends the
        process in time.
        """
        try:
            self._saver.settle(last=True)
        except (CheckpointError, StoreError) as error:
            raise RunFailure(
                ExitCode.INTERRUPTED, f"asked to stop after step {step}; a save failed: {error}"
            ) from error
        remaining = torch.tensor([self._interruption.remaining_seconds()], dtype=torch.float64)
        saves = self._saver.saves
        # The ranks' own measures differ a little.
        mine = fits_grace([], saves, remaining.item(), GRACE_MARGIN_SECONDS)
        answer = torch.tensor([float(mine), remaining.item()], dtype=torch.float64)
        dist.all_reduce(answer, op=dist.ReduceOp.MIN, group=self._control_group)
        fits, left = answer.tolist()
        if self._saver.committed_step != step:
            if not fits:
                committed = self._saver.committed_step
                there = (
                    f"step {committed} is committed" if committed >= 0 else "nothing is committed"
                )
                raise RunFailure(
                    ExitCode.INTERRUPTED,
                    f"asked to stop after step {step} with {left:.0f} s of grace: too little to "
                    f"commit; {there}",
                )
            self._saver.save(self._engine, *self._state(step))
        raise RunFailure(ExitCode.GRACEFUL_CHECKPOINT, f"asked to stop; committed step {step}")

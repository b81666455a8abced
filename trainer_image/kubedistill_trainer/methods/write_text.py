"""The teacher writers of `signal: Responses` and `ChainOfThought`: answers of one partition each."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import Outcome
from kubedistill_api.status import TeacherStreamStatus

from kubedistill_trainer import exporter
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.conversation import Prompt
from kubedistill_trainer.data.sources import read_prompts
from kubedistill_trainer.failures import RunFailure, refuse
from kubedistill_trainer.imports import quiet_collector
from kubedistill_trainer.methods.stream_report import StreamReporter
from kubedistill_trainer.store import StoreError
from kubedistill_trainer.teacher.endpoint import EndpointAnswerer
from kubedistill_trainer.teacher.learn import status_of
from kubedistill_trainer.teacher.manifest import publish_manifest
from kubedistill_trainer.teacher.partition_log import TextShard
from kubedistill_trainer.teacher.tab import Tab
from kubedistill_trainer.teacher.text import Answerer, TextAnswer, TextRequest
from kubedistill_trainer.teacher.text_manifest import TextManifest
from kubedistill_trainer.teacher.text_mend import mend_text
from kubedistill_trainer.teacher.text_request import generation_of, request_of, text_identity
from kubedistill_trainer.teacher.text_view import StreamView
from kubedistill_trainer.teacher.text_writer import TextWriter

_log = logging.getLogger(__name__)
_LOOK_SECONDS = 5.0
"""Between two looks at what the other partitions have committed."""
OpenTeacher = Callable[[TextManifest], Answerer]


def run_text_teacher(
    context: Context,
    board: exporter.ProgressBoard,
    open_teacher: OpenTeacher,
    afterwards: Callable[[_Desk], None] = lambda desk: None,
) -> Outcome:
    """Have this pod's partition of the prompts answered. `open_teacher` is called where there is
    something to ask; `afterwards` when it is answered."""
    spec = context.run.spec
    if spec.teacher is None or spec.distill is None:
        raise refuse("spec.teacher", "nothing", "a teacher pod needs a teacher")
    board.update(phase="Generating")
    prompts = read_prompts(spec.data, context.open_store)
    identity = text_identity(context.run, prompts, context.open_store)
    replicas = spec.teacher.workers.replicas
    manifest = publish_manifest(
        context.storage, TextManifest(identity=identity, partitions=replicas, prompts=len(prompts))
    )
    desk = _Desk(context, board, manifest, prompts, open_teacher)
    try:
        # A stream that another job laid out in more partitions is written by as many as there are.
        for partition in range(context.partition, manifest.partitions, replicas):
            desk.write(partition)
        afterwards(desk)
    finally:
        desk.close()
    desk.report.now(complete=True)
    return Outcome(reason="Completed", message="answers written", progress=board.report)


def run_endpoint_teacher(context: Context, board: exporter.ProgressBoard) -> Outcome:
    """The same, by the server of spec.teacher.endpoint."""
    spec = context.run.spec

    def open_endpoint(manifest: TextManifest) -> Answerer:
        endpoint = spec.teacher.endpoint if spec.teacher else None
        if endpoint is None:
            raise refuse("spec.teacher", "no endpoint", "a teacher pod needs a teacher")
        view = StreamView(context.storage, manifest)
        view.refresh()
        answered = view.totals.answers > view.totals.refused
        return EndpointAnswerer(endpoint, generation_of(spec), answered=answered)

    return run_text_teacher(context, board, open_endpoint, _measure_server)


def _measure_server(desk: _Desk) -> None:
    """By whoever ends the stream, when all that it costs is known: no figure is paid for with what
    an answer needs."""
    if desk.ended:
        with quiet_collector():
            from kubedistill_trainer.evaluation.teacher import measure_server

        measure_server(desk.context, None, desk.open_tab(), desk.report.tick)


class _Desk:
    """Where prompts are handed out and answers taken in."""

    def __init__(
        self,
        context: Context,
        board: exporter.ProgressBoard,
        manifest: TextManifest,
        prompts: Sequence[Prompt],
        open_teacher: OpenTeacher,
    ) -> None:
        self.context = context
        self._manifest = manifest
        self._prompts = prompts
        self._open_teacher = open_teacher
        self._teacher: Answerer | None = None
        endpoint = context.run.spec.teacher.endpoint if context.run.spec.teacher else None
        self._price = endpoint.price if endpoint else None
        self._max_cost = endpoint.max_cost if endpoint else None
        self._view = StreamView(context.storage, manifest)
        self._looked = float("-inf")
        self._look(repairs=True)
        self.report = StreamReporter(board, self._status)

    def write(self, partition: int) -> None:
        """Answer all of a partition, and again what was damaged of it."""
        if mend_text(self.context.storage, self._manifest, partition, self._asked_again):
            self._look(repairs=True)
        writer = TextWriter(self.context.storage, self._manifest, partition, pause=self._pause)
        if writer.ended:
            return
        try:
            while wanted := self._in_order(writer.missing()):
                self._ask(writer, wanted)
                writer.commit()
                if writer.lost:
                    writer.stand_by()
            writer.end()
        except BaseException:
            # Also when asked to stop: what was answered is paid for.
            with contextlib.suppress(StoreError):
                writer.commit_all()
                self._look()
                self.report.now()
            raise
        self._look()
        _log.info("partition written", extra={"partition": partition, "answers": writer.committed})

    @property
    def ended(self) -> bool:
        """Whether all partitions are written."""
        self._look()
        return self._view.ended

    def open_tab(self) -> Tab:
        """An account for what is asked beside the stream, of what it leaves of the limit."""
        self._look(repairs=True)
        left = None
        if self._max_cost is not None and self._price is not None:
            left = self._max_cost - self._view.totals.cost(self._price)
        return Tab(self._view.stream, uuid.uuid4().hex, self._price, left)

    def close(self) -> None:
        if self._teacher is not None:
            self._teacher.close()

    def _ask(self, writer: TextWriter, wanted: Sequence[int]) -> None:
        """Ask for `wanted` and take what comes, until all are answered, another writer is ahead, or
        the money is spent. RunFailure (COST_LIMIT) in the last case."""
        before, spent = writer.committed, False

        def handed_out() -> Iterator[TextRequest]:
            nonlocal spent
            for number in wanted:
                spent = spent or self._spent(writer.pending)
                if writer.lost or spent:
                    return
                yield request_of(self._manifest, self._prompts, number)

        taken = 0
        for request, answer in self._answers(handed_out()):
            writer.add(request.prompt * self._manifest.identity.samples + request.sample, answer)
            taken += 1
            self._check_counted(answer)
            if writer.committed != before:
                before = writer.committed
                self._look()
            self.report.tick()
        writer.commit()
        self._look()
        if writer.lost:
            return
        if spent and next(writer.missing(), None) is not None:
            raise self._too_expensive()
        if not taken:
            raise RuntimeError(f"the teacher gave none of {len(wanted)} answers, and no reason")

    def _check_counted(self, answer: TextAnswer) -> None:
        """A limit on what nobody counts is none."""
        said = answer.text or answer.reasoning
        counted = answer.prompt_tokens and (answer.answer_tokens or not said)
        if self._max_cost is None or answer.refusal or counted:
            return
        raise refuse(
            "spec.teacher.endpoint.maxCost",
            "a server whose answers do not say how many tokens they took (`usage`)",
            "leave maxCost out, or have the server count",
        )

    def _answers(self, requests: Iterator[TextRequest]) -> Iterator[tuple[TextRequest, TextAnswer]]:
        if self._teacher is None:
            self._teacher = self._open_teacher(self._manifest)
        for request, answer in self._teacher.answers(requests):
            exporter.TOKENS.labels("teacher").inc(answer.answer_tokens)
            yield request, answer

    def _asked_again(self, numbers: Sequence[int]) -> dict[int, TextAnswer]:
        """Answers for a shard that was damaged. RunFailure (COST_LIMIT) where they are too dear."""
        if self._spent(TextShard()):
            raise self._too_expensive()
        requests = (request_of(self._manifest, self._prompts, n) for n in self._in_order(numbers))
        samples = self._manifest.identity.samples
        return {r.prompt * samples + r.sample: answer for r, answer in self._answers(requests)}

    def _in_order(self, numbers: Iterator[int] | Sequence[int]) -> list[int]:
        """Prompts of like length together: a batch takes as long as its longest."""
        samples = self._manifest.identity.samples

        def length(number: int) -> int:
            return sum(len(turn.content) for turn in self._prompts[number // samples].messages)

        return sorted(numbers, key=lambda number: (length(number), number))

    def _spent(self, pending: TextShard) -> bool:
        """Whether all that was paid for this stream, by whomever, is as much as may be; `pending` is
        not committed yet."""
        if self._max_cost is None or self._price is None:
            return False
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._look()
        paid = self._view.totals.with_pending(pending)
        return paid.cost(self._price) >= self._max_cost

    def _too_expensive(self) -> RunFailure:
        totals, price = self._view.totals, self._price
        assert price is not None
        return RunFailure(
            ExitCode.COST_LIMIT,
            f"{totals.cost(price):.4g} is spent, of at most {self._max_cost:g} by "
            f"spec.teacher.endpoint.maxCost: {totals.answers:,} of {self._manifest.requests:,} "
            f"answers are there and kept in {self._view.stream.uri}; raise maxCost to go on behind "
            "them, or ask for less",
        )

    def _look(self, *, repairs: bool = False) -> None:
        self._view.refresh()
        if repairs:
            self._view.refresh_repairs()
        self._looked = time.monotonic()

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)
        self.report.tick()

    def _status(self, complete: bool) -> TeacherStreamStatus:
        if time.monotonic() - self._looked > _LOOK_SECONDS or complete:
            self._look(repairs=complete)
        done = complete and self._view.ended
        return status_of(self._view, self.context.run.spec, complete=done)

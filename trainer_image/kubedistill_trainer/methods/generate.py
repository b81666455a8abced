"""The teacher writers: one partition of the data each, resumed at its last committed shard."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from kubedistill_api.quantity import to_bytes
from kubedistill_api.runspec import Outcome
from kubedistill_api.status import PayloadProbe, TeacherStreamStatus

from kubedistill_trainer import exporter
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset, load_dataset
from kubedistill_trainer.evaluation.teacher import measure_teacher
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.losses.types import FORWARD_KL
from kubedistill_trainer.methods import sharding
from kubedistill_trainer.methods.objective import divergence_of
from kubedistill_trainer.methods.probe import probe
from kubedistill_trainer.methods.signal import final_hidden, softcap_of, softcapped
from kubedistill_trainer.models.folder import download, read_config
from kubedistill_trainer.models.load import dtype_of, load_model
from kubedistill_trainer.teacher.auto import (
    Question,
    label,
    publish_answer,
    table,
)
from kubedistill_trainer.teacher.budget import Budget
from kubedistill_trainer.teacher.digest import teacher_digest
from kubedistill_trainer.teacher.head import publish_head
from kubedistill_trainer.teacher.manifest import Manifest, StreamIdentity, publish_manifest
from kubedistill_trainer.teacher.mend import mend
from kubedistill_trainer.teacher.metrics import STREAM_HELD
from kubedistill_trainer.teacher.payload import (
    Hidden,
    TeacherOutputs,
    sampled_of_logits,
    sparse_of_logits,
)
from kubedistill_trainer.teacher.payload_spec import HiddenSpec, SampledSpec
from kubedistill_trainer.teacher.request import resolved, stream_request
from kubedistill_trainer.teacher.stream_writer import StreamWriter, WriterSettings

_log = logging.getLogger(__name__)
_FOLDER = "teacher"
_FIRST_SHARD_BYTES = 1 << 20
_REPORT_SECONDS = 2.0
_SEED_STRIDE = 1 << 32  # more than a stream has samples


def run_teacher(context: Context, board: exporter.ProgressBoard, group: Any = None) -> Outcome:
    """Write this pod's partition of the stream.

    With a `group`, the teacher is split over its processes (`sharding.py`).
    """
    spec, model_source = context.run.spec, context.run.teacher_model
    if spec.teacher is None or spec.distill is None or model_source is None:
        raise refuse("spec.teacher", "nothing", "a teacher pod needs a teacher")
    board.update(phase="Generating")
    store = context.open_store(model_source.uri)
    dataset = load_dataset(context.run, context.open_store)
    request = stream_request(
        spec,
        dataset,
        teacher_digest(model_source, store),
        read_config(store, "spec.teacher"),
    )
    found = resolved(request, context.storage)
    folder = context.scratch / _FOLDER
    download(store, folder, "spec.teacher", model_source.digest)
    model = _model(context, group)
    if found is None and isinstance(request, Question):
        _measure(context, model, dataset, request)
        found = resolved(request, context.storage)
    assert found is not None
    identity, rows = found
    if rows:
        chosen = label(identity.payloads[0])
        _log.info("payload chosen: %s; measured on a part of the data:\n%s", chosen, table(rows))
    head = None
    if identity.payloads[0].kind == "Hidden":
        head = publish_head(
            context.storage, identity, model.get_output_embeddings().weight, context.scratch
        )
    manifest = publish_manifest(
        context.storage,
        Manifest(
            identity=identity,
            partitions=spec.teacher.workers.replicas,
            samples=len(dataset.packed),
            head_sha256=head,
            probe=rows,
        ),
    )
    uri = context.storage.child(identity.address).uri
    report = _Reporter(board, identity, uri, rows)
    # A stream that another job laid out in more partitions is written by as many as there are.
    for partition in range(context.partition, manifest.partitions, spec.teacher.workers.replicas):
        _write_partition(context, manifest, partition, dataset, model, report)
    report.now(complete=True)
    measure_teacher(context, model, dataset.tokenizer, report.tick, split=group is not None)
    return Outcome(reason="Completed", message="stream written", progress=board.report)


def follow_teacher(context: Context, group: Any) -> Outcome:
    """Compute a part of the teacher, as the first process asks, until that is done."""
    sharding.follow(_model(context, group), group)
    return Outcome(reason="Completed", message="the first process writes the stream")


def _model(context: Context, group: Any) -> Any:
    """The teacher, or this process's part of it."""
    folder, dtype = context.scratch / _FOLDER, dtype_of(context.run.spec.training.precision)
    if group is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return load_model(folder, "spec.teacher", dtype).to(device).eval()
    model = sharding.load_shard(folder, dtype, group).eval()
    if context.rank == 0:
        sharding.lead(model, group)
    return model


def _measure(context: Context, model: Any, dataset: Dataset, question: Question) -> None:
    """Measure the payloads and publish what was found."""
    objective = context.run.spec.distill.objective if context.run.spec.distill else None
    divergence = divergence_of(objective) if objective else FORWARD_KL
    _log.info("measuring payloads")
    publish_answer(context.storage, question, probe(model, dataset.packed, question, divergence))


class _Reporter:
    """Keeps /progress current; counts what this process committed."""

    def __init__(
        self,
        board: exporter.ProgressBoard,
        identity: StreamIdentity,
        uri: str,
        rows: Sequence[PayloadProbe],
    ) -> None:
        self._board = board
        self._identity = identity
        self._probe = list(rows)
        self._uri = uri
        self._last = 0.0
        self._writers: list[StreamWriter] = []
        self._held = False

    def hold(self, held: bool) -> None:
        """Say at once whether the byte budget holds this process back."""
        self._held = held
        STREAM_HELD.set(held)
        self.now()

    def follow(self, writer: StreamWriter) -> None:
        """Count what this writer has committed, too."""
        self._writers.append(writer)

    def tick(self) -> None:
        if time.monotonic() - self._last > _REPORT_SECONDS:
            self.now()

    def now(self, complete: bool = False) -> None:
        self._last = time.monotonic()
        status = TeacherStreamStatus(
            uri=self._uri,
            digest=self._identity.digest(),
            payload=self._identity.payloads[0].kind,
            bytes=sum(writer.committed_bytes() for writer in self._writers),
            tokens=sum(writer.committed() for writer in self._writers)
            * self._identity.sequence_length,
            complete=complete,
            held=self._held,
            probe=self._probe,
        )
        self._board.update(teacher_stream=status, last_step_time=time.time())


def _write_partition(
    context: Context,
    manifest: Manifest,
    partition: int,
    dataset: Any,
    model: Any,
    report: _Reporter,
) -> None:
    settings = WriterSettings(first_shard_bytes=_FIRST_SHARD_BYTES)
    scratch = context.scratch / f"partition-{partition}"
    scratch.mkdir(parents=True, exist_ok=True)

    def pause(seconds: float) -> None:
        time.sleep(seconds)
        report.tick()

    def made(sample: int) -> tuple[Any, TeacherOutputs]:
        sequence = dataset.packed.take([sample])
        outputs = teacher_outputs(model, manifest.identity, sequence, sample)
        exporter.TOKENS.labels("teacher").inc(manifest.identity.sequence_length)
        return dataset.packed.tokens[sample], outputs

    repair = partial(mend, context.storage, manifest, partition, scratch=scratch, produce=made)

    def idle(seconds: float) -> None:
        pause(seconds)
        repair()

    # First: with the stream's figures the student is started, and what it misses is to be there.
    repair()
    with StreamWriter(
        context.storage,
        manifest,
        partition,
        scratch=scratch,
        settings=settings,
        before_upload=_budget(context, manifest, partition, report, idle),
        pause=pause,
    ) as writer:
        report.follow(writer)
        committed = writer.committed()
        for sample in writer.samples():
            writer.write(sample, *made(sample))
            if writer.committed() > committed:
                committed = writer.committed()
                repair()
            report.tick()
        writer.end()
        _log.info(
            "partition written", extra={"partition": partition, "samples": writer.committed()}
        )


def _budget(
    context: Context,
    manifest: Manifest,
    partition: int,
    report: _Reporter,
    pause: Callable[[float], object],
) -> Callable[[int, int, int], None] | None:
    """What holds the writer back, if the spec has a budget."""
    workers = context.run.spec.teacher.workers if context.run.spec.teacher else None
    budget_bytes = to_bytes(workers.byte_budget) if workers else None
    if workers is None or budget_bytes is None:
        return None
    budget = Budget(
        context.storage.child(manifest.identity.address),
        partition,
        mine=range(context.partition, manifest.partitions, workers.replicas),
        share_bytes=budget_bytes / manifest.partitions,
        pause=pause,
        tell=report.hold,
    )
    return budget.hold


@torch.inference_mode()
def teacher_outputs(
    model: Any, identity: StreamIdentity, sequence: Any, sample: int
) -> TeacherOutputs:
    """What the stream keeps of one sequence [1, L], the data's `sample`-th."""
    device = model.get_output_embeddings().weight.device
    tokens = torch.from_numpy(sequence.tokens).to(device)
    positions = torch.from_numpy(sequence.positions).to(device)
    hidden = final_hidden(model.get_decoder(), tokens, positions)[0]
    payload = identity.payloads[0]
    if isinstance(payload, HiddenSpec):
        return TeacherOutputs(hidden=Hidden(hidden.float().cpu()))
    logits = softcapped(model.get_output_embeddings()(hidden).float(), softcap_of(model)).cpu()
    visible = identity.visible_vocab_size
    if isinstance(payload, SampledSpec):
        # By sample, so that a writer that comes back draws the same.
        generator = torch.Generator().manual_seed(identity.seed * _SEED_STRIDE + sample)
        drawn = sampled_of_logits(
            logits, payload.draws, payload.temperature, generator, visible_vocab_size=visible
        )
        return TeacherOutputs(sampled=drawn)
    sparse = sparse_of_logits(logits, payload.k, payload.temperatures, visible_vocab_size=visible)
    return TeacherOutputs(sparse=sparse)

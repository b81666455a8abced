"""The teacher writers: one partition of the data each, resumed at its last committed shard."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from kubedistill_api.quantity import to_bytes
from kubedistill_api.runspec import Outcome
from kubedistill_api.status import PayloadProbe, TeacherStreamStatus
from kubedistill_api.teacher import Endpoint

from kubedistill_trainer import exporter
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset, load_dataset
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.evaluation.teacher import measure_server, measure_teacher
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.losses.types import FORWARD_KL
from kubedistill_trainer.methods import sharding
from kubedistill_trainer.methods.objective import divergence_of
from kubedistill_trainer.methods.probe import probe
from kubedistill_trainer.methods.request import job_request
from kubedistill_trainer.methods.stream_report import StreamReporter
from kubedistill_trainer.models.decoder import final_hidden, softcap_of, softcapped
from kubedistill_trainer.models.folder import download
from kubedistill_trainer.models.load import dtype_of, load_model
from kubedistill_trainer.teacher.auto import (
    Question,
    label,
    publish_answer,
    table,
)
from kubedistill_trainer.teacher.budget import Budget
from kubedistill_trainer.teacher.endpoint_client import Client
from kubedistill_trainer.teacher.endpoint_probe import find_way
from kubedistill_trainer.teacher.endpoint_scores import ScoredData, Scorer, longest_piece
from kubedistill_trainer.teacher.head import publish_head
from kubedistill_trainer.teacher.manifest import Manifest, Origin, StreamIdentity, publish_manifest
from kubedistill_trainer.teacher.mend import mend
from kubedistill_trainer.teacher.metrics import STREAM_HELD
from kubedistill_trainer.teacher.payload import (
    Hidden,
    Sparse,
    TeacherOutputs,
    sampled_of_logits,
    sparse_of_logits,
)
from kubedistill_trainer.teacher.payload_spec import HiddenSpec, SampledSpec, SparseSpec
from kubedistill_trainer.teacher.request import resolved
from kubedistill_trainer.teacher.stream_writer import StreamWriter, WriterSettings
from kubedistill_trainer.teacher.tab import Tab

_log = logging.getLogger(__name__)
_FOLDER = "teacher"
_FIRST_SHARD_BYTES = 1 << 20
_SEED_STRIDE = 1 << 32  # more than a stream has samples


def run_teacher(context: Context, board: exporter.ProgressBoard, group: Any = None) -> Outcome:
    """Write this pod's partition of the stream.

    With a `group`, the teacher is split over its processes (`sharding.py`).
    """
    spec, model_source = context.run.spec, context.run.teacher_model
    if spec.teacher is None or spec.distill is None:
        raise refuse("spec.teacher", "nothing", "a teacher pod needs a teacher")
    board.update(phase="Generating")
    dataset = load_dataset(context.run, context.open_store)
    request, _ = job_request(context.run, dataset, context.open_store)
    if spec.teacher.endpoint is not None and isinstance(request, StreamIdentity):
        return _score(context, board, dataset, request, spec.teacher.endpoint)
    assert model_source is not None
    found = resolved(request, context.storage)
    store, folder = context.open_store(model_source.uri), context.scratch / _FOLDER
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
    manifest = Manifest(
        identity=identity,
        partitions=spec.teacher.workers.replicas,
        samples=len(dataset.packed),
        head_sha256=head,
        probe=rows,
    )
    measure = partial(measure_teacher, context, lambda: model, dataset.tokenizer)
    return _write(context, board, dataset, manifest, _Model(model, dataset, identity), measure)


def _score(
    context: Context,
    board: exporter.ProgressBoard,
    dataset: Dataset,
    identity: StreamIdentity,
    endpoint: Endpoint,
) -> Outcome:
    """Write this pod's partition of what a server's model finds likeliest."""
    payload, teacher = identity.payloads[0], context.run.spec.teacher
    assert teacher is not None and isinstance(payload, SparseSpec)
    with contextlib.closing(Client(endpoint)) as client:
        longest = longest_piece(dataset.packed)
        way = find_way(client, payload.k, dataset.tokenizer, longest)
        manifest = Manifest(
            identity=identity,
            partitions=teacher.workers.replicas,
            samples=len(dataset.packed),
            origin=Origin(url=client.url, model=client.model, way=way),
        )
        scorer = Scorer(client, payload.k, dataset.tokenizer.vocab_size, way)
        ahead = endpoint.concurrency
        data = ScoredData(scorer, dataset.packed, payload.k, dataset.tokenizer.vocab_size, ahead)
        return _write(
            context,
            board,
            dataset,
            manifest,
            _Server(data),
            partial(_measure_server, context, dataset),
        )


def _measure_server(context: Context, dataset: Dataset, tick: Tick) -> None:
    if context.partition == 0:
        # No cost is counted for a stream of scores, and so there is no limit to keep.
        measure_server(context, dataset.tokenizer, Tab(), tick)


def _write(
    context: Context,
    board: exporter.ProgressBoard,
    dataset: Dataset,
    wanted: Manifest,
    source: _Source,
    afterwards: Callable[[Tick], None] | None = None,
) -> Outcome:
    """Write what `source` says into this pod's partition of the stream; then `afterwards`."""
    manifest = publish_manifest(context.storage, wanted)
    uri = context.storage.child(manifest.identity.address).uri
    report = _Reporter(board, manifest.identity, uri, wanted.probe)
    # A stream that another job laid out in more partitions is written by as many as there are.
    for partition in range(context.partition, manifest.partitions, wanted.partitions):
        _write_partition(context, manifest, partition, dataset, source, report)
    report.now(complete=True)
    if afterwards is not None:
        afterwards(report.tick)
    return Outcome(reason="Completed", message="stream written", progress=board.report)


class _Source(Protocol):
    """A teacher as its writer sees it."""

    def expect(self, samples: range) -> None:
        """Samples that are written next, in this order, as far as anybody knows."""

    def outputs(self, sample: int) -> TeacherOutputs:
        """What the stream keeps of the data's `sample`-th sequence."""


class _Model:
    """A model in this process."""

    def __init__(self, model: Any, dataset: Dataset, identity: StreamIdentity) -> None:
        self._model = model
        self._dataset = dataset
        self._identity = identity

    def expect(self, samples: range) -> None:
        """It is asked for one sequence at a time."""

    def outputs(self, sample: int) -> TeacherOutputs:
        sequence = self._dataset.packed.take([sample])
        return teacher_outputs(self._model, self._identity, sequence, sample)


class _Server:
    """A model behind a server."""

    def __init__(self, data: ScoredData) -> None:
        self._data = data

    def expect(self, samples: range) -> None:
        self._data.expect(samples)

    def outputs(self, sample: int) -> TeacherOutputs:
        found = self._data.scores(sample)
        ids, log_probs = torch.from_numpy(found.ids), torch.from_numpy(found.log_probs)
        return TeacherOutputs(sparse=Sparse(ids, log_probs, torch.zeros(len(ids), 1), (1.0,)))


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


class _Reporter(StreamReporter):
    """Counts what this process committed."""

    def __init__(
        self,
        board: exporter.ProgressBoard,
        identity: StreamIdentity,
        uri: str,
        rows: Sequence[PayloadProbe],
    ) -> None:
        super().__init__(board, self._of_writers)
        self._identity = identity
        self._probe = list(rows)
        self._uri = uri
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

    def _of_writers(self, complete: bool) -> TeacherStreamStatus:
        return TeacherStreamStatus(
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


def _write_partition(
    context: Context,
    manifest: Manifest,
    partition: int,
    dataset: Dataset,
    source: _Source,
    report: _Reporter,
) -> None:
    settings = WriterSettings(first_shard_bytes=_FIRST_SHARD_BYTES)
    scratch = context.scratch / f"partition-{partition}"
    scratch.mkdir(parents=True, exist_ok=True)

    def pause(seconds: float) -> None:
        time.sleep(seconds)
        report.tick()

    def made(sample: int) -> tuple[Any, TeacherOutputs]:
        outputs = source.outputs(sample)
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
            source.expect(range(sample, manifest.samples, manifest.partitions))
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

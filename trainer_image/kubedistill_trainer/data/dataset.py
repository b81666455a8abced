"""The packed data of a run: the same in the preflight, in every teacher writer and every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kubedistill_api.data import DataSource
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import RunSpec

from kubedistill_trainer.data.order import Order, Split, split
from kubedistill_trainer.data.packing import Packed, encode, pack, packing_digest
from kubedistill_trainer.data.sources import OpenStore, read_corpus
from kubedistill_trainer.data.tokenizer import TextTokenizer, load_tokenizer


@dataclass(frozen=True)
class Dataset:
    """Packed sequences with split and order, and the digests that pin them.

    `sources`: a name for each of `spec.data.sources`, which `packed.sources` points to.
    """

    packed: Packed
    split: Split
    order: Order
    total_steps: int
    digest: str
    packing_digest: str
    tokenizer: TextTokenizer
    sources: tuple[str, ...]


def tokenizer_source(run: RunSpec) -> tuple[str, str]:
    """(field, URI) of the folder whose tokenizer is used: data's, the teacher's, the student's."""
    if run.spec.data.tokenizer is not None:
        return "spec.data.tokenizer.uri", run.spec.data.tokenizer.uri
    if run.teacher_model is not None:
        return "spec.teacher", run.teacher_model.uri
    if run.student_model is not None:
        return "spec.student", run.student_model.uri
    raise ValueError("the schema lets no job through that has no tokenizer")


def load_dataset(run: RunSpec, open_store: OpenStore) -> Dataset:
    """Read, tokenise, pack, split. InputsRefused for whatever a person has to mend."""
    spec = run.spec
    field, uri = tokenizer_source(run)
    tokenizer = load_tokenizer(open_store(uri), field)
    corpus = read_corpus(spec.data, open_store)
    documents = encode(corpus.documents, tokenizer.tokenizer, tokenizer.end_of_text)
    packed = pack(documents, spec.data.sequence_length, corpus.sources)
    parts = split(len(packed), spec.data.holdout, spec.training.seed)
    order = Order(parts.training, spec.training.global_batch_size, spec.training.seed)
    return Dataset(
        packed=packed,
        split=parts,
        order=order,
        total_steps=order.total_steps(spec.training.epochs, spec.training.max_steps),
        digest=corpus.digest,
        packing_digest=packing_digest(
            tokenizer.digest, spec.data.sequence_length, tokenizer.end_of_text
        ),
        tokenizer=tokenizer,
        sources=source_names(spec.data.sources),
    )


def source_names(sources: Sequence[DataSource]) -> tuple[str, ...]:
    """Address of each file; with the field where one file is read for several."""
    uris = [source.uri for source in sources]
    return tuple(s.uri if uris.count(s.uri) == 1 else f"{s.uri}#{s.text_field}" for s in sources)


def ranks_of(spec: DistillationJobSpec) -> int:
    """Ranks of the gang: one a GPU, or one a pod on the CPU."""
    return spec.workers.nodes * max(1, spec.workers.gpus_per_node)

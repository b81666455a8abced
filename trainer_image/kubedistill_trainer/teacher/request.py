"""The identity of the stream that a job asks for: the same in preflight, writers and students."""

from __future__ import annotations

from typing import Any

from kubedistill_api.job import Teacher

from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.teacher.manifest import StreamIdentity
from kubedistill_trainer.teacher.payload_spec import (
    HiddenSpec,
    PayloadSpec,
    SampledSpec,
    SparseSpec,
)


def stream_identity(
    teacher: Teacher,
    temperature: float,
    dataset: Dataset,
    teacher_digest: str,
    teacher_config: dict[str, Any],
) -> StreamIdentity:
    """What the stream is made from. InputsRefused when the teacher does not know all ids."""
    visible = dataset.tokenizer.vocab_size
    rows = int(teacher_config["vocab_size"])
    if rows < visible:
        raise refuse(
            "spec.data.tokenizer",
            f"{visible} ids",
            f"the teacher knows {rows}: use the teacher's own tokenizer",
        )
    return StreamIdentity(
        teacher_digest=teacher_digest,
        tokenizer_digest=dataset.tokenizer.digest,
        teacher_vocab_size=rows,
        visible_vocab_size=visible,
        hidden_size=int(teacher_config["hidden_size"]),
        dataset_digest=dataset.digest,
        packing_digest=dataset.packing_digest,
        sequence_length=dataset.packed.sequence_length,
        payloads=(_payload(teacher, temperature, visible),),
    )


def _payload(teacher: Teacher, temperature: float, vocab_size: int) -> PayloadSpec:
    if teacher.payload == "Hidden":
        return HiddenSpec()
    if teacher.payload == "Sampled":
        return SampledSpec(draws=teacher.draws, temperature=temperature)
    grid = tuple(sorted({1.0, temperature}))
    return SparseSpec(k=min(teacher.top_k, vocab_size), temperatures=grid)

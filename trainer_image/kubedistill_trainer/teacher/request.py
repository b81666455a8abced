"""The stream that a job asks for: the same in preflight, writers and students."""

from __future__ import annotations

from typing import Any, NamedTuple

from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.status import PayloadProbe
from kubedistill_api.teacher import Teacher

from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.store.client import Store
from kubedistill_trainer.teacher.auto import Question, read_answer, refusal
from kubedistill_trainer.teacher.manifest import StreamIdentity
from kubedistill_trainer.teacher.payload_spec import (
    HiddenSpec,
    PayloadSpec,
    SampledSpec,
    SparseSpec,
)


class Resolution(NamedTuple):
    """A stream, and the table behind the choice of its payload: the question's, not the stream's,
    which may have been there before. Empty where the payload was named."""

    identity: StreamIdentity
    rows: tuple[PayloadProbe, ...]


def stream_request(
    spec: DistillationJobSpec,
    dataset: Dataset,
    teacher_digest: str,
    teacher_config: dict[str, Any],
) -> StreamIdentity | Question:
    """The stream's identity, or with `payload: Auto` what has to be measured before it is known.

    InputsRefused when the teacher does not know all ids.
    """
    teacher, objective = spec.teacher, spec.distill.objective if spec.distill else None
    if teacher is None or objective is None:
        raise refuse("spec.teacher", "nothing", "a stream needs a teacher and an objective")
    payload = _payload(teacher, objective.temperature, dataset.tokenizer)
    identity = identity_of(payload, dataset, teacher_digest, teacher_config)
    if teacher.payload != "Auto":
        return identity
    return Question(
        identity=identity,
        temperatures=_temperatures(teacher, objective.temperature),
        objective=objective.model_dump_json(include={"loss", "mix", "beta"}),
        top_k=teacher.top_k,
        max_gradient_error=teacher.max_gradient_error,
    )


def resolved(request: StreamIdentity | Question, store: Store) -> Resolution | None:
    """The stream to use, None while nobody has measured. `store` is rooted at the storage URI.

    InputsRefused, with the table, when no payload fits.
    """
    if isinstance(request, StreamIdentity):
        return Resolution(request, ())
    answer = read_answer(store, request)
    if answer is None:
        return None
    if answer.chosen is None:
        raise refusal(request, answer)
    return Resolution(request.with_payload(answer.chosen), answer.rows)


def score_width(teacher: Teacher, tokenizer: TextTokenizer) -> int:
    """Log-probabilities a token that a Sparse stream holds."""
    return min(teacher.top_k, tokenizer.vocab_size)


def identity_of(
    payload: PayloadSpec,
    dataset: Dataset,
    teacher_digest: str,
    teacher_config: dict[str, Any],
) -> StreamIdentity:
    """The stream of a payload over all of a dataset. InputsRefused when the teacher does not know
    all ids."""
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
        payloads=(payload,),
    )


def _temperatures(teacher: Teacher, temperature: float) -> tuple[float, ...]:
    """All that the stream has to serve, rising: the objective's, and those of jobs that share it."""
    return tuple(sorted({temperature, *teacher.temperatures}))


def _payload(teacher: Teacher, temperature: float, tokenizer: TextTokenizer) -> PayloadSpec:
    if teacher.payload in ("Hidden", "Auto"):
        return HiddenSpec()
    if teacher.payload == "Sampled":
        return SampledSpec(draws=teacher.draws, temperature=temperature)
    grid = tuple(sorted({1.0, *_temperatures(teacher, temperature)}))
    return SparseSpec(k=score_width(teacher, tokenizer), temperatures=grid)

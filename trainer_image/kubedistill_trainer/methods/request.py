"""What a job asks of its teacher, wherever that is: the same in preflight, writers and students."""

from __future__ import annotations

from typing import Any, NamedTuple

from kubedistill_api.runspec import RunSpec

from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.data.sources import OpenStore
from kubedistill_trainer.failures import refuse
from kubedistill_trainer.models.folder import read_config
from kubedistill_trainer.teacher.auto import Question
from kubedistill_trainer.teacher.digest import endpoint_digest, teacher_digest
from kubedistill_trainer.teacher.manifest import StreamIdentity
from kubedistill_trainer.teacher.request import stream_request


class StreamRequest(NamedTuple):
    """What a job asks of its teacher, with the keys of the teacher's config.json that matter."""

    request: StreamIdentity | Question
    config: dict[str, Any]


def job_request(run: RunSpec, dataset: Dataset, open_store: OpenStore) -> StreamRequest:
    """The stream that a job of Logits asks of its teacher: a model in a store, or an endpoint."""
    teacher, model = run.spec.teacher, run.teacher_model
    if teacher is not None and teacher.endpoint is not None:
        config = {"vocab_size": dataset.tokenizer.vocab_size, "hidden_size": 0}
        digest = endpoint_digest(teacher.endpoint)
        return StreamRequest(stream_request(run.spec, dataset, digest, config), config)
    if model is None:
        raise refuse("spec.teacher", "nothing", "a stream needs a teacher")
    store = open_store(model.uri)
    config = read_config(store, "spec.teacher")
    digest = teacher_digest(model, store)
    return StreamRequest(stream_request(run.spec, dataset, digest, config), config)

"""The stream that a job asks for: trials that share a teacher ask for one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from kubedistill_api.job import DistillationJobSpec
from kubedistill_trainer.teacher.auto import Question
from kubedistill_trainer.teacher.manifest import StreamIdentity
from kubedistill_trainer.teacher.payload_spec import SparseSpec
from kubedistill_trainer.teacher.request import stream_request
from test_plan_kit import spec

CONFIG = {"vocab_size": 64, "hidden_size": 32}


def asked(temperature: float, payload: str, *shared: float) -> StreamIdentity | Question:
    teacher = {"model": {"uri": "s3://models/big"}, "payload": payload, "temperatures": shared}
    changes: dict[str, Any] = {
        "teacher": teacher,
        "distill": {"objective": {"temperature": temperature}},
    }
    dataset: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(vocab_size=60, digest="t"),
        digest="d",
        packing_digest="p",
        packed=SimpleNamespace(sequence_length=8),
    )
    whole = DistillationJobSpec.model_validate(spec(**changes))
    return stream_request(whole, dataset, "teacher", CONFIG)


@pytest.mark.parametrize("payload", ["Hidden", "Sparse", "Auto"])
def test_trials_of_a_sweep_ask_for_one_stream(payload: str) -> None:
    first, *others = [asked(t, payload, 2, 4, 8) for t in (4, 2, 8)]
    assert all(other == first for other in others)


def test_a_sparse_stream_serves_all_temperatures_and_one() -> None:
    found = asked(4, "Sparse", 8, 2)
    assert isinstance(found, StreamIdentity)
    [payload] = found.payloads
    assert isinstance(payload, SparseSpec) and payload.temperatures == (1, 2, 4, 8)


def test_by_default_it_serves_the_objectives_own() -> None:
    assert asked(4, "Sparse") == asked(4, "Sparse", 4) != asked(2, "Sparse")
    question = asked(4, "Auto")
    assert isinstance(question, Question) and question.temperatures == (4,)


def test_auto_measures_every_temperature_that_is_served() -> None:
    question = asked(4, "Auto", 8, 2)
    assert isinstance(question, Question) and question.temperatures == (2, 4, 8)
    assert all(
        payload.temperatures == (1, 2, 4, 8)
        for payload in question.candidates()
        if isinstance(payload, SparseSpec)
    )

"""What the CRDs' schema and rules refuse, on a real API server."""

from __future__ import annotations

from typing import Any

import pytest
from operator_kit import Bench, job

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(600)]

ASKED = {"uri": "s3://data/x.jsonl", "origin": "Teacher", "promptField": "q"}
SCORED: dict[str, Any] = {
    "model": None,
    "fromJob": None,
    "endpoint": {"url": "http://x/v1", "model": "m"},
    "payload": "Sparse",
}
TOKENIZED = {"sources": [{"uri": "s3://data/x.jsonl"}], "tokenizer": {"uri": "s3://models/t"}}
SMALLER: dict[str, Any] = {"structured": {"ffn": 0.5}}
OWN: dict[str, Any] = {
    "distill": None,
    "student": {"fromTeacher": None, "model": {"uri": "s3://models/own"}},
}
"""Instead of the job's: a model that is there, and no method."""
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("unknown-field", {"nonsense": 1}, "nonsense"),
    ("two-methods", {"fineTune": {}}, "exactly one method"),
    ("no-teacher", {"teacher": None}, "needs a `teacher`"),
    ("two-changes", {"distill": None, "prune": SMALLER, "quantize": {}}, "exactly one method"),
    (
        "pruned-config",
        {"distill": None, "prune": SMALLER},
        "without training the student is a model that is there",
    ),
    (
        "both-prunings",
        OWN | {"prune": SMALLER | {"unstructured": {"sparsity": 0.5}}},
        "give either",
    ),
    (
        "nothing-kept",
        OWN | {"prune": {"structured": {}}},
        "name what is kept: one or more of layers",
    ),
    ("one-head", OWN | {"prune": {"structured": {"heads": 1}}}, "`heads` is a share below 1, or a"),
    ("half-a-layer", OWN | {"prune": {"structured": {"layers": 1.5}}}, "or a whole number"),
    ("no-share", OWN | {"prune": {"unstructured": {}}}, "give `sparsity` with `pattern: Any`"),
    (
        "too-much-said",
        OWN | {"prune": {"unstructured": {"pattern": "2:4", "sparsity": 0.4}}},
        "2:4 is half of all weights",
    ),
    ("awq-of-8", OWN | {"quantize": {"scheme": "W8A16", "algorithm": "AWQ"}}, "AWQ is for weights"),
    (
        "groups-of-8",
        OWN | {"quantize": {"scheme": "W8A8", "groupSize": 64}},
        "leave `groupSize` out",
    ),
    ("in-two", OWN | {"quantize": {}, "workers": {"nodes": 2}}, "`quantize` runs in one process"),
    (
        "compared-with-text",
        OWN | {"evaluate": {}, "teacher": SCORED},
        "without `distill` the teacher is what the student is compared with",
    ),
    ("itself", {"teacher": {"fromJob": {"name": "itself"}}}, "is this job itself"),
    ("cold", {"distill": {"objective": {"temperature": 0}}}, "temperature"),
    (
        "string-rate",
        {"training": {"learningRate": "1e-5"}},
        'spec.training.learningRate: Invalid value: "1e-5": spec.training.learningRate in body '
        "should match '^a number without quotes, such as 2.0e-5$'",
    ),
    ("cold-rate", {"training": {"learningRate": 0}}, "should be greater than 0"),
    ("x" * 51, {}, "at most 50 characters"),
    (
        "inner-layers",
        {"distill": {"objective": {"features": [{}]}}},
        "write `teacher.delivery: Online`, or leave features out",
    ),
    ("one-layer", {"distill": {"objective": {"features": [{"studentLayer": 1}]}}}, "give both"),
    ("unmixed", {"distill": {"objective": {"loss": "Mix"}}}, "give `mix` with `loss: Mix`"),
    (
        "nothing-mixed",
        {"distill": {"objective": {"loss": "Mix", "mix": {}}}},
        "give at least one of forwardKL, reverseKL and jsd",
    ),
    (
        "no-tokenizer",
        {
            "distill": {"signal": "Responses"},
            "student": {"config": {"model_type": "llama"}},
            "data": {"sources": [ASKED]},
        },
        "a student by `config` needs `data.tokenizer",
    ),
    ("no-bound", {"gates": [{"metric": "ece"}]}, "a gate needs a bound: give `min` or `max`"),
    ("no-room", {"gates": [{"metric": "ece", "min": 2, "max": 1}]}, "`min` is above `max`"),
    (
        "quoted-bound",
        {"gates": [{"metric": "ece", "max": "0.1"}]},
        'max: got "string", expected "number"',
    ),
    ("no-data", {"data": {"sources": []}}, "sources"),
    ("no-region", {"storage": {"uri": "s3://runs/x", "region": "\x16+í"}}, "spec.storage.region"),
    ("all-digits", {"storage": {"uri": "s3://runs/x", "region": "123"}}, "spec.storage.region"),
    (
        "nothing-learnt",
        {"distill": {"objective": {"softWeight": 0}}},
        "nothing of the teacher is learnt",
    ),
    ("nobody-asks", {"distill": {"signal": "Responses"}}, "need a source with `origin: Teacher`"),
    ("asked-idly", {"data": {"sources": [ASKED]}}, "need a source with `origin: Teacher`"),
    (
        "text-online",
        {
            "distill": {"signal": "Responses"},
            "teacher": {"delivery": "Online"},
            "data": {"sources": [ASKED]},
        },
        "write `teacher.delivery: Stream`",
    ),
    (
        "no-prompts",
        {"data": {"sources": [{"uri": "s3://data/x.jsonl", "origin": "Teacher"}]}},
        "give `promptField` or `messagesField`",
    ),
    (
        "endpoint-logits",
        {
            "teacher": {
                "model": None,
                "fromJob": None,
                "endpoint": {"url": "http://x/v1", "model": "m"},
            }
        },
        "an endpoint gives text, or the likeliest tokens",
    ),
    (
        "endpoint-warm",
        {
            "teacher": {**SCORED, "temperatures": [1]},
            "distill": {"objective": {"temperature": 2}},
            "data": TOKENIZED,
        },
        "write `distill.objective.temperature: 1`",
    ),
    (
        "endpoint-warm-trials",
        {
            "teacher": {**SCORED, "temperatures": [1, 2]},
            "distill": {"objective": {"temperature": 1}},
            "data": TOKENIZED,
        },
        "no other in `teacher.temperatures`",
    ),
    (
        "endpoint-ids",
        {"teacher": SCORED, "distill": {"objective": {"temperature": 1}}},
        "give `data.tokenizer",
    ),
    (
        "endpoint-costs",
        {
            "teacher": {**SCORED, "endpoint": {**SCORED["endpoint"], "maxCost": 5}},
            "distill": {"objective": {"temperature": 1}},
            "data": TOKENIZED,
        },
        "`maxCost` counts text only",
    ),
    (
        "two-teachers",
        {
            "teacher": {
                "model": {"uri": "s3://models/t"},
                "endpoint": {"url": "http://x/v1", "model": "m"},
            }
        },
        "give exactly one teacher",
    ),
    ("idle-generation", {"distill": {"generation": {}}}, "is for `signal: Responses`"),
    (
        "lonely-sample",
        {
            "distill": {"signal": "ChainOfThought", "chainOfThought": {"minAgreement": 0.5}},
            "data": {"sources": [ASKED]},
        },
        "samples can agree only where there are several",
    ),
    (
        "short-and-long",
        {
            "distill": {
                "signal": "ChainOfThought",
                "chainOfThought": {"minReasoningTokens": 50, "maxReasoningTokens": 10},
            },
            "data": {"sources": [ASKED]},
        },
        "`minReasoningTokens` is at most `maxReasoningTokens`",
    ),
    (
        "no-room-to-think",
        {
            "distill": {
                "signal": "ChainOfThought",
                "generation": {"maxTokens": 16},
                "chainOfThought": {"minReasoningTokens": 17},
            },
            "data": {"sources": [ASKED]},
        },
        "`minReasoningTokens` is at most `generation.maxTokens`",
    ),
    (
        "little-room",
        {
            "distill": {"signal": "ChainOfThought", "chainOfThought": {"minReasoningTokens": 513}},
            "data": {"sources": [ASKED]},
        },
        "`minReasoningTokens` is at most `generation.maxTokens`",
    ),
]


@pytest.mark.parametrize(("name", "change", "words"), BAD, ids=[b[0][:16] for b in BAD])
def test_the_api_server_refuses(
    bench: Bench, name: str, change: dict[str, Any], words: str
) -> None:
    answer = bench.apply(job(name, **change), check=False)
    assert words in answer
    assert "created" not in answer

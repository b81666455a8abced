"""Whose outputs are learnt, and how they come to the student."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kubedistill_api.base import ApiModel, cel, rules
from kubedistill_api.references import JobReference, ModelSource, Preserved, SecretReference

MAX_TEMPERATURES = 16
Temperature = Annotated[float, Field(gt=0, le=100, description="A temperature T.")]


class Price(ApiModel):
    """What a server asks for, to count the cost of a run."""

    input_per_million: float = Field(
        0.0, ge=0, le=1_000_000, description="Price of a million tokens of prompts."
    )
    output_per_million: float = Field(
        0.0, ge=0, le=1_000_000, description="Price of a million tokens of answers."
    )


class Endpoint(ApiModel):
    """A server of OpenAI's chat-completions API: vLLM, SGLang, a vendor's."""

    model_config = rules(
        [
            cel(
                "!has(self.maxCost) || has(self.price)",
                "a cost is counted by `price` only: give `price` beside `maxCost`",
                ".maxCost",
            )
        ]
    )
    url: str = Field(
        pattern=r"^https?://[^\s?#]+$",
        max_length=1024,
        description="Base URL up to and with the version, such as http://vllm:8000/v1.",
    )
    model: str = Field(min_length=1, max_length=256, description="Name of the model at the server.")
    secret_ref: SecretReference | None = Field(
        None, description="Secret with API_KEY; without it no key is sent."
    )
    concurrency: int = Field(
        8, ge=1, le=1024, description="Requests that a teacher's pod has open at once."
    )
    max_retries: int = Field(
        8, ge=0, le=100, description="Further tries of a request that failed for a while."
    )
    timeout_seconds: int = Field(
        120, ge=1, le=86_400, description="Seconds without a byte after which a request has failed."
    )
    price: Price | None = Field(None, description="Prices, to count the cost.")
    max_cost: float | None = Field(
        None, gt=0, description="Cost at which no more is asked for, and the job fails."
    )


class TeacherWorkers(ApiModel):
    """The teacher's own pods, for `delivery: Stream`: independent writers of parts of the data."""

    replicas: int = Field(1, ge=1, le=256, description="Writers; each takes a part of the data.")
    gpus_per_replica: int = Field(
        1,
        ge=0,
        le=16,
        description="GPUs of a writer, over which the teacher's layers are split; 0 runs on the CPU. "
        "Writers that ask an endpoint get none.",
    )
    byte_budget: str | None = Field(
        None,
        max_length=32,
        pattern=r"^[0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$",
        description="How far the writers may be ahead of the student, such as 50Gi: they wait when "
        "more is committed and not read. By default they write on: a stream is kept and read again.",
    )
    template: Preserved = Field(
        {}, description="Pod template merged over the operator's, as for `workers.template`."
    )


class Teacher(ApiModel):
    """The model whose outputs are learnt: exactly one of `model`, `fromJob` and `endpoint`."""

    model_config = rules(
        [
            cel(
                "[has(self.model), has(self.fromJob), has(self.endpoint)].filter(x, x).size() == 1",
                "give exactly one teacher: `model: {uri: s3://…}`, `fromJob: {name: …}` or "
                "`endpoint: {url: …, model: …}`",
            ),
            cel(
                # Of a default `{}` the rule is asked before the defaults within it.
                "!has(self.payload) || self.payload != 'Sampled' || !has(self.temperatures) || "
                "size(self.temperatures) < 2",
                "draws are made at one temperature: write payload Hidden, Sparse or Auto to serve "
                "several",
                ".temperatures",
            ),
        ]
    )
    model: ModelSource | None = Field(None, description="A model folder in S3.")
    from_job: JobReference | None = Field(
        None, description="The model of another job; waits for it."
    )
    endpoint: Endpoint | None = Field(
        None,
        description="A server that is asked: for text, or for Logits with payload Sparse at T = 1.",
    )
    delivery: Literal["Online", "Stream"] = Field(
        "Stream",
        description="Online: the teacher runs inside the student's pods. "
        "Stream: it runs once in pods of its own and writes a stream to S3.",
    )
    payload: Literal["Auto", "Sparse", "Sampled", "Hidden"] = Field(
        "Hidden",
        description="What a stream holds a token. Hidden: final hidden state, exact at every T. "
        "Sparse: the topK log-probabilities and the mass of the rest, for low T. "
        "Sampled: random draws at the objective's T, unbiased, for much text at T = 1. "
        "Auto: measures Sparse and Hidden on a part of the data, and takes the smallest within "
        "maxGradientError.",
    )
    max_gradient_error: float = Field(
        0.05,
        gt=0,
        le=1,
        description="For Auto: greatest error of the logits' gradient, relative to the exact one.",
    )
    top_k: int = Field(100, ge=1, le=1024, description="Log-probabilities a token, for Sparse.")
    draws: int = Field(50, ge=1, le=1024, description="Random draws a token, for Sampled.")
    temperatures: list[Temperature] = Field(
        [],
        max_length=MAX_TEMPERATURES,
        description="Temperatures that a stream serves beside the objective's. Jobs that differ in "
        "their temperature alone share one stream when each lists all of them; a chain does so for "
        "the trials of a sweep.",
    )
    workers: TeacherWorkers = Field(TeacherWorkers(), description="The teacher's own pods.")

"""A stage in several trials: what is swept over, how the best is chosen, what came of each."""

from __future__ import annotations

from pydantic import Field

from kubedistill_api.base import ApiModel, cel, rules
from kubedistill_api.metrics import METRICS, Goal
from kubedistill_api.status import Metric
from kubedistill_api.teacher import MAX_TEMPERATURES, Temperature


class Select(ApiModel):
    """How the best trial is found."""

    metric: str = Field(
        "perplexity", min_length=1, max_length=64, description="A name in the jobs' status.metrics."
    )
    goal: Goal | None = Field(
        None, description="Minimize or Maximize; by default whichever is better for the metric."
    )

    @property
    def direction(self) -> Goal:
        """The goal, or else the metric's own."""
        return self.goal or METRICS.get(self.metric) or "Minimize"


class Sweep(ApiModel):
    """One trial a temperature, all from one teacher stream; the best trial is the stage's."""

    model_config = rules(
        [
            cel(
                "self.temperature.all(a, self.temperature.exists_one(b, b == a))",
                "a temperature is listed twice: name each once",
                ".temperature",
            )
        ]
    )
    temperature: list[Temperature] = Field(
        min_length=1,
        max_length=MAX_TEMPERATURES,
        description="Values of distill.objective.temperature, in the order in which they are tried.",
    )
    select: Select = Field(Select(), description="How the best trial is found.")
    parallelism: int = Field(
        1,
        ge=1,
        le=MAX_TEMPERATURES,
        description="Trials that run at once. Each asks for all of `workers`. Until the teacher's "
        "stream is complete, one runs alone.",
    )


class TrialStatus(ApiModel):
    """One trial as observed."""

    temperature: float = Field(description="Its temperature.")
    job_name: str = Field(max_length=63, description="Its DistillationJob.")
    state: str = Field("", max_length=64, description="Reason of that job's Succeeded condition.")
    metric: Metric | None = Field(None, description="The metric that the choice goes by.")
    perplexity: float | None = Field(None, description="Held-out perplexity of its model.")
    model: str = Field("", max_length=2048, description="URI of its model.")
    chosen: bool = Field(False, description="Whether its student is the stage's.")


class SweepTable(ApiModel):
    """A finished sweep, for the reports of its trials."""

    stage: str
    choice: str
    trials: list[TrialStatus]

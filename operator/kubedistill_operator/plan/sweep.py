"""A stage's sweep: whether it can be tried, which trial is next, and which one is the best.

Trials run one after the other, `parallelism` at once. As long as no trial has seen the teacher's
stream complete, one runs alone: it writes the stream, and all later ones find it there.

The choice is made when all trials have ended. It is kept in the status and stands as long as the
chosen trial's job does: later stages may have been taught by its student.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from kubedistill_api.chain import StageStatus
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.metrics import METRICS, SELECTABLE, Goal
from kubedistill_api.runspec import Problem
from kubedistill_api.status import Metric
from kubedistill_api.sweep import Select, Sweep, TrialStatus

from kubedistill_operator.plan.gates import unmeasured
from kubedistill_operator.plan.spelling import one_of
from kubedistill_operator.plan.stages import Jobs, Part, StageJob, Standing

_PENDING = "Pending"
_BEST = {"Minimize": "lowest", "Maximize": "highest"}


def problems_of(sweep: Sweep, spec: DistillationJobSpec) -> Iterator[Problem]:
    """Why this sweep cannot be tried on a stage with this (valid) spec."""
    if len({f"{value:g}" for value in sweep.temperature}) < len(sweep.temperature):
        yield Problem(
            field="sweep.temperature",
            found=str(sweep.temperature),
            expected="name each temperature once; six digits of it count",
        )
    metric = sweep.select.metric
    if metric not in SELECTABLE:
        known = metric in METRICS
        yield Problem(
            field="sweep.select.metric",
            found=f"{metric} ({'the same in every trial' if known else 'no such metric'})",
            expected=one_of(SELECTABLE, "" if known else metric),
        )
    elif why := unmeasured(metric, spec):
        yield Problem(
            field="sweep.select.metric",
            found=f"{metric}, {why}",
            expected=one_of([name for name in SELECTABLE if not unmeasured(name, spec)]),
        )
    if spec.distill is None or spec.teacher is None:
        yield Problem(
            field="sweep.temperature",
            found="a stage that fine-tunes",
            expected="only what is distilled has a temperature: leave `sweep` out",
        )
        return
    if spec.distill.signal != "Logits":
        yield Problem(
            field="sweep.temperature",
            found=f"`distill.signal: {spec.distill.signal}`",
            expected="a teacher's text is learnt without a temperature: leave `sweep` out",
        )
    if spec.distill.objective.soft_weight == 0:
        yield Problem(
            field="sweep.temperature",
            found="`distill.objective.softWeight: 0`",
            expected="the temperature is that of the soft term: give it a weight",
        )
    streamed = (spec.teacher.delivery, spec.teacher.payload)
    if streamed == ("Stream", "Sampled") and len(sweep.temperature) > 1:
        yield Problem(
            field="sweep.temperature",
            found=f"{len(sweep.temperature)} temperatures with `teacher.payload: Sampled`",
            expected="its draws are made at one temperature: write payload Hidden, Sparse or Auto",
        )


def standing_of_sweep(
    sweep: Sweep, parts: Sequence[Part], jobs: Jobs, before: StageStatus | None
) -> Standing:
    """Where the sweep stands. `before`: what the status says of the stage."""
    kept = _kept(jobs, before)
    if kept is not None:
        return kept
    trials = [_row(part, jobs.get(part.name), sweep.select.metric) for part in parts]
    known = [job for part in parts if (job := jobs.get(part.name)) is not None]
    share = sum(100.0 if job.ended else job.percentage for job in known) / len(parts)
    if len(known) < len(parts) or not all(job.ended for job in known):
        return _unfinished(sweep, parts, jobs, trials, share)
    best = choose(trials, sweep.select.direction)
    if best is None:
        return Standing("", failure=_why_none(sweep.select, parts, jobs), trials=tuple(trials))
    return Standing(
        best.job_name,
        done=True,
        percentage=100.0,
        trials=tuple(t.model_copy(update={"chosen": t == best}) for t in trials),
        choice=_sentence(best, trials, sweep.select.direction),
    )


def choose(trials: Sequence[TrialStatus], goal: Goal) -> TrialStatus | None:
    """The best trial that has the metric; of equals the one with the lower temperature."""
    sign = 1 if goal == "Minimize" else -1
    measured = [(sign * t.metric.value, t.temperature, t) for t in trials if t.metric is not None]
    return min(measured, key=lambda entry: entry[:2])[2] if measured else None


def overruled(sweep: Sweep, standing: Standing) -> bool:
    """Whether a choice that stands is not what the spec, as it is now, would lead to."""
    if not standing.done:
        return False
    trials = standing.trials
    same = {t.temperature for t in trials} == set(sweep.temperature) and all(
        t.metric is None or t.metric.name == sweep.select.metric for t in trials
    )
    best = choose(trials, sweep.select.direction)
    return not same or best is None or best.job_name != standing.job_name


def _kept(jobs: Jobs, before: StageStatus | None) -> Standing | None:
    """The choice that was made before, while its job is there."""
    trials = before.trials if before is not None else []
    for trial in trials:
        job = jobs.get(trial.job_name)
        if trial.chosen and before and job is not None and job.succeeded.status == "True":
            return Standing(
                trial.job_name,
                done=True,
                percentage=100.0,
                trials=tuple(trials),
                choice=before.choice,
            )
    return None


def _unfinished(
    sweep: Sweep, parts: Sequence[Part], jobs: Jobs, trials: Sequence[TrialStatus], share: float
) -> Standing:
    running = [p for p in parts if (job := jobs.get(p.name)) is not None and not job.ended]
    waiting = [p for p in parts if p.name not in jobs]
    limit = sweep.parallelism if _teacher_is_ready(parts, jobs) else 1
    start = waiting[: max(0, limit - len(running))]
    ended = len(parts) - len(running) - len(waiting)
    states = {trial.job_name: trial.state for trial in trials}
    told = [f"T = {p.temperature:g} {states[p.name]}" for p in [*running, *start]]
    return Standing(
        "",
        start=tuple(start),
        running=tuple(part.name for part in running),
        progress=f"{ended} of {len(parts)} trials have ended; {', '.join(told)}",
        percentage=share,
        trials=tuple(trials),
    )


def _teacher_is_ready(parts: Sequence[Part], jobs: Jobs) -> bool:
    """Whether no trial that starts now would run the teacher that others read too."""
    teacher = parts[0].spec.teacher
    if teacher is not None and teacher.delivery == "Online":
        return True
    return any(_has_stream(job) for part in parts if (job := jobs.get(part.name)) is not None)


def _has_stream(job: StageJob) -> bool:
    resolved, stream = job.status.resolved, job.status.teacher_stream
    return bool((resolved and resolved.stream_complete) or (stream and stream.complete))


def _row(part: Part, job: StageJob | None, metric: str) -> TrialStatus:
    temperature = part.temperature or 0.0
    if job is None:
        return TrialStatus(temperature=temperature, job_name=part.name, state=_PENDING)
    state = job.succeeded.reason or _PENDING
    if job.succeeded.status != "True":
        return TrialStatus(temperature=temperature, job_name=part.name, state=state)
    figures = {m.name: m.value for m in job.status.metrics if math.isfinite(m.value)}
    value = figures.get(metric)
    return TrialStatus(
        temperature=temperature,
        job_name=part.name,
        state=state,
        metric=None if value is None else Metric(name=metric, value=value),
        perplexity=figures.get("perplexity"),
        model=job.status.model.uri if job.status.model else "",
    )


def _why_none(select: Select, parts: Sequence[Part], jobs: Jobs) -> str:
    """Why no trial of an ended sweep can be chosen."""
    done = [job for part in parts if (job := jobs[part.name]).succeeded.status == "True"]
    if done:
        names = ", ".join(metric.name for metric in done[0].status.metrics) or "none"
        return (
            f"failed: no trial has the metric {select.metric}, which only some settings give "
            f"(they have: {names}): write another sweep.select.metric; no trial is run again"
        )
    failed = [(part, jobs[part.name].succeeded) for part in parts]
    told = "; ".join(f"T = {p.temperature:g} ({c.reason}): {c.message}"[:400] for p, c in failed)
    return f"failed: all trials of its sweep failed: {told}"


def _sentence(best: TrialStatus, trials: Sequence[TrialStatus], goal: Goal) -> str:
    """Which trial was chosen, and why."""
    assert best.metric is not None
    measured = [trial for trial in trials if trial.metric is not None]
    name, value = best.metric.name, best.metric.value
    text = f"T = {best.temperature:g} was chosen: its {name} {value:.4g} is "
    if len(measured) == 1:
        text += "the only one"
    else:
        text += f"the {_BEST[goal]} of {len(measured)} trials"
    if any(t is not best and t.metric and t.metric.value == value for t in measured):
        text += ", and of equals the lower temperature is taken"
    without = [f"T = {t.temperature:g} ({t.state})" for t in trials if t.metric is None]
    return text + (f"; without it: {', '.join(without)}" if without else "")

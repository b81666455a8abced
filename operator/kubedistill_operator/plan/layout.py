"""What a chain's spec asks for: the jobs of every stage, checked before the first one starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kubedistill_api.chain import DistillationChainSpec, Stage, StageStatus
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.names import (
    MAX_JOB_NAME_LENGTH,
    retry_job_name,
    stage_job_name,
    trial_job_name,
)

from kubedistill_operator.plan import gates, references
from kubedistill_operator.plan.compose import compose, policy_of
from kubedistill_operator.plan.inputs import dependency_names, parse_spec
from kubedistill_operator.plan.references import FirstTeacher, referred
from kubedistill_operator.plan.stages import Jobs, Part, Standing, standing_of_tries
from kubedistill_operator.plan.sweep import problems_of, standing_of_sweep


@dataclass(frozen=True)
class Laid:
    """A stage, the jobs that it asks for, and where it stands."""

    stage: Stage
    parts: tuple[Part, ...]
    standing: Standing
    taught: bool
    """Whether it is known by now which job's model the stage before it gives."""

    @property
    def job_names(self) -> set[str]:
        """Jobs that are this stage's, those of a sweep that has changed since included."""
        return {part.name for part in self.parts} | {t.job_name for t in self.standing.trials}


def lay_out(
    name: str, chain: DistillationChainSpec, jobs: Jobs, before: Mapping[str, StageStatus]
) -> tuple[list[Laid], list[str]]:
    """The stages of the chain `name`, and everything wrong with them.

    `before`: what the status says of each stage. A stage that something is wrong with is left out.
    """
    problems: list[str] = []
    laid: list[Laid] = []
    students: dict[str, str] = {}
    first: FirstTeacher | None = None
    for index, stage in enumerate(chain.stages):
        parts, found = _parts(name, chain, index, students, first)
        problems += [f"stage {stage.name}: {problem}" for problem in found]
        if found:
            continue
        if stage.sweep is None:
            standing = standing_of_tries(parts, jobs)
        else:
            standing = standing_of_sweep(stage.sweep, parts, jobs, before.get(stage.name))
        taught = not laid or bool(laid[-1].standing.job_name)
        laid.append(Laid(stage, parts, standing, taught))
        if first is None and parts[0].spec.distill is not None:
            first = FirstTeacher(stage.name, parts[0].spec, jobs.get(standing.job_name))
        if standing.job_name:
            students[stage.name] = standing.job_name
    return laid, problems + _name_problems(laid, jobs)


def job_names(name: str, raw: Mapping[str, Any]) -> set[str]:
    """Names of the jobs of a chain's spec, which may be invalid."""
    found = set()
    for stage in raw.get("stages") or []:
        stage_name = str(stage.get("name", ""))
        found.add(stage_job_name(name, stage_name))
        for value in (stage.get("sweep") or {}).get("temperature") or []:
            found.add(trial_job_name(name, stage_name, value))
        retries = range(1, 1 + len(stage.get("retries") or []))
        found |= {retry_job_name(name, stage_name, number) for number in retries}
    return found


def models_of_chain(raw: Mapping[str, Any]) -> set[str]:
    """Jobs whose models a chain's spec asks for by name, which may be invalid."""
    stages = raw.get("stages")
    parts = [raw.get("template"), *(stages if isinstance(stages, list) else [])]
    return {name for part in parts if isinstance(part, Mapping) for name in dependency_names(part)}


def _parts(
    name: str,
    chain: DistillationChainSpec,
    index: int,
    students: Mapping[str, str],
    first: FirstTeacher | None,
) -> tuple[tuple[Part, ...], list[str]]:
    """The jobs of a stage of the chain `name`, or what is wrong with it.

    `students` as for `compose`; `first`: of the stages before.
    """
    stage = chain.stages[index]
    spec, problems = _checked(compose(name, chain, index, students=students), first)
    if spec is None:
        return (), problems
    if stage.sweep is None:
        first_try = Part(stage_job_name(name, stage.name), spec)
        tries, told = _retries(name, chain, index, students, first)
        return (() if told else (first_try, *tries)), told
    if stage.retries:
        return (), ["retries: found both a sweep and retries; a sweep's trials are its tries"]
    problems = [problem.sentence() for problem in problems_of(stage.sweep, spec)]
    if problems:
        return (), problems
    parts = []
    for temperature in stage.sweep.temperature:
        raw = compose(name, chain, index, students=students, temperature=temperature)
        trial, found = parse_spec(raw)
        problems += [problem.sentence() for problem in found]
        if trial is not None:
            job_name = trial_job_name(name, stage.name, temperature)
            parts.append(Part(job_name, referred(trial, first), temperature))
    return tuple(parts), list(dict.fromkeys(problems))


def _retries(
    name: str,
    chain: DistillationChainSpec,
    index: int,
    students: Mapping[str, str],
    first: FirstTeacher | None,
) -> tuple[list[Part], list[str]]:
    """The jobs of a stage's retries, or what is wrong with them; arguments as of `_parts`."""
    stage, policy = chain.stages[index], policy_of(chain, index)
    if stage.retries and policy != "Retry":
        return [], [f"retries: found `onGateFailure: {policy}`; write Retry, or leave them out"]
    if stage.on_gate_failure == "Retry" and not stage.retries:
        return [], ["retries: found nothing; give what is tried next, such as training.epochs"]
    parts: list[Part] = []
    problems: list[str] = []
    for number in range(1, len(stage.retries) + 1):
        raw = compose(name, chain, index, students=students, retry=number)
        spec, found = _checked(raw, first)
        problems += [f"retries[{number - 1}]: {problem}" for problem in found]
        if spec is not None:
            parts.append(Part(retry_job_name(name, stage.name, number), spec, retry=number))
    return parts, problems


def _checked(
    raw: Mapping[str, Any], first: FirstTeacher | None
) -> tuple[DistillationJobSpec | None, list[str]]:
    """The spec of a stage's job, with what is known of the first teacher; or all that is wrong."""
    spec, found = parse_spec(raw)
    if spec is not None:
        found = [*references.problems_of(spec, first), *gates.problems_of(spec, in_chain=True)]
    if spec is None or found:
        return None, [problem.sentence() for problem in found]
    return referred(spec, first), []


def _name_problems(laid: Sequence[Laid], jobs: Jobs) -> list[str]:
    """Names of jobs that are too long, that two stages want, or that somebody else has."""
    problems, taken = [], dict[str, str]()
    for stage, name in [(one.stage.name, part.name) for one in laid for part in one.parts]:
        if len(name) > MAX_JOB_NAME_LENGTH:
            problems.append(
                f"stage {stage}: its job {name} would have a name of {len(name)} characters; "
                f"at most {MAX_JOB_NAME_LENGTH}: give the chain or the stage a shorter one"
            )
        if name in taken:
            problems.append(
                f"stage {stage}: its job {name} would have the name of one of stage "
                f"{taken[name]}: rename one of these stages"
            )
        taken[name] = stage
        job = jobs.get(name)
        if job is not None and not job.ours and not job.leaving:
            problems.append(
                f"stage {stage}: there is a DistillationJob {name} that is not of this chain: "
                "delete it, or rename the stage or the chain"
            )
    return problems

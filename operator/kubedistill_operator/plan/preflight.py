"""One small pod checks storage, data, tokenizer and sizes before anything is paid for."""

from __future__ import annotations

import re

from kubedistill_api import reasons
from kubedistill_api.exit_codes import ExitCode, policy
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.names import API_KEY, ROLE_PREFLIGHT, SECRET_KEYS, preflight_name
from kubedistill_api.runspec import Outcome

from kubedistill_operator.plan import hands
from kubedistill_operator.plan.actions import CreatePreflight, DeleteBatchJob, Inputs
from kubedistill_operator.plan.draft import Pass
from kubedistill_operator.plan.ending import give_up_lost
from kubedistill_operator.plan.exits import (
    Verdict,
    judge,
    no_pods,
    outcome_text,
    pod_trouble,
    secret_missing,
)
from kubedistill_operator.plan.restart import backoff_seconds
from kubedistill_operator.plan.times import format_time
from kubedistill_operator.plan.views import BatchJobView, PodView

_CHECKS = "a small pod checks storage, data, tokenizer and sizes"
_FINAL = (ExitCode.BAD_CONFIGURATION, ExitCode.UNREADABLE_INPUT)


def check(step: Pass, inputs: Inputs) -> bool:
    """True when the inputs are accepted (in this pass); else the conditions say what is missing."""
    draft, seen = step.draft, step.seen
    name = preflight_name(seen.name, inputs.digest)
    corrected = 0 < seen.status.observed_generation < seen.generation
    for other in seen.batch_jobs.values():
        if other.role == ROLE_PREFLIGHT and other.name != name and not other.deleting_since:
            draft.act(DeleteBatchJob(other.name))
            corrected = True
    batch_job = seen.batch_jobs.get(name)
    if batch_job is None:
        if corrected:
            # The failures were those of other inputs.
            draft.update(failures=0)
        draft.act(CreatePreflight(inputs, draft.status.failures + 1))
        _validating(step, _CHECKS)
        return False
    if batch_job.deleting_since:
        return False
    found = seen.pods_of(ROLE_PREFLIGHT, batch_job.tries)
    pods = [p for p in found if p.name.startswith(f"{name}-") and batch_job.owns(p)]
    leaving = give_up_lost(draft, pods)
    if batch_job.complete:
        return _accepted(step, inputs, batch_job, pods)
    if leaving:
        _trouble(step, leaving)
        return False
    if batch_job.failed or any(p.failed for p in pods):
        _refused(step, batch_job, pods)
        return False
    hands.mend_job(draft, batch_job, suspend=False)
    hands.restore_inputs(draft, ROLE_PREFLIGHT, pods, inputs=inputs)
    _waiting(step, batch_job, pods)
    return False


def _validating(step: Pass, message: str) -> None:
    step.draft.set(reasons.VALIDATED, "Unknown", reasons.VALIDATING, message)
    step.draft.summary(reasons.VALIDATING, message)


def _trouble(step: Pass, trouble: tuple[str, str]) -> None:
    step.draft.set(reasons.VALIDATED, "Unknown", *trouble)
    step.draft.summary(*trouble)


def _accepted(step: Pass, inputs: Inputs, batch_job: BatchJobView, pods: list[PodView]) -> bool:
    draft = step.draft
    outcome = next((o for p in pods if (o := p.outcome())), None)
    if outcome is None or outcome.resolved is None:
        if all(p.gone for p in pods):
            # Its pod was removed before its words were read (news of it that are only late or lost
            # were asked for before this plan): ask again.
            draft.act(DeleteBatchJob(batch_job.name))
        elif any(p.exit_code is None and not p.gone for p in pods):
            draft.look_again(2.0)  # its end is on its way to us
        else:
            text = "its pod ended without saying what it found: is workers.template's image ours?"
            _try_again(step, batch_job, Verdict(reasons.ERROR, text, retry=True, charged=True))
        return False
    draft.update(
        resolved=outcome.resolved.model_copy(
            update={
                "inputs_digest": inputs.digest,
                "teacher_model": inputs.teacher,
                "student_model": inputs.student,
            }
        ),
        start_time=format_time(draft.now),
        failures=0,
    )
    draft.set(reasons.VALIDATED, "True", reasons.VALID)
    draft.tell("Validated", "the preflight accepted the inputs; from here they are fixed")
    return True


def _refused(step: Pass, batch_job: BatchJobView, pods: list[PodView]) -> None:
    draft = step.draft
    if batch_job.generation < step.seen.generation and batch_job.failed:
        # Another generation's failure: the person changed something, so it is checked again.
        draft.act(DeleteBatchJob(batch_job.name))
        draft.update(failures=0)
        _validating(step, "the changed spec is checked")
        return
    failed = next((p for p in pods if p.exit_code not in (None, 0)), None)
    if failed is not None and failed.exit_code in _FINAL:
        reason = policy(failed.exit_code).reason
        message = outcome_text(failed.outcome() or Outcome(reason=reason))
        message = message or failed.end_message or f"pod {failed.name} gave no message"
        draft.set(reasons.VALIDATED, "False", reason, message)
        draft.fail(reason, message)
        return
    if not batch_job.failed:
        return
    if any(p.active for p in pods):
        draft.look_again(2.0)  # how it ended is on its way to us
        return
    _try_again(step, batch_job, judge(pods, batch_job.failure_message))


def _try_again(step: Pass, batch_job: BatchJobView, verdict: Verdict) -> None:
    """After a while another preflight, as long as there are tries left."""
    draft = step.draft
    tries, limit = batch_job.tries, step.spec.backoff_limit
    # An eviction is free: the next one has the same number.
    draft.update(failures=tries if verdict.charged else tries - 1)
    if verdict.charged and tries > limit:
        message = f"the preflight failed {tries} times; the last time: {verdict.message}"
        draft.set(reasons.VALIDATED, "False", verdict.reason, message)
        draft.fail(reasons.BACKOFF_LIMIT_EXCEEDED, message)
        return
    draft.set(reasons.VALIDATED, "Unknown", verdict.reason, verdict.message)
    draft.summary(verdict.reason, f"the preflight is tried again: {verdict.message}")
    wait = backoff_seconds(step.seen.uid, tries, tries, draft.timing)
    passed = (draft.now - (batch_job.finished_at or draft.now)).total_seconds()
    if passed >= wait:
        draft.act(DeleteBatchJob(batch_job.name))
    else:
        draft.look_again(wait - passed)


def _missing_secret(spec: DistillationJobSpec, told: str) -> tuple[str, str, str] | None:
    """(name, keys, field) of the Secret that the kubelet misses, by its words; None for another's."""
    endpoint = spec.teacher.endpoint if spec.teacher else None
    wanted = []
    if endpoint is not None and endpoint.secret_ref is not None:
        field = "spec.teacher.endpoint.secretRef"
        wanted.append((endpoint.secret_ref.name, API_KEY, field))
    if spec.storage.secret_ref is not None:
        field = "spec.storage.secretRef"
        wanted.append((spec.storage.secret_ref.name, " and ".join(SECRET_KEYS), field))
    # Both may name one Secret that lacks one of the keys: then the key is in the words.
    by_key = [entry for entry in wanted if any(key in told for key in entry[1].split(" and "))]
    named = [
        entry for entry in wanted if re.search(rf"(?<![\w.-]){re.escape(entry[0])}(?![\w.-])", told)
    ]
    return next(iter(by_key or named), None)


def _waiting(step: Pass, batch_job: BatchJobView, pods: list[PodView]) -> None:
    wanted = _missing_secret(step.spec, secret_missing(pods))
    if wanted is not None:
        name, keys, field = wanted
        message = (
            f"Secret {name} with {keys} is not in namespace {step.seen.namespace}: create it, or "
            f"correct {field}.name; the job goes on by itself"
        )
        if step.draft.set(reasons.VALIDATED, "False", reasons.SECRET_NOT_FOUND, message):
            step.draft.tell(reasons.SECRET_NOT_FOUND, message, warning=True)
        step.draft.summary(reasons.SECRET_NOT_FOUND, message)
        return
    trouble = pod_trouble(pods) or no_pods(step.draft, batch_job, pods)
    if trouble:
        _trouble(step, trouble)
        return
    _validating(step, _CHECKS)

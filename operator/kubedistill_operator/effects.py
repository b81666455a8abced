"""Carries out a plan's actions. Each may be carried out twice: "already there" is success."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, assert_never

from kubedistill_api import names
from kubedistill_api.base import API_VERSION, CHAIN_KIND, JOB_KIND
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.status import Attempt, Resolved

from kubedistill_operator.cache import Cache, Raw
from kubedistill_operator.cluster import (
    BATCH_JOBS,
    CONFIG_MAPS,
    DISTILLATION_JOBS,
    EVENTS,
    PODS,
    SERVICES,
    Cluster,
    Conflict,
    NotFound,
    Resource,
)
from kubedistill_operator.observe import job_status, owner_of
from kubedistill_operator.plan import restart
from kubedistill_operator.plan.actions import (
    AbandonPod,
    Action,
    CreateGang,
    CreatePreflight,
    CreateReport,
    CreateStageJob,
    CreateTeacher,
    DeleteBatchJob,
    DeleteFinished,
    DeletePod,
    Event,
    Inputs,
    RestoreInputs,
    RestoreService,
    ScaleBatchJob,
    SetStageFields,
    SuspendBatchJob,
    SuspendStageJob,
)
from kubedistill_operator.plan.inputs import missing_models
from kubedistill_operator.plan.shape import nodes_of
from kubedistill_operator.plan.times import format_time
from kubedistill_operator.resources import batch_jobs, run_specs
from kubedistill_operator.resources.owner import Owner, owner_reference
from kubedistill_operator.resources.pods import TrainerImage

_log = logging.getLogger(__name__)
_COMPONENT = "kubedistill-operator"


class NameTaken(RuntimeError):
    """An object of that name is there but belongs to another owner, such as a deleted namesake."""


class InputsLost(RuntimeError):
    """Nobody knows any more which models a job was accepted with."""


class Effects:
    """Actions on the cluster, on behalf of one object at a time."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        trainer: TrainerImage,
        take_job: Callable[[Raw], None],
        least_grace: int = 60,
    ) -> None:
        """`take_job` gets each DistillationJob that is written here for a chain.

        It has to be looked at then: to the watch that brings it later, it is no news.
        `least_grace`: terminationGracePeriodSeconds of a gang whose saves are short or not known.
        """
        self._take_job = take_job
        self._cluster = cluster
        self._cache = cache
        self._trainer = trainer
        self._least_grace = least_grace

    async def perform(self, raw: Raw, action: Action) -> None:
        """Carry out one action for the object `raw`. NameTaken, or what the API server refused."""
        namespace = raw["metadata"]["namespace"]
        match action:
            case CreatePreflight():
                await self._preflight(raw, action)
            case CreateTeacher():
                await self._teacher(raw, action)
            case CreateGang():
                await self._gang(raw, action)
            case RestoreInputs():
                await self._restore(raw, action)
            case RestoreService():
                owner = owner_of(raw)
                await self._ensure(SERVICES, batch_jobs.service(owner), owner.uid)
            case CreateReport():
                await self._report(namespace, action)
            case CreateStageJob():
                await self._stage_job(raw, action)
            case DeleteFinished():
                await self._expire(raw)
            case DeleteBatchJob():
                left = await self._cluster.delete(BATCH_JOBS, namespace, action.name, "Foreground")
                self._remember(left)
            case DeletePod():
                await self._cluster.delete(PODS, namespace, action.name, uid=action.uid)
            case AbandonPod():
                await self._abandon(namespace, action)
            case SuspendBatchJob():
                await self._patch_job(namespace, action.name, {"suspend": action.suspend})
            case ScaleBatchJob():
                await self._patch_job(namespace, action.name, {"parallelism": action.parallelism})
            case SuspendStageJob():
                await self._patch_stage(namespace, action.name, {"suspend": action.suspend})
            case SetStageFields():
                await self._patch_stage(namespace, action.name, dict(action.fields))
            case _:
                assert_never(action)

    async def _abandon(self, namespace: str, action: AbandonPod) -> None:
        """As Kubernetes does with pods of nodes that are gone: failed first, else its Job waits on."""
        patch = {"metadata": {"uid": action.uid}, "status": {"phase": "Failed"}}
        try:
            self._cache.pods.put(
                await self._cluster.merge_patch(PODS, namespace, action.name, patch, "status")
            )
        except NotFound:
            return
        await self._cluster.delete(PODS, namespace, action.name, grace_seconds=0, uid=action.uid)

    async def _patch_job(self, namespace: str, name: str, spec: dict[str, Any]) -> None:
        patch = {"spec": spec}
        self._remember(await self._cluster.merge_patch(BATCH_JOBS, namespace, name, patch))

    async def _patch_stage(self, namespace: str, name: str, spec: dict[str, Any]) -> None:
        patch = {"spec": spec}
        self._take_job(await self._cluster.merge_patch(DISTILLATION_JOBS, namespace, name, patch))

    async def _expire(self, raw: Raw) -> None:
        """Delete a DistillationJob as it was when that was decided: an edit since then keeps it."""
        metadata = raw["metadata"]
        await self._cluster.delete(
            DISTILLATION_JOBS,
            metadata["namespace"],
            metadata["name"],
            uid=metadata["uid"],
            resourceVersion=metadata["resourceVersion"],
        )
        self._cache.remove_job(raw)

    def _remember(self, batch_job: Raw | None) -> None:
        if batch_job is not None and batch_job.get("kind") == "Job":
            self._cache.batch_jobs.put(batch_job)

    async def _create(self, resource: Resource, body: dict[str, Any], owner_uid: str) -> Raw:
        """Create an object, or take the one that is there if it has the same owner."""
        try:
            return await self._cluster.create(resource, body)
        except Conflict:
            return await self._take(resource, body, owner_uid)

    async def _ensure(self, resource: Resource, body: dict[str, Any], owner_uid: str) -> Raw:
        """The same for what is likely to be there: no write where it is."""
        try:
            return await self._take(resource, body, owner_uid)
        except NotFound:
            return await self._create(resource, body, owner_uid)

    async def _take(self, resource: Resource, body: dict[str, Any], owner_uid: str) -> Raw:
        """The object of that name, with the labels, selector and data that it is to have."""
        metadata = body["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        found = await self._cluster.get(resource, namespace, name)
        owners = found["metadata"].get("ownerReferences") or []
        if not any(owner["uid"] == owner_uid for owner in owners):
            raise NameTaken(
                f"{body['kind']} {namespace}/{name} belongs to something else: delete or rename it"
            )
        job = self._cache.batch_jobs.get(namespace, name)
        if resource == CONFIG_MAPS and run_specs.replaced(found, body, job):
            _log.warning("ConfigMap made anew: somebody had replaced it", extra={"object": name})
            await self._cluster.delete(resource, namespace, name, uid=found["metadata"]["uid"])
            return await self._cluster.create(resource, body)
        patch: dict[str, Any] = {}
        if resource in (BATCH_JOBS, SERVICES) and _lacks_labels(
            found, metadata.get("labels") or {}
        ):
            patch["metadata"] = {"labels": metadata["labels"]}
        selector = body.get("spec", {}).get("selector") if resource == SERVICES else None
        if selector and found["spec"].get("selector") != selector:
            extra = set(found["spec"].get("selector") or {}) - set(selector)
            patch["spec"] = {"selector": {**dict.fromkeys(extra), **selector}}
        return await self._cluster.merge_patch(resource, namespace, name, patch) if patch else found

    async def _preflight(self, raw: Raw, action: CreatePreflight) -> None:
        owner, spec = owner_of(raw), _spec(raw)
        inputs = self._preflight_inputs(owner, spec, action.inputs)
        await self._create(CONFIG_MAPS, inputs, owner.uid)
        body = batch_jobs.preflight(
            owner,
            spec,
            self._trainer,
            name=inputs["metadata"]["name"],
            tries=action.tries,
            generation=raw["metadata"]["generation"],
        )
        await self._run(body, inputs, owner.uid)

    async def _run(self, body: dict[str, Any], inputs: dict[str, Any], owner_uid: str) -> None:
        """The Job whose pods run by the run spec in the ConfigMap `inputs`, and by no other."""
        job = run_specs.pinned(body, inputs)
        self._remember(await self._create(BATCH_JOBS, job, owner_uid))

    def _preflight_inputs(
        self, owner: Owner, spec: DistillationJobSpec, inputs: Inputs
    ) -> dict[str, Any]:
        run = run_specs.base_run_spec(owner, spec, inputs, "preflight")
        return run_specs.config_map(owner, names.preflight_name(owner.name, inputs.digest), run)

    async def _teacher(self, raw: Raw, action: CreateTeacher) -> None:
        owner, spec = owner_of(raw), _spec(raw)
        inputs = await self._teacher_inputs(raw)
        await self._create(CONFIG_MAPS, inputs, owner.uid)
        body = batch_jobs.teacher(owner, spec, self._trainer, tries=action.tries)
        await self._run(body, inputs, owner.uid)

    async def _teacher_inputs(self, raw: Raw) -> dict[str, Any]:
        owner, spec = owner_of(raw), _spec(raw)
        run = run_specs.base_run_spec(owner, spec, await self._accepted(raw, owner), "teacher")
        return run_specs.config_map(owner, names.teacher_name(owner.name), run)

    async def _gang(self, raw: Raw, action: CreateGang) -> None:
        owner, spec, attempt = owner_of(raw), _spec(raw), _attempt(raw, action.attempt)
        template, inputs = await self._gang_inputs(raw, attempt)
        await self._ensure(SERVICES, batch_jobs.service(owner), owner.uid)
        await self._create(CONFIG_MAPS, inputs, owner.uid)
        body = batch_jobs.gang(owner, nodes_of(spec, attempt), action.attempt, template)
        await self._run(body, inputs, owner.uid)
        if action.attempt > 1:
            last = names.attempt_name(owner.name, action.attempt - 1)
            await self._cluster.delete(CONFIG_MAPS, owner.namespace, last)

    async def _gang_inputs(
        self, raw: Raw, attempt: Attempt
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The pod template and the ConfigMap of an attempt: both follow from spec and status."""
        owner, spec, status = owner_of(raw), _spec(raw), job_status(raw)
        template = batch_jobs.gang_template(
            owner,
            spec,
            self._trainer,
            attempt=attempt.number,
            grace_seconds=restart.grace_seconds(self._least_grace, status.save_seconds),
        )
        run = run_specs.student_run_spec(
            run_specs.base_run_spec(owner, spec, await self._accepted(raw, owner), "student"),
            attempt,
            template["spec"]["terminationGracePeriodSeconds"],
            status,
        )
        name = names.attempt_name(owner.name, attempt.number)
        return template, run_specs.config_map(owner, name, run)

    async def _restore(self, raw: Raw, action: RestoreInputs) -> None:
        owner = owner_of(raw)
        if action.role == names.ROLE_STUDENT:
            _, inputs = await self._gang_inputs(raw, _attempt(raw, action.attempt))
            await self._ensure(SERVICES, batch_jobs.service(owner), owner.uid)
        elif action.inputs is not None:
            inputs = self._preflight_inputs(owner, _spec(raw), action.inputs)
        else:
            inputs = await self._teacher_inputs(raw)
        await self._restore_run_spec(inputs, owner)

    async def _restore_run_spec(self, inputs: dict[str, Any], owner: Owner) -> None:
        """The ConfigMap of pods that wait. Where it cannot be made again, their Job goes instead.

        The spec may have been edited since, or another version of the operator have made it: pods
        that take one only would refuse it, and another Job is made with what there is now.
        """
        name = inputs["metadata"]["name"]
        job = self._cache.batch_jobs.get(owner.namespace, name)
        if job is None or run_specs.fits(inputs, job):
            await self._ensure(CONFIG_MAPS, inputs, owner.uid)
            return
        try:
            found = await self._cluster.get(CONFIG_MAPS, owner.namespace, name)
        except NotFound:
            found = None
        if found is None or run_specs.replaced(found, inputs, job):
            _log.warning("its run.json cannot be made again", extra={"object": f"jobs/{name}"})
            left = await self._cluster.delete(BATCH_JOBS, owner.namespace, name, "Foreground")
            self._remember(left)

    async def _accepted(self, raw: Raw, owner: Owner) -> Inputs:
        """The models that the preflight accepted, whatever became of their jobs since.

        They are in the status. An operator that did not write them there yet left them in the
        preflight's ConfigMap.
        """
        resolved = job_status(raw).resolved or Resolved()
        models = Inputs(resolved.inputs_digest, resolved.teacher_model, resolved.student_model)
        if not missing_models(_spec(raw), models.teacher, models.student):
            return models
        name = names.preflight_name(owner.name, resolved.inputs_digest)
        try:
            found = await self._cluster.get(CONFIG_MAPS, owner.namespace, name)
        except NotFound as error:
            raise InputsLost(
                f"ConfigMap {name} held the accepted inputs and was deleted: delete this job and "
                "apply it again"
            ) from error
        return run_specs.inputs_of(run_specs.read_config_map(found))

    async def _stage_job(self, raw: Raw, action: CreateStageJob) -> None:
        metadata = raw["metadata"]
        chain = metadata["name"]
        body = {
            "apiVersion": API_VERSION,
            "kind": JOB_KIND,
            "metadata": {
                "name": action.name,
                "namespace": metadata["namespace"],
                "labels": {
                    names.LABEL_MANAGED_BY: names.MANAGER,
                    names.LABEL_CHAIN: chain,
                    names.LABEL_STAGE: action.stage,
                },
                "ownerReferences": [
                    owner_reference(API_VERSION, CHAIN_KIND, chain, metadata["uid"])
                ],
            },
            "spec": action.spec,
        }
        self._take_job(await self._create(DISTILLATION_JOBS, body, metadata["uid"]))

    async def _report(self, namespace: str, action: CreateReport) -> None:
        raw = self._cache.jobs.get(namespace, action.job)
        if raw is None:
            return  # Deleted since; the next pass chooses anew.
        owner, spec = owner_of(raw), _spec(raw)
        run = run_specs.report_run_spec(owner, spec, action.sweep)
        inputs = run_specs.config_map(owner, names.report_name(owner.name), run)
        await self._create(CONFIG_MAPS, inputs, owner.uid)
        await self._run(batch_jobs.report(owner, spec, self._trainer), inputs, owner.uid)

    async def tell(self, raw: Raw, event: Event, now: Any) -> None:
        """Post an event. Its name follows from what it says, so that it is there once."""
        metadata = raw["metadata"]
        seed = f"{metadata['uid']}/{event.reason}/{event.message}"
        stamp = format_time(now)
        name = f"{metadata['name']}.{names.short_hash(seed, 16)}"
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": name,
                "namespace": metadata["namespace"],
            },
            "involvedObject": {
                "apiVersion": raw["apiVersion"],
                "kind": raw["kind"],
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": metadata["uid"],
            },
            "type": "Warning" if event.warning else "Normal",
            "reason": event.reason,
            "message": event.message,
            "source": {"component": _COMPONENT},
            "reportingComponent": _COMPONENT,
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
        }
        try:
            await self._cluster.create(EVENTS, body)
        except Conflict:
            _log.debug("event is there already", extra={"event": name})


def _lacks_labels(raw: Raw, wanted: dict[str, str]) -> bool:
    labels = raw["metadata"].get("labels") or {}
    return any(labels.get(key) != value for key, value in wanted.items())


def _attempt(raw: Raw, number: int) -> Attempt:
    """An attempt of the status, where it was written before anything of it is made."""
    return next(a for a in job_status(raw).attempts if a.number == number)


def _spec(raw: Raw) -> DistillationJobSpec:
    return DistillationJobSpec.model_validate(raw["spec"])

"""Carries out a plan's actions. Each may be carried out twice: "already there" is success."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, assert_never

from kubedistill_api import names
from kubedistill_api.base import API_VERSION, CHAIN_KIND, JOB_KIND
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import RunSpec

from kubedistill_operator.cache import Cache, Raw
from kubedistill_operator.cluster import (
    BATCH_JOBS,
    CONFIG_MAPS,
    DISTILLATION_JOBS,
    EVENTS,
    SERVICES,
    Cluster,
    Conflict,
    NotFound,
    Resource,
)
from kubedistill_operator.observe import owner_of
from kubedistill_operator.plan.actions import (
    Action,
    CreateGang,
    CreatePreflight,
    CreateReport,
    CreateStageJob,
    CreateTeacher,
    DeleteBatchJob,
    DeleteConfigMap,
    Event,
    Inputs,
    SetStageGates,
    SuspendBatchJob,
    SuspendStageJob,
)
from kubedistill_operator.plan.times import format_time
from kubedistill_operator.resources import batch_jobs, run_specs
from kubedistill_operator.resources.owner import Owner, owner_reference
from kubedistill_operator.resources.pods import TrainerImage

_log = logging.getLogger(__name__)
_COMPONENT = "kubedistill-operator"


class NameTaken(RuntimeError):
    """An object of that name is there but belongs to another owner, such as a deleted namesake."""


class Effects:
    """Actions on the cluster, on behalf of one object at a time."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        trainer: TrainerImage,
        take_job: Callable[[Raw], None],
    ) -> None:
        """`take_job` gets each DistillationJob that is written here for a chain.

        It has to be looked at then: to the watch that brings it later, it is no news.
        """
        self._take_job = take_job
        self._cluster = cluster
        self._cache = cache
        self._trainer = trainer

    async def perform(self, raw: Raw, action: Action, *, grace_seconds: int = 60) -> None:
        """Carry out one action for the object `raw`."""
        namespace = raw["metadata"]["namespace"]
        if isinstance(action, CreatePreflight):
            await self._preflight(raw, action)
        elif isinstance(action, CreateTeacher):
            await self._teacher(raw, action)
        elif isinstance(action, CreateGang):
            await self._gang(raw, action, grace_seconds)
        elif isinstance(action, DeleteBatchJob):
            left = await self._cluster.delete(BATCH_JOBS, namespace, action.name, "Foreground")
            self._remember(left)
        elif isinstance(action, DeleteConfigMap):
            await self._cluster.delete(CONFIG_MAPS, namespace, action.name)
        elif isinstance(action, SuspendBatchJob):
            patch = {"spec": {"suspend": action.suspend}}
            self._remember(
                await self._cluster.merge_patch(BATCH_JOBS, namespace, action.name, patch)
            )
        elif isinstance(action, CreateStageJob):
            await self._stage_job(raw, action)
        elif isinstance(action, SuspendStageJob):
            patch = {"spec": {"suspend": action.suspend}}
            self._take_job(
                await self._cluster.merge_patch(DISTILLATION_JOBS, namespace, action.name, patch)
            )
        elif isinstance(action, SetStageGates):
            gates = {"spec": {"gates": [gate.to_wire() for gate in action.gates]}}
            self._take_job(
                await self._cluster.merge_patch(DISTILLATION_JOBS, namespace, action.name, gates)
            )
        elif isinstance(action, CreateReport):
            await self._report(namespace, action)
        else:
            assert_never(action)

    def _remember(self, batch_job: Raw | None) -> None:
        if batch_job is not None and batch_job.get("kind") == "Job":
            self._cache.batch_jobs.put(batch_job)

    async def _create(self, resource: Resource, body: dict[str, Any], owner_uid: str) -> Raw:
        """Create an object, or take the one that is there if it has the same owner."""
        metadata = body["metadata"]
        try:
            return await self._cluster.create(resource, body)
        except Conflict:
            found = await self._cluster.get(resource, metadata["namespace"], metadata["name"])
        owners = found["metadata"].get("ownerReferences") or []
        if any(owner["uid"] == owner_uid for owner in owners):
            return found
        raise NameTaken(
            f"{body['kind']} {metadata['namespace']}/{metadata['name']} belongs to something else"
        )

    async def _preflight(self, raw: Raw, action: CreatePreflight) -> None:
        owner, spec = owner_of(raw), _spec(raw)
        name = names.preflight_name(owner.name, action.inputs.digest)
        run = run_specs.base_run_spec(owner, spec, action.inputs, "preflight")
        await self._create(CONFIG_MAPS, run_specs.config_map(owner, name, run), owner.uid)
        body = batch_jobs.preflight(
            owner,
            spec,
            self._trainer,
            name=name,
            tries=action.tries,
            generation=raw["metadata"]["generation"],
        )
        self._remember(await self._create(BATCH_JOBS, body, owner.uid))

    async def _teacher(self, raw: Raw, action: CreateTeacher) -> None:
        owner, spec = owner_of(raw), _spec(raw)
        inputs = await self._pinned_inputs(raw, owner)
        run = run_specs.base_run_spec(owner, spec, inputs, "teacher")
        name = names.teacher_name(owner.name)
        await self._create(CONFIG_MAPS, run_specs.config_map(owner, name, run), owner.uid)
        body = batch_jobs.teacher(owner, spec, self._trainer, tries=action.tries)
        self._remember(await self._create(BATCH_JOBS, body, owner.uid))

    async def _gang(self, raw: Raw, action: CreateGang, grace_seconds: int) -> None:
        owner, spec = owner_of(raw), _spec(raw)
        inputs = await self._pinned_inputs(raw, owner)
        template = batch_jobs.gang_template(
            owner, spec, self._trainer, attempt=action.attempt, grace_seconds=grace_seconds
        )
        run = run_specs.student_run_spec(
            run_specs.base_run_spec(owner, spec, inputs, "student"),
            action.attempt,
            action.fence,
            template["spec"]["terminationGracePeriodSeconds"],
        )
        name = names.attempt_name(owner.name, action.attempt)
        await self._create(SERVICES, batch_jobs.service(owner), owner.uid)
        await self._create(CONFIG_MAPS, run_specs.config_map(owner, name, run), owner.uid)
        body = batch_jobs.gang(owner, spec.workers.nodes, action.attempt, template)
        self._remember(await self._create(BATCH_JOBS, body, owner.uid))
        if action.attempt > 1:
            last = names.attempt_name(owner.name, action.attempt - 1)
            await self._cluster.delete(CONFIG_MAPS, owner.namespace, last)

    async def _pinned_inputs(self, raw: Raw, owner: Owner) -> Inputs:
        """The models that the preflight accepted, whatever became of their jobs since."""
        resolved = raw["status"]["resolved"]
        name = names.preflight_name(owner.name, resolved["inputsDigest"])
        try:
            found = await self._cluster.get(CONFIG_MAPS, owner.namespace, name)
        except NotFound as error:
            raise NotFound(
                404, "NotFound", f"ConfigMap {name} holds the accepted inputs and was deleted"
            ) from error
        run: RunSpec = run_specs.read_config_map(found)
        return run_specs.inputs_of(run)

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
        name = names.report_name(owner.name)
        await self._create(CONFIG_MAPS, run_specs.config_map(owner, name, run), owner.uid)
        body = batch_jobs.report(owner, spec, self._trainer)
        self._remember(await self._create(BATCH_JOBS, body, owner.uid))

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


def _spec(raw: Raw) -> DistillationJobSpec:
    return DistillationJobSpec.model_validate(raw["spec"])

"""Prometheus metrics of the operator. Series of an object go with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from kubedistill_api.status import Condition, DistillationJobStatus
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kubedistill_operator.plan.views import PodView

Labels = tuple[str, ...]


class Metrics:
    """All series, and which of them belong to which object."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        job = ["namespace", "distillation_job"]
        self._info = self._gauge(
            "job_info", "Always 1.", [*job, "distillation_chain", "stage", "student", "teacher"]
        )
        self._pod_info = self._gauge(
            "pod_info",
            "Always 1; joins figures of pods with jobs.",
            ["namespace", "pod", *job[1:], "distillation_chain", "stage", "role", "rank"],
        )
        self._condition = self._gauge(
            "job_condition",
            "1 for the status that the condition has.",
            [*job, "condition", "status"],
        )
        self._progress = self._gauge("job_progress_ratio", "Steps done, of 1.", job)
        self._restarts = self._gauge("job_restarts_total", "Attempts after the first.", job)
        self._stage = self._gauge(
            "chain_stage_state",
            "1 for the state that the stage has.",
            ["namespace", "distillation_chain", "stage", "state"],
        )
        self.reconciles = Counter(
            "distill_operator_reconcile", "Passes.", ["result"], registry=self.registry
        )
        self.duration = Histogram(
            "distill_operator_reconcile_duration_seconds",
            "Time of a pass.",
            registry=self.registry,
            buckets=(0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30),
        )
        self.queue_depth = self._gauge("queue_depth", "Keys that wait for a worker.", [])
        self.is_leader = self._gauge("is_leader", "1 where this process works.", [])
        self._series: dict[Labels, dict[Gauge, set[Labels]]] = defaultdict(dict)

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(f"distill_operator_{name}", text, labels, registry=self.registry)

    def job(
        self,
        namespace: str,
        name: str,
        status: DistillationJobStatus,
        pods: Iterable[PodView],
        chain: str,
        stage: str,
    ) -> None:
        """Publish a job's series and drop those that no longer hold."""
        owner = ("job", namespace, name)
        job = (namespace, name)
        info = (*job, chain, stage, status.student_summary, status.teacher_summary)
        self._publish(owner, self._info, {info: 1})
        self._publish(owner, self._condition, _by_status(job, status.conditions))
        percentage = status.progress.percentage if status.progress else 0
        self._publish(owner, self._progress, {job: percentage / 100})
        self._publish(owner, self._restarts, {job: status.restarts})
        self._publish(
            owner,
            self._pod_info,
            {
                (namespace, p.name, name, chain, stage, p.role, str(p.index)): 1
                for p in pods
                if not p.gone
            },
        )

    def chain(self, namespace: str, name: str, states: dict[str, str]) -> None:
        """Publish the states of a chain's stages."""
        series: dict[Labels, float] = {
            (namespace, name, stage, state): 1 for stage, state in states.items()
        }
        self._publish(("chain", namespace, name), self._stage, series)

    def forget(self, kind: str, namespace: str, name: str) -> None:
        """Drop all series of an object that is gone."""
        for gauge, series in self._series.pop((kind, namespace, name), {}).items():
            for labels in series:
                gauge.remove(*labels)

    def _publish(self, owner: Labels, gauge: Gauge, series: dict[Labels, float]) -> None:
        old = self._series[owner].get(gauge, set())
        for labels in old - series.keys():
            gauge.remove(*labels)
        for labels, value in series.items():
            gauge.labels(*labels).set(value)
        self._series[owner][gauge] = set(series)


def _by_status(job: Labels, conditions: Iterable[Condition]) -> dict[Labels, float]:
    return {
        (*job, condition.type, status): float(condition.status == status)
        for condition in conditions
        for status in ("True", "False", "Unknown")
    }

"""A store, a proxy before it and a zygote beside it: what the store families run on, and how they judge."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import Any

from devcluster.node.limits import MemoryLimit
from devcluster.s3 import S3Server
from devcluster.zygote import Zygote
from e2e.gang import put_inputs

from chaos import reader
from chaos.faults import Call, Script, calm
from chaos.figures import Run
from chaos.s3_proxy import S3Proxy
from chaos.store_run import RANKS, ZERO1, Attempt, Ended, Gang, Job, rank_name

_CGROUPS = "kubedistill-chaos"
_USUAL_PEAK_BYTES = 70 << 20
"""Where this machine does not count it."""


@dataclass(frozen=True)
class Calm:
    """A run without any fault."""

    weights: str
    model: dict[str, bytes]
    """Files of the finished model, those apart that tell of this very run."""
    calls: list[Call]

    def of(self, rank: int) -> list[Call]:
        return [call for call in self.calls if call.client == rank_name(rank)]


class StoreBench:
    """Use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self._peaks: dict[int, int] = {}

    def __enter__(self) -> StoreBench:
        server = S3Server(self.folder / "s3")
        self._stack.callback(server.stop)
        server.start()
        self.s3 = server.access
        put_inputs(self.s3)
        self.zygote = self._stack.enter_context(Zygote("trainer", self.folder / "zygote.log"))
        self.proxy = self._stack.enter_context(S3Proxy(self.s3.endpoint))
        self.gang = Gang(self.zygote, self.proxy, self.s3, self.folder)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @functools.cached_property
    def _calm(self) -> dict[Job, Calm]:
        return {}

    def calm(self, job: Job = ZERO1) -> Calm:
        """The undisturbed run of a job; done once."""
        if job not in self._calm:
            name = f"calm-{job}"
            with self.attempt(name, 1, job, calm) as attempt:
                ended = attempt.wait()
            if ended.codes != [0] * RANKS:
                raise RuntimeError(f"the calm run ended with {ended.codes}:\n{ended.tail}")
            calls = self.calls()
            [folder] = self.gang.models(name).values()
            self._calm[job] = Calm(self.gang.weights(name), _of_model(folder), calls)
        return self._calm[job]

    def calls(self) -> list[Call]:
        """Of the attempt of now, rank by rank: in which order two ranks' come is chance."""
        calls = [entry.call for entry in self.proxy.log]
        return sorted(calls, key=lambda call: (call.client, call.number))

    @contextlib.contextmanager
    def memory_limit(self, name: str, limit_bytes: float) -> Iterator[MemoryLimit]:
        """A memory limit for one rank, to be joined when it is forked."""
        limit = MemoryLimit(f"{_CGROUPS}-{os.getpid()}-{name}", limit_bytes)
        try:
            yield limit
        finally:
            limit.remove()

    def peak_bytes(self, rank: int) -> int:
        """The most memory that a rank of a calm run takes beside what the zygote has; measured once."""
        if rank not in self._peaks:
            name = f"peak-{rank}"
            with (
                self.memory_limit(name, 4 << 30) as limit,
                self.attempt(name, 1, ZERO1, calm, groups={rank: limit.groups}) as attempt,
            ):
                attempt.wait()
                self._peaks[rank] = _peak_bytes(limit)
        return self._peaks[rank]

    @contextlib.contextmanager
    def attempt(
        self, name: str, number: int, job: Job, script: Script, **options: Any
    ) -> Iterator[Attempt]:
        """An attempt whose calls the script decides about; no rank of it is left afterwards."""
        self.proxy.begin(script)
        started: list[Attempt] = []
        early: list[tuple[str, Signals]] = []

        def strike(client: str, sent: Signals) -> None:
            if started:
                started[0].signal(client, sent)
            else:
                early.append((client, sent))

        self.proxy.signaller = strike
        attempt = self.gang.start(name, number, job, **options)
        started.append(attempt)
        for client, sent in early:
            attempt.signal(client, sent)
        try:
            yield attempt
        finally:
            self.proxy.release()
            attempt.end()

    @contextlib.contextmanager
    def second(self, name: str, number: int, job: Job) -> Iterator[Attempt]:
        """An attempt beside one that runs: its calls come by ports that no script knows."""
        attempt = self.gang.start(name, number, job, via="second")
        try:
            yield attempt
        finally:
            attempt.end()

    def conclude(
        self,
        run: Run,
        name: str,
        number: int,
        job: Job,
        promised: int,
        resumes_from: int | None = None,
    ) -> Ended:
        """Run an attempt without faults to the end, and compare everything with the calm run.

        `promised` is the newest step that was reported as committed: it must not be lost. Where
        commits were damaged, `resumes_from` is the one that is to be found instead.
        """
        ended = self._whole(run, name, number, job)
        resumed = resumed_step(ended)
        if resumes_from is not None and resumed != resumes_from:
            run.wrong.append(f"resumed from step {resumed}, not {resumes_from}")
        if resumed < promised and resumes_from is None:
            run.lost.append(
                f"step {promised} was committed, and the next attempt began at {resumed}"
            )
        weights = self.gang.weights(name)
        if weights != self.calm(job).weights:
            run.wrong.append(f"weights {weights or 'missing'}, calm run {self.calm(job).weights}")
        run.violations += self.check_models(name, job)
        self._collect(run, name, number + 1, job, max(resumed, promised_step(ended)))
        run.commits += self.commits(name)
        return ended

    def _collect(self, run: Run, name: str, number: int, job: Job, promised: int) -> None:
        """Nothing is wrong with what is stored, and no byte is left that nobody needs.

        What was written in the very second of a FENCE is younger than it to the store's clock: that,
        and nothing else, one more attempt may clear away.
        """
        left, wrong = sorted_out(self.check(name, collected=True))
        run.violations += wrong
        if not left:
            return
        run.told["left for one more attempt"] = left
        self.pass_a_second(name)
        ended = self._whole(run, name, number, job)
        if resumed_step(ended) != promised:
            run.lost.append(
                f"step {promised} was committed, and attempt {number} began at {resumed_step(ended)}"
            )
        run.violations += self.check(name, collected=True)
        run.violations += self.check_models(name, job)
        if self.gang.weights(name) != self.calm(job).weights:
            run.wrong.append("one more attempt exported other weights")

    def pass_a_second(self, name: str) -> None:
        """Until the store's clock is past the second of a run's newest shard.

        A clean-up compares times of the store, which are whole seconds.
        """
        client, bucket = self.s3.client(), self.s3.bucket
        listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{self.gang.prefix(name)}/data/")
        newest = max((item["LastModified"] for item in listed.get("Contents", [])), default=None)
        while newest is not None:
            client.put_object(Bucket=bucket, Key="clock", Body=b"")
            if client.head_object(Bucket=bucket, Key="clock")["LastModified"] > newest:
                return
            time.sleep(0.05)

    def check(self, name: str, *, collected: bool = False) -> list[str]:
        """What the independent reader finds wrong."""
        found = reader.check(
            self.s3.client(), self.s3.bucket, self.gang.prefix(name), collected=collected
        )
        return list(found.violations)

    def check_models(self, name: str, job: Job) -> list[str]:
        """Folders of a job that can be taken for a model, and are not the calm run's."""
        calm_model = self.calm(job).model
        return [
            f"model {digest} has a config.json, and beside it only {sorted(folder)}"
            for digest, folder in self.gang.models(name).items()
            if "config.json" in folder and _of_model(folder) != calm_model
        ]

    def log_of(self, name: str) -> dict[str, bytes]:
        """The commit log as it is, by key."""
        return dict(self.gang.objects(f"{self.gang.prefix(name)}/log/"))

    def commits(self, name: str) -> int:
        """Commits that were ever made."""
        kinds: Counter[str] = Counter()
        for body in self.log_of(name).values():
            with contextlib.suppress(ValueError):
                kinds[json.loads(body).get("kind", "")] += 1
        return kinds["COMMIT"]

    def _whole(self, run: Run, name: str, number: int, job: Job) -> Ended:
        with self.attempt(name, number, job, calm) as attempt:
            ended = attempt.wait()
        run.lives += 1
        run.told.setdefault("codes", []).append(ended.codes)
        if ended.codes != [0] * RANKS:
            run.violations.append(f"attempt {number} ended with {ended.codes}: {ended.tail}")
        return ended


def _peak_bytes(limit: MemoryLimit) -> int:
    """The most that the processes under a limit have taken."""
    for group in limit.groups:
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            with contextlib.suppress(OSError):
                return int(Path(group).with_name(name).read_text())
    return _USUAL_PEAK_BYTES


def sorted_out(violations: list[str]) -> tuple[list[str], list[str]]:
    """What a clean-up left over, and what no clean-up mends."""
    left = [sentence for sentence in violations if " is left " in sentence]
    return left, [sentence for sentence in violations if sentence not in left]


def _of_model(folder: dict[str, bytes]) -> dict[str, bytes]:
    reports = ("MODEL_CARD.md", "report.html", "report.json")
    return {name: body for name, body in folder.items() if name not in reports}


def events(ended: Ended, text: str) -> list[dict[str, Any]]:
    """Lines of rank 0's log that say just this."""
    wanted = f'"event": "{text}"'
    return [json.loads(line) for line in ended.logs[0].splitlines() if wanted in line]


def promised_step(ended: Ended) -> int:
    """The newest step that was reported as committed; 0 for none."""
    return max((int(event["step"]) for event in events(ended, "committed")), default=0)


def resumed_step(ended: Ended) -> int:
    """The step that an attempt began with; 0 for the beginning."""
    return max((int(event["step"]) for event in events(ended, "resumed")), default=0)

"""Families of faults in an attempt that is not the first: it reads a log, loads, rejects, and collects."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from chaos.damage import Commit, commits, damage
from chaos.faults import At, Call, Fault, Kind, calm
from chaos.figures import Family, Run
from chaos.store_bench import StoreBench, promised_step, resumed_step
from chaos.store_judge import (
    KILLS,
    absorbed,
    expect_rejected,
    fault_at,
    fits,
    kill_at,
    name_of,
)
from chaos.store_run import RANKS, ZERO1, Ended, Job, rank_name

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


RESUME = ("store-kill-resume", "store-fault-resume", "store-garble-resume", "store-twice")
"""The families' names."""
_DATA = re.compile(r"data/e\d+/s\d+/[^/]+")
_GARBLE = Fault(Kind.GARBLE)


@dataclass(frozen=True)
class Past:
    """What an attempt 1 that was killed left, and what has befallen it."""

    prefix: str
    keys: list[str]
    """Below the prefix."""
    older: Commit
    """What a resume takes."""
    damaged: Commit
    """The newest one, which it has to reject."""

    @property
    def harmed(self) -> str:
        """Prefix of the damaged shards, below the run's."""
        found = _DATA.search(self.damaged.shards[0])
        assert found
        return found.group()


class Behind:
    """Attempts of a job behind a prefix with everything in it that there can be.

    There are a good commit and a damaged one, an orphan, an unfinished upload, and where the job makes
    a RETIRE in time the shards that it should have deleted.
    """

    def __init__(self, bench: StoreBench, job: Job) -> None:
        self._bench = bench
        self.job = job

    @functools.cached_property
    def past(self) -> Past:
        """Made once; `lay` copies it."""
        bench, name = self._bench, f"past-{self.job}"
        own = bench.calm(self.job).of(0)
        deletes = [call.number for call in own if call.target.endswith("?delete")]
        records = [call.number for call in own if call.method == "PUT" and "/log/" in call.path]
        last = (
            At(rank_name(0), deletes[0], Fault(Kind.SIGNAL_BEFORE))
            if deletes
            # FENCE and two COMMITs.
            else At(rank_name(0), records[2], Fault(Kind.SIGNAL_AFTER))
        )
        with bench.attempt(name, 1, self.job, last) as attempt:
            attempt.wait()
        prefix = bench.gang.prefix(name)
        older, newest = commits(bench, name)[-2:]
        damage(bench, "flipped bit", newest, random.Random(0))
        client, bucket = bench.s3.client(), bench.s3.bucket
        for shard in older.shards:
            _copy(client, bucket, shard, f"{prefix}/data/e1/s8/orphan/{shard.rpartition('/')[2]}")
        keys = [key.removeprefix(f"{prefix}/") for key, _ in bench.gang.objects(f"{prefix}/")]
        return Past(prefix, keys, older, newest)

    def lay(self, name: str) -> Past:
        """The past of the job `name`, whose next attempt is its second."""
        past, bench = self.past, self._bench
        client, bucket, prefix = bench.s3.client(), bench.s3.bucket, bench.gang.prefix(name)
        stale = f"{prefix}/data/e1/s8/stale/shard"
        upload = client.create_multipart_upload(Bucket=bucket, Key=stale)["UploadId"]
        client.upload_part(Bucket=bucket, Key=stale, UploadId=upload, PartNumber=1, Body=b"half")
        for key in past.keys:
            _copy(client, bucket, f"{past.prefix}/{key}", f"{prefix}/{key}")
        bench.pass_a_second(name)
        return past

    @functools.cached_property
    def calls(self) -> list[Call]:
        """Those of a second attempt without faults, rank by rank."""
        name = f"resumed-{self.job}"
        past = self.lay(name)
        with self._bench.attempt(name, 2, self.job, calm) as attempt:
            ended = attempt.wait()
        if ended.codes != [0] * RANKS or resumed_step(ended) != past.older.step:
            raise RuntimeError(f"the calm second attempt ended with {ended.codes}:\n{ended.tail}")
        return self._bench.calls()


@functools.cache
def behind_of(bench: StoreBench, job: Job) -> Behind:
    """The one of a bench."""
    return Behind(bench, job)


def _copy(client: S3Client, bucket: str, source: str, target: str) -> None:
    client.copy_object(Bucket=bucket, Key=target, CopySource={"Bucket": bucket, "Key": source})


def rank_of(call: Call) -> int:
    """The rank that calls."""
    return int(call.client.rpartition("-")[2])


def _of_the_run(call: Call) -> bool:
    own = "job-uid" in call.target or call.method == "POST"
    return own and "/data/e2/" not in call.path


def resume_families(bench: StoreBench) -> list[Family]:
    """All of them."""
    behind = behind_of(bench, ZERO1)
    # What an attempt reads of its inputs, uploads and exports is the same in the first one.
    calls = [(rank_of(call), call.number) for call in behind.calls if _of_the_run(call)]
    kills = [(*target, kill) for target in calls for kill in KILLS]
    guarded = [
        (rank_of(call), call.number) for call in behind.calls if fits(_GARBLE, call, "job-uid")
    ]
    return [
        Family(
            "store-kill-resume", len(kills), partial(killed, bench, behind, kills, 1), least_met=1
        ),
        Family(
            "store-fault-resume",
            len(calls),
            partial(faulted, bench, behind, calls),
            least_met=1,
            least_absorbed=1,
        ),
        Family(
            "store-garble-resume",
            len(guarded),
            partial(_garbled, bench, behind, guarded),
            least_met=1,
            least_absorbed=1,
        ),
        Family("store-twice", 24, partial(_twice, bench, behind, calls), least_met=1),
    ]


def killed(
    bench: StoreBench,
    behind: Behind,
    kills: Sequence[tuple[int, int, Fault]],
    stride: int,
    run: Run,
    draw: random.Random,
) -> None:
    """kill −9 before and after each call of a second attempt, or at one drawn of every `stride`."""
    past = behind.lay(name_of(run))
    target = kills[run.index * stride + draw.randrange(stride)]
    promised = kill_at(bench, run, behind.job, target, 2, past.older.step, past.harmed)
    bench.conclude(run, name_of(run), 3, behind.job, promised)


def faulted(
    bench: StoreBench,
    behind: Behind,
    calls: Sequence[tuple[int, int]],
    run: Run,
    draw: random.Random,
) -> None:
    """A drawn fault at each call of a second attempt."""
    past = behind.lay(name_of(run))
    ended = fault_at(bench, run, behind.job, calls[run.index], draw, 2)
    _goes_on(bench, run, behind.job, past, ended)


def _garbled(
    bench: StoreBench,
    behind: Behind,
    calls: Sequence[tuple[int, int]],
    run: Run,
    draw: random.Random,
) -> None:
    """One bit of each record and shard that a second attempt reads is another, once."""
    past = behind.lay(name_of(run))
    rank, number = calls[run.index]
    ended = absorbed(bench, run, behind.job, At(rank_name(rank), number, _GARBLE), 2)
    _goes_on(bench, run, behind.job, past, ended)


def _goes_on(bench: StoreBench, run: Run, job: Job, past: Past, ended: Ended) -> None:
    """Nothing but the damaged commit is passed over."""
    if resumed_step(ended) != past.older.step:
        run.wrong.append(f"resumed from {resumed_step(ended)}, not from {past.older.step}")
    expect_rejected(run, ended, past.damaged)
    bench.conclude(run, name_of(run), 3, job, promised_step(ended))


def _twice(
    bench: StoreBench,
    behind: Behind,
    calls: Sequence[tuple[int, int]],
    run: Run,
    draw: random.Random,
) -> None:
    """The second attempt is killed at one of its calls, and the third at one of its own."""
    past = behind.lay(name_of(run))
    promised = past.older.step
    for attempt in (2, 3):
        target = (*draw.choice(calls[: len(calls) * 2 // 3]), draw.choice(KILLS))
        promised = kill_at(bench, run, behind.job, target, attempt, promised, past.harmed)
    bench.conclude(run, name_of(run), 4, behind.job, promised)

"""Families that harm what is stored or what a rank lives on: bytes, disk, memory, time."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from signal import Signals

from devcluster.node.limits import MemoryLimit
from devcluster.zygote import Forked
from kubedistill_api.exit_codes import ExitCode

from chaos.damage import KINDS, OF_RECORDS, commits, damage
from chaos.faults import At, Fault, Kind, calm
from chaos.figures import Family, Run
from chaos.store_bench import StoreBench, promised_step
from chaos.store_judge import began, disturbed, expect_rejected, name_of
from chaos.store_run import RANKS, STEPS, ZERO1, ZERO2, ZERO3, Ended, rank_name

_MIB = 1 << 20
_TOO_LITTLE = 64 * _MIB
"""Memory that leaves no room for a snapshot."""
_HANG_SECONDS = 30.0
"""A whole run takes one or two."""


def harm_families(bench: StoreBench) -> list[Family]:
    """All of them."""
    return [
        Family("store-damage", 36, partial(_damage, bench), least_met=1),
        Family("store-disk", 18, partial(_disk, bench), least_met=0.8),
        Family("store-overflow", 8, partial(_overflow, bench), least_met=1),
        Family("store-memory", 12, partial(_memory, bench), least_met=1),
    ]


def _damage(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """Attempt 1 is killed after its last commit but one, whose bytes are harmed before attempt 2."""
    job, name = draw.choice((ZERO1, ZERO1, ZERO2, ZERO3)), name_of(run)
    records = [
        call.number
        for call in bench.calm(job).of(0)
        if call.method == "PUT" and "/log/" in call.path
    ]
    # At step 6: FENCE, and three COMMITs.
    disturbed(bench, run, job, At(rank_name(0), records[3], Fault(Kind.SIGNAL_AFTER)))
    older, newest = commits(bench, name)[-2:]
    kind = KINDS[run.index % len(KINDS)]
    run.faults.append(damage(bench, kind, newest, draw))
    ended = bench.conclude(run, name, 2, job, older.step, resumes_from=older.step)
    expect_rejected(run, ended, newest, unreadable=kind in OF_RECORDS)


@contextlib.contextmanager
def _small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A disk of its own in memory."""
    folder.mkdir(parents=True)
    options = f"size={size_bytes},mode=0777"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "chaos", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _disk(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """One rank's scratch is too small: for its markers, its snapshots, its export, or not at all."""
    name = name_of(run)
    # Where memory is not short, only rank 0 needs its disk: for the export.
    rank, short = (0, False) if run.index < 6 else (run.index % RANKS, True)
    size = (4, 8, 16, 32, 64, 128)[run.index % 6] * 1024
    with (
        _small_disk(bench.folder / f"{name}-disk", size) as disk,
        bench.attempt(
            name,
            1,
            ZERO1,
            calm,
            scratch={rank: disk},
            memory_limit_bytes=_TOO_LITTLE if short else None,
        ) as attempt,
    ):
        ended = attempt.wait(_HANG_SECONDS)
    run.lives += 1
    run.told["codes"] = [ended.codes]
    if ended.codes == [0] * RANKS:
        run.told["not met"] = "the disk was big enough"
    else:
        run.faults.append(f"rank {rank} has {size} bytes of disk{' and no memory' * short}")
        _expect_told(run, ended, rank)
    run.violations += bench.check(name)
    bench.conclude(run, name, 2, ZERO1, promised_step(ended))


def _expect_told(run: Run, ended: Ended, rank: int) -> None:
    """No rank hangs; one says in its outcome that its disk is full; its peer ends with it."""
    told = [outcome.message for outcome in ended.outcomes if outcome is not None]
    if ended.left_alone:
        run.violations.append(f"ranks {ended.left_alone} hang: {ended.tail}")
    if not any("No space left" in text or "bytes free" in text for text in told):
        run.violations.append(
            f"ended with {ended.codes}, and no outcome says that the disk is full: {told} {ended.tail}"
        )
    if ended.codes[rank] <= 0:
        run.violations.append(f"rank {rank} ended with {ended.codes[rank]}: {ended.tail}")


def _overflow(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """Memory is short, so that snapshots go to disk; and of one rank's disk only their folder is full.

    Three saves in a row fail, which ends the attempt.
    """
    name = name_of(run)
    rank = run.index % RANKS
    size = (4, 8, 16, 24)[run.index // RANKS % 4] * 1024
    folder = bench.folder / f"{name}-scratch"
    with (
        _small_disk(folder / f"checkpoint-{rank}", size),
        bench.attempt(
            name, 1, ZERO1, calm, scratch={rank: folder}, memory_limit_bytes=_TOO_LITTLE
        ) as attempt,
    ):
        ended = attempt.wait(_HANG_SECONDS)
    run.lives += 1
    run.told["codes"] = [ended.codes]
    run.faults.append(f"rank {rank} has {size} bytes of disk for snapshots, and no memory")
    _expect_told(run, ended, rank)
    run.violations += bench.check(name)
    bench.conclude(run, name, 2, ZERO1, promised_step(ended))


def _watch(victim: Forked, limit: MemoryLimit) -> bool:
    """Until the rank has ended; whether it reached its limit. Where the kernel counts nothing, we do."""
    reached = False
    while victim.running:
        if limit.exceeded(victim.pid):
            reached = True
            victim.send_signal(Signals.SIGKILL)
        with contextlib.suppress(TimeoutError):
            victim.wait(0.05)
    return reached or limit.exceeded(None)


def _memory(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """A rank reaches its memory limit, and the kernel kills it: its peer says that it is gone."""
    name = name_of(run)
    rank = run.index % RANKS
    size = int(bench.peak_bytes(rank) * draw.uniform(0.1, 0.95))
    with (
        bench.memory_limit(name, size) as limit,
        bench.attempt(name, 1, ZERO1, calm, groups={rank: limit.groups}) as attempt,
    ):
        killed = _watch(attempt.ranks[rank], limit)
        ended = attempt.wait(_HANG_SECONDS)
    run.lives += 1
    run.told["codes"] = [ended.codes]
    run.faults.append(f"rank {rank} has {size // _MIB} MiB of memory")
    peer = ended.codes[1 - rank]
    # A peer that is done already has lost nobody, and one that has not begun may wait to meet it.
    fit = {int(ExitCode.PEER_LOST)} | ({0} if promised_step(ended) == STEPS else set())
    if ended.left_alone == [1 - rank] and not began(ended.logs[1 - rank]):
        fit.add(-int(Signals.SIGKILL))
    if not killed or ended.codes[rank] != -Signals.SIGKILL or peer not in fit:
        run.violations.append(
            f"ended with {ended.codes}, over the limit: {killed}, left alone: {ended.left_alone}: "
            f"{ended.tail}"
        )
    run.violations += bench.check(name)
    bench.conclude(run, name, 2, ZERO1, promised_step(ended))

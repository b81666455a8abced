"""Families that harm what is stored or what a rank lives on: bytes, disk, memory, time."""

from __future__ import annotations

import contextlib
import random
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from signal import Signals

from kubedistill_api.exit_codes import ExitCode

from chaos.damage import KINDS, commits, damage
from chaos.faults import At, Fault, Kind, calm
from chaos.figures import Family, Run
from chaos.store_bench import StoreBench, promised_step, resumed_step
from chaos.store_run import RANKS, rank_name

_MIB = 1 << 20
_HANG_SECONDS = 30.0
"""A whole run takes one or two."""


def harm_families(bench: StoreBench) -> list[Family]:
    """All of them."""
    return [
        Family("store-damage", 36, partial(_damage, bench)),
        Family("store-disk", 6, partial(_disk, bench)),
        Family("store-memory", 4, partial(_memory, bench)),
    ]


def _damage(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """Attempt 1 is killed after its last commit but one, whose bytes are harmed before attempt 2."""
    zero = draw.choice((1, 1, 2, 3))
    name = f"{run.family}-{run.index}"
    records = [
        call.number
        for call in bench.calm(zero).of(0)
        if call.method == "PUT" and "/log/" in call.path
    ]
    # At step 6: FENCE, and three COMMITs.
    with bench.attempt(
        name, 1, zero, At(rank_name(0), records[3], Fault(Kind.SIGNAL_AFTER))
    ) as attempt:
        attempt.wait()
    run.lives += 1
    found = commits(bench, name)
    older, newest = found[-2:]
    run.faults.append(damage(bench, KINDS[run.index % len(KINDS)], newest, draw))
    with bench.attempt(name, 2, zero, calm) as attempt:
        ended = attempt.wait()
    run.lives += 1
    run.told["codes"] = [ended.codes]
    if ended.codes != [0] * RANKS:
        run.violations.append(f"attempt 2 ended with {ended.codes}: {ended.tail}")
    if resumed_step(ended) != older.step:
        run.wrong.append(f"resumed from {resumed_step(ended)}, not from {older.step}")
    outcome = ended.outcomes[0]
    told = outcome.progress.rejected_checkpoints if outcome and outcome.progress else []
    if not told:
        run.violations.append("no outcome tells of the rejected commit")
    if bench.gang.weights(name) != bench.calm(zero).weights:
        run.wrong.append("weights other than the calm run's")
    run.commits += bench.commits(name)


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
    """One rank's scratch is too small, from the first save on or from a later one."""
    name = f"{run.family}-{run.index}"
    rank = run.index % RANKS
    size = draw.choice((64, 128, 192)) * 1024
    with (
        _small_disk(bench.folder / f"{name}-disk", size) as disk,
        bench.attempt(name, 1, 1, calm, scratch={rank: disk}) as attempt,
    ):
        ended = attempt.wait(_HANG_SECONDS)
    run.lives += 1
    run.told["codes"] = [ended.codes]
    if ended.left_alone:
        run.violations.append(f"ranks {ended.left_alone} hang: {ended.tail}")
    run.faults.append(f"rank {rank} has {size} bytes of disk")
    told = "".join(ended.logs)
    if ended.codes == [0] * RANKS:
        run.told["not met"] = "the disk was big enough"
    elif "No space left" not in told and "bytes free" not in told:
        run.violations.append(f"nobody says that the disk is full: {ended.tail}")
    run.violations += bench.check(name)
    bench.conclude(run, name, 2, 1, promised_step(ended))


def _memory(bench: StoreBench, run: Run, draw: random.Random) -> None:
    """The address space ends somewhere between what the zygote has and what a run takes."""
    name = f"{run.family}-{run.index}"
    limit = bench.zygote_bytes() + draw.randint(50, 900) * _MIB
    with bench.attempt(name, 1, 1, calm, limits={"AS": limit}) as attempt:
        ended = attempt.wait(_HANG_SECONDS)
    run.lives += 1
    run.told["codes"] = [ended.codes]
    run.faults.append(f"address space of {limit // _MIB} MiB")
    expected = {
        0, int(ExitCode.OUT_OF_MEMORY), int(ExitCode.PEER_LOST), -int(Signals.SIGKILL),
        -int(Signals.SIGABRT), -int(Signals.SIGSEGV), int(ExitCode.UNKNOWN),
    }  # fmt: skip
    if not set(ended.codes) <= expected:
        run.violations.append(f"ended with {ended.codes}: {ended.tail}")
    run.violations += bench.check(name)
    bench.conclude(run, name, 2, 1, promised_step(ended))

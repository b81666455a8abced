"""`python -m chaos`: all families, or one, or one case; figures on standard output and in chaos.json."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import itertools
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from chaos import figures
from chaos.figures import Family, Run, run_case
from chaos.fuzz import fuzz_family
from chaos.gang_bench import GangBench
from chaos.gang_node import gang_families
from chaos.operator_bench import OperatorBench
from chaos.operator_clock import clock_families
from chaos.operator_families import operator_families
from chaos.operator_lost import lost_families
from chaos.operator_node import node_families
from chaos.store_bench import StoreBench
from chaos.store_families import store_families
from chaos.store_harm import harm_families

FUZZED = 1000
"""Objects of the fuzzer."""


@contextlib.contextmanager
def _store(folder: Path, asked: str) -> Iterator[list[Family]]:
    with StoreBench(folder / "store") as bench:
        yield store_families(bench, asked) + harm_families(bench)


@contextlib.contextmanager
def _operator(folder: Path, asked: str) -> Iterator[list[Family]]:
    with OperatorBench(folder / "operator", nodes=2) as bench:
        faults = [*operator_families(bench), *clock_families(bench), *node_families(bench)]
        yield [*faults, fuzz_family(bench, FUZZED), *lost_families(bench)]


@contextlib.contextmanager
def _gang(folder: Path, asked: str) -> Iterator[list[Family]]:
    with GangBench(folder / "gang") as bench:
        yield gang_families(bench)


_PARTS = {"store": _store, "operator": _operator, "gang": _gang}
"""Beginning of the families' names → the families, on what they need; one part at a time is up."""


def main() -> None:
    parser = argparse.ArgumentParser(description="faults at every call, and what they did")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", default="", help="a family's name, or the beginning of several")
    parser.add_argument("--case", type=int, default=None)
    parser.add_argument("--sample", type=int, default=0, help="so many cases a family, spread out")
    parser.add_argument("--out", type=Path, default=Path("chaos.json"))
    given = parser.parse_args()
    # A run that hangs says where: kill -USR1.
    faulthandler.register(signal.SIGUSR1)
    runs: list[Run] = []
    families: list[Family] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        for part in _PARTS:
            if part.startswith(given.family) or given.family.startswith(part):
                families += _run_part(part, Path(folder), given, runs)
    if not runs:
        raise SystemExit(f"no family begins with {given.family!r}")
    fell_short = figures.shortfalls(families, runs)
    print(figures.table(runs, fell_short))
    whole = not (given.family or given.sample or given.case is not None)
    short = whole and any(goal.reached < goal.least for goal in figures.goals(runs))
    sys.exit(short or bool(fell_short) or any(run.bad for run in runs))


def _run_part(part: str, folder: Path, given: argparse.Namespace, runs: list[Run]) -> list[Family]:
    """Add the runs of a part's families; the families that were asked for."""
    with _PARTS[part](folder, given.family) as families:
        chosen = [family for family in families if family.name == given.family]
        chosen = chosen or [family for family in families if family.name.startswith(given.family)]
        for at_once, group in itertools.groupby(chosen, lambda family: family.at_once):
            cases = [(family, index) for family in group for index in _numbers(family, given)]
            _run(cases, at_once, given, runs)
        return chosen


def _numbers(family: Family, given: argparse.Namespace) -> list[int]:
    """Of the cases that were asked for."""
    if given.case is not None:
        return [given.case]
    stride = max(1, family.count // given.sample) if given.sample else 1
    return list(range(family.count))[given.seed % stride :: stride]


def _run(
    cases: list[tuple[Family, int]], at_once: int, given: argparse.Namespace, runs: list[Run]
) -> None:
    """Add the cases' runs; what is known is on disk after each of them."""
    started = time.monotonic()
    for done, run in enumerate(_ended(cases, at_once, given.seed), 1):
        runs.append(run)
        figures.write(given.out, runs)
        if run.bad:
            print(figures.story(run), file=sys.stderr)
        spent = time.monotonic() - started
        print(
            f"{run.seed}: {run.seconds:.0f} s, {len(run.bad)} bad; {done} of {len(cases)} cases "
            f"in {spent:.0f} s",
            file=sys.stderr,
        )


def _ended(cases: list[tuple[Family, int]], at_once: int, seed: int) -> Iterator[Run]:
    """The cases' runs as they end. What a case does depends on its own seed only, not on others."""
    if at_once == 1:
        # In this thread: a part of the cluster that is started again ends with the thread it is of.
        yield from (run_case(family, index, seed) for family, index in cases)
        return
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(run_case, family, index, seed) for family, index in cases]
        yield from (future.result() for future in as_completed(futures))


if __name__ == "__main__":
    main()

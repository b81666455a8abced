"""`python -m chaos`: all families, or one, or one case; figures on standard output and in chaos.json."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from chaos import figures
from chaos.figures import Family, Run, run_case
from chaos.fuzz import fuzz_family
from chaos.operator_bench import OperatorBench
from chaos.operator_families import operator_families
from chaos.store_bench import StoreBench
from chaos.store_families import store_families
from chaos.store_harm import harm_families

FUZZED = 1000
"""Objects of the fuzzer."""


@contextlib.contextmanager
def families(chosen: str, folder: Path) -> Iterator[list[Family]]:
    """The families whose name begins so, on what they need."""
    with contextlib.ExitStack() as stack:
        found: list[Family] = []
        if not chosen or chosen.startswith("store"):
            bench = stack.enter_context(StoreBench(folder / "store"))
            found += store_families(bench) + harm_families(bench)
        if not chosen or chosen.startswith("operator"):
            operators = stack.enter_context(OperatorBench(folder / "operator"))
            found += [*operator_families(operators), fuzz_family(operators, FUZZED)]
        yield [family for family in found if family.name.startswith(chosen)]


def main() -> None:
    parser = argparse.ArgumentParser(description="faults at every call, and what they did")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", default="", help="beginning of a family's name")
    parser.add_argument("--case", type=int, default=None)
    parser.add_argument("--sample", type=int, default=0, help="so many cases a family, spread out")
    parser.add_argument("--out", type=Path, default=Path("chaos.json"))
    given = parser.parse_args()
    runs: list[Run] = []
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as folder,
        families(given.family, Path(folder)) as chosen,
    ):
        if not chosen:
            raise SystemExit(f"no family begins with {given.family!r}")
        for family in chosen:
            _run(family, given, runs)
    print(figures.table(runs))
    sys.exit(any(run.bad for run in runs))


def _run(family: Family, given: argparse.Namespace, runs: list[Run]) -> None:
    """Add a family's runs; what is known is on disk after each of them."""
    numbers = list(range(family.count)) if given.case is None else [given.case]
    if given.sample and given.case is None:
        stride = max(1, family.count // given.sample)
        numbers = numbers[given.seed % stride :: stride]
    started, bad = time.monotonic(), 0
    for done, index in enumerate(numbers, 1):
        runs.append(run_case(family, index, given.seed))
        figures.write(given.out, runs)
        if runs[-1].bad:
            bad += 1
            print(figures.story(runs[-1]), file=sys.stderr)
        spent = time.monotonic() - started
        print(f"{family.name}: {done} of {len(numbers)}, {bad} bad, {spent:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

"""What one run of a family found, and the table of all of them."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OPERATOR, STORE, FUZZ = "operator", "store", "operator-fuzz"
"""Beginnings of families' names, and a whole one."""


@dataclass
class Run:
    """One case: what was done to the product, and what was found afterwards."""

    family: str
    index: int
    seed: str
    faults: list[str] = field(default_factory=list)
    lives: int = 0
    """Processes of the product that were started: attempts of a gang, lives of an operator."""
    commits: int = 0
    lost: list[str] = field(default_factory=list)
    """What was said to be committed, and is not."""
    wrong: list[str] = field(default_factory=list)
    """Results other than the calm run's."""
    violations: list[str] = field(default_factory=list)
    """Rules that were broken."""
    seconds: float = 0.0
    told: dict[str, Any] = field(default_factory=dict)
    """Figures for people: exit codes and the like."""

    @property
    def bad(self) -> list[str]:
        return [*self.lost, *self.wrong, *self.violations]


@dataclass(frozen=True)
class Family:
    """Cases of one kind. `run` gets an empty Run and the case's own generator, and fills it in."""

    name: str
    count: int
    run: Callable[[Run, random.Random], None]
    at_once: int = 1
    """Cases that may run at the same time. With 1, what a case does is felt by others: it runs alone,
    in the thread that started the bench."""
    least_met: float = 0.0
    """Share of its cases that must have met a fault when all have run: a call that is not made any
    more must not look like a fault that did no harm."""
    least_absorbed: float = 0.0
    """Share of its cases that the product must have taken without an attempt's end."""


@dataclass(frozen=True)
class Goal:
    """What a whole run of the suite has to reach."""

    name: str
    least: int
    reached: int

    def __str__(self) -> str:
        return f"{self.name}: {self.reached:,} (goal: {self.least:,})"


def goals(runs: Iterable[Run]) -> list[Goal]:
    """A run of the operator is one process of it, from its start to its end."""
    operator = cases = stored = mutated = 0
    for run in runs:
        cases += run.family.startswith(OPERATOR)
        operator += run.lives * run.family.startswith(OPERATOR)
        stored += len(run.faults) * run.family.startswith(STORE)
        mutated += len(run.faults) * (run.family == FUZZ)
    return [
        Goal("operator runs", 1000, operator),
        Goal("operator cases", 150, cases),
        Goal("store faults", 500, stored),
        Goal("mutated objects", 1000, mutated),
    ]


def shortfalls(families: Iterable[Family], runs: Sequence[Run]) -> list[str]:
    """Families that ran in full and met, or absorbed, less than they must; one sentence each."""
    found = []
    for family in families:
        own = [run for run in runs if run.family == family.name]
        if len(own) < family.count:
            continue
        for word, count, share in (
            ("met a fault", sum(bool(run.faults) for run in own), family.least_met),
            ("absorbed it", sum(map(_absorbed, own)), family.least_absorbed),
        ):
            if count < math.ceil(share * family.count):
                found.append(
                    f"{family.name}: {count} of {family.count} cases {word}, and "
                    f"{math.ceil(share * family.count)} should have"
                )
    return found


def _absorbed(run: Run) -> bool:
    return bool(run.told.get("absorbed"))


def run_case(family: Family, index: int, seed: int) -> Run:
    """Run one case; what it raises is a violation too."""
    found = Run(family.name, index, f"{seed}/{family.name}/{index}")
    started = time.monotonic()
    try:
        family.run(found, random.Random(found.seed))
    except Exception as error:  # one broken case must not hide the others' figures
        found.violations.append(f"{type(error).__name__}: {error}"[:2000])
    found.seconds = round(time.monotonic() - started, 2)
    return found


_COLUMNS = (
    "family",
    "runs",
    "lives",
    "faults",
    "not met",
    "absorbed",
    "commits",
    "lost",
    "wrong",
    "violations",
    "seconds",
)


def totals(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each family, in the order in which they came."""
    rows: dict[str, dict[str, Any]] = {}
    for run in runs:
        row = rows.setdefault(run.family, dict.fromkeys(_COLUMNS, 0) | {"family": run.family})
        row["runs"] += 1
        row["lives"] += run.lives
        row["faults"] += len(run.faults)
        row["not met"] += not run.faults
        row["absorbed"] += _absorbed(run)
        row["commits"] += run.commits
        row["lost"] += len(run.lost)
        row["wrong"] += len(run.wrong)
        row["violations"] += len(run.violations)
        row["seconds"] = round(row["seconds"] + run.seconds, 1)
    return list(rows.values())


def total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All families' rows in one."""
    sums = {name: round(sum(row[name] for row in rows), 1) for name in _COLUMNS[1:]}
    return {"family": "total", **sums}


def table(runs: Sequence[Run], short: Sequence[str] = ()) -> str:
    """The families' rows, and what each bad run found with the words that repeat it.

    `short` are the `shortfalls`, which count as violations.
    """
    told = totals(runs)
    rows: list[Iterable[Any]] = [_COLUMNS, *(row.values() for row in [*told, total(told)])]
    width = [max(len(str(row[i])) for row in map(list, rows)) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(str(cell).rjust(width[i]) if i else str(cell).ljust(width[i])
                  for i, cell in enumerate(row))
        for row in map(list, rows)
    ]  # fmt: skip
    reached = "; ".join(map(str, goals(runs)))
    bad = sum(len(run.bad) for run in runs) + len(short)
    stories = [*(story(run) for run in runs if run.bad), *short]
    return "\n".join([*lines, *stories, f"{reached}; violations: {bad}"])


def story(run: Run) -> str:
    """What a bad run found, with the words that repeat it."""
    seed = run.seed.partition("/")[0]
    again = f"make chaos SEED={seed} FAMILY={run.family} CASE={run.index}"
    faults = "; ".join(run.faults[:8]) + ("; …" if len(run.faults) > 8 else "")
    return "\n".join([f"{again}  ({faults})", *(f"    {text}" for text in run.bad)])


def write(path: Path, runs: Sequence[Run]) -> None:
    """All of it as JSON."""
    reached = {goal.name: goal.reached for goal in goals(runs)}
    rows = totals(runs)
    content = {
        "reached": reached,
        "families": rows,
        "total": total(rows),
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

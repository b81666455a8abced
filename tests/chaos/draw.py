"""What the fuzzer's objects are: `python -m chaos.draw OBJECTS NUMBER`, batches as JSON.

A program of its own: hypothesis draws constants of whatever modules a process has loaded too, and in a
run of all families those are others than in one of a single case, which is to repeat it.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from chaos.schema import CHAIN, JOB, Schema, edits, spec_schema

BATCH = 8
_TESTS = Path(__file__).resolve().parents[1]


def batches(objects: int, number: int) -> list[list[Any]]:
    """Of each object in a batch: what is drawn for it, by what its kind may be."""
    found: list[list[Any]] = json.loads(
        subprocess.run(
            [sys.executable, "-m", "chaos.draw", str(objects), str(number)],
            cwd=_TESTS,
            check=True,
            capture_output=True,
        ).stdout
    )
    return found


def _drawn(schema: Schema) -> st.SearchStrategy[Any]:
    """What makes an object another one than the base, and edits to choose one from to take back."""
    # Most of what is hostile is refused at once: of four objects one begins with it. Of some edits
    # the first that the API server takes is made.
    fits = edits(schema, fitting=True)
    first = st.one_of(edits(schema), fits, fits, fits)
    return st.tuples(first, st.lists(st.one_of(edits(schema), fits), min_size=6, max_size=6))


def _draw(objects: int, number: int) -> list[list[Any]]:
    found = list[list[Any]]()
    one = st.fixed_dictionaries({kind: _drawn(spec_schema(kind)) for kind in (JOB, CHAIN)})

    @seed(number)
    @settings(
        max_examples=-(-objects // BATCH),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(one, min_size=BATCH, max_size=BATCH))
    def collect(batch: list[Any]) -> None:
        found.append(copy.deepcopy(batch))

    collect()
    return found


if __name__ == "__main__":
    json.dump(_draw(int(sys.argv[1]), int(sys.argv[2])), sys.stdout)

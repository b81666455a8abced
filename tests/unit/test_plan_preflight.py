"""What the failures of one preflight mean for the next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from kubedistill_api import names, reasons
from kubedistill_operator.plan.actions import CreatePreflight
from kubedistill_operator.plan.draft import Observed
from kubedistill_operator.plan.job import plan_job
from test_plan_job import preflight_seen
from test_plan_kit import NOW, TIMING, after, ended, settled, spec, state

OTHER = {"uri": "s3://runs/y"}
"""Another place to store: another digest."""


def failing(tries: int, **changes: Any) -> Observed:
    """A job whose preflight has failed so often, for a store that does not answer."""
    pod = ended("p", 15, role=names.ROLE_PREFLIGHT, attempt=tries)
    view = {"failed": True, "finished_at": NOW, "tries": tries}
    return preflight_seen(view, pod, spec=spec(backoffLimit=2), **changes)


def asked(seen: Observed) -> CreatePreflight:
    return next(a for a in plan_job(seen, TIMING).actions if isinstance(a, CreatePreflight))


@pytest.mark.parametrize("tries", [1, 2, 3])
def test_a_corrected_spec_has_all_its_retries(tries: int) -> None:
    """Also while the first is tried again, and after it was given up."""
    seen = failing(tries)
    assert settled(seen).status.failures == tries
    corrected = after(seen, generation=2, spec=spec(backoffLimit=2, storage=OTHER))
    assert asked(corrected).tries == 1
    assert settled(corrected).status.failures == 0
    gone = after(seen, generation=2, spec=corrected.spec, batch_jobs={}, pods=())
    assert asked(gone).tries == 1


def test_a_corrected_spec_that_had_to_wait_too() -> None:
    """Its generation is no news by then, but the Job of the wrong one is still there."""
    seen = failing(2)
    whole = spec(backoffLimit=2, storage=OTHER)
    off = after(seen, generation=2, spec=whole | {"suspend": True})
    assert state(settled(off)) == ("Unknown", reasons.IS_SUSPENDED)
    corrected = replace(after(off, spec=whole), generation=off.generation)
    assert asked(corrected).tries == 1


def test_the_same_spec_goes_on_counting() -> None:
    seen = failing(2)
    gone = after(seen, batch_jobs={}, pods=())
    assert asked(gone).tries == 3
    assert asked(after(gone)).tries == 3

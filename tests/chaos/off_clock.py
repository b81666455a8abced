"""The operator on a machine whose clock is off: `main` runs it as its own `main` does.

The kernel has one clock for all processes. So what the operator's code asks for the time of day is
moved, in its own process, before it begins.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import datetime, timedelta, tzinfo

from kubedistill_operator import main as operator

SECONDS = "KUBEDISTILL_CLOCK_OFF_SECONDS"
"""The variable that says by how much it is ahead."""


def main() -> None:
    """Run the operator; its clock is ahead by so many seconds as SECONDS says."""
    _move(float(os.environ[SECONDS]))
    operator.main()


def _move(seconds: float) -> None:
    real, by = time.time, timedelta(seconds=seconds)

    class Moved(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + by

    time.time = lambda: real() + seconds
    for name, module in list(sys.modules.items()):
        # Who knows the class by its name has its own; `time` is asked anew each time.
        if name.startswith("kubedistill_operator") and vars(module).get("datetime") is datetime:
            vars(module)["datetime"] = Moved

"""The table of a finished sweep, written into the reports of its trials.

A trial writes its own report when it ends, before the others have. When all have ended, this adds
the table to each. Reports are no part of a model's digest.
"""

from __future__ import annotations

import json
import logging

from kubedistill_api.runspec import Outcome
from kubedistill_api.sweep import SweepTable

from kubedistill_trainer.context import Context
from kubedistill_trainer.failures import refuse, unreadable
from kubedistill_trainer.report.page import page
from kubedistill_trainer.store import NotFound, Store

_log = logging.getLogger(__name__)


def write_trials(context: Context) -> Outcome:
    """Add the run spec's table to the report of every trial that made a model.

    Doing it twice changes nothing. InputsRefused where a report is not there or is none.
    """
    sweep = context.run.sweep
    if sweep is None:
        raise refuse("sweep", "nothing", "the operator gives it to report pods")
    models = [trial.model for trial in sweep.trials if trial.model]
    for uri in models:
        _add(context.open_store(uri), sweep)
        _log.info("report has the table of trials", extra={"uri": uri})
    return Outcome(reason="Completed", message=f"{len(models)} reports written")


def _add(folder: Store, sweep: SweepTable) -> None:
    uri = folder.uri_of("report.json")
    try:
        content = json.loads(folder.get("report.json"))
    except NotFound as error:
        raise unreadable("status.model.uri", f"nothing at {uri}", "run the trial again") from error
    except json.JSONDecodeError as error:
        raise unreadable("status.model.uri", f"{uri}: {error}", "run the trial again") from error
    content["sweep"] = sweep.to_wire()
    folder.put("report.html", page(content).encode())
    folder.put("report.json", (json.dumps(content, indent=2) + "\n").encode())

"""JSON logs, one event a line, with job, attempt and rank."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from typing import Any

_PLAIN = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _JsonFormatter(logging.Formatter):
    def __init__(self, fixed: dict[str, Any]) -> None:
        super().__init__()
        self._fixed = fixed

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **self._fixed,
            **{key: value for key, value in vars(record).items() if key not in _PLAIN},
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def set_up(**fixed: Any) -> None:
    """Send all logging to standard output as JSON, each line with `fixed` fields."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_JsonFormatter(fixed))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("botocore", "boto3", "urllib3", "s3transfer", "httpx", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # What torch wants DeepSpeed to call instead, at each step of each rank under ZeRO-3.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

"""Which containers may be forks of a warm interpreter."""

from __future__ import annotations

import pytest
from devcluster.node.warm import module_of, read_at_import

ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "POD_NAME": "x"}


@pytest.mark.parametrize(
    ("command", "changed", "limit", "module"),
    [
        (["kubedistill-trainer", "student"], {}, None, "kubedistill_trainer.launch"),
        (["kubedistill-operator"], {}, None, None),
        (["python", "-c", "pass"], {}, None, None),
        (["kubedistill-trainer", "student"], {}, 1e9, None),
        (["kubedistill-trainer", "student"], {"DS_ACCELERATOR": "cuda"}, None, None),
        (["kubedistill-trainer", "student"], {"OMP_NUM_THREADS": "2"}, None, None),
    ],
)
def test_module_of(
    command: list[str], changed: dict[str, str], limit: float | None, module: str | None
) -> None:
    assert module_of(command, {**ENV, **changed}, limit) == module


def test_read_at_import() -> None:
    given = {**ENV, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "AWS_ACCESS_KEY_ID": "k"}
    kept = {"DS_ACCELERATOR", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTHONUNBUFFERED"}
    assert set(read_at_import(given)) == kept

"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from endpoint_kit import Mind, Server, serving
from hypothesis import settings

# How long an example takes depends on what else the machine does: no statement about the code.
settings.register_profile("kubedistill", deadline=None, print_blob=True)
settings.load_profile("kubedistill")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of `--dist loadfile`."""
    from lanes import Lanes

    return Lanes(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="module")
def mind() -> Mind:
    """A tiny model with its tokenizer."""
    return Mind.tiny()


@pytest.fixture
def server(mind: Mind) -> Iterator[Server]:
    """An endpoint that it answers behind."""
    with serving(mind) as running:
        yield running

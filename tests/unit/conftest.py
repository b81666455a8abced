"""The charts, for the tests of both."""

from __future__ import annotations

import pytest
from charts_kit import CHAIN, OPERATOR, Chart


@pytest.fixture
def operator() -> Chart:
    return Chart(OPERATOR)


@pytest.fixture
def chain() -> Chart:
    return Chart(CHAIN)

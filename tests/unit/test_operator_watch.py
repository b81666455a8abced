"""Where the watches connect to."""

from __future__ import annotations

import pytest
from kubedistill_operator.watch import server_of


@pytest.mark.parametrize(
    ("environment", "server"),
    [
        ({}, None),
        ({"KUBERNETES_SERVICE_HOST": ""}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, "https://10.96.0.1:443"),
        (
            {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": "36443"},
            "https://127.0.0.1:36443",
        ),
        (
            {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"},
            "https://[fd00::1]:443",
        ),
    ],
)
def test_the_api_server_is_the_one_that_the_kubelet_names(
    environment: dict[str, str], server: str | None
) -> None:
    assert server_of(environment) == server

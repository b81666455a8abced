"""Ports for the parts of a test."""

from __future__ import annotations

from devcluster.process import free_port


def test_no_port_is_given_twice_in_a_row_of_many() -> None:
    """Whoever gets one may take it later: a rank's meeting place was another rank's exporter's."""
    ports = [free_port() for _ in range(900)]
    assert len(set(ports)) == 900

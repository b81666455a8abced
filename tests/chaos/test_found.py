"""What the faults found, each in its smallest form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer import outcome
from kubedistill_trainer.store import Store
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)

from chaos.faults import At, Fault, Kind
from chaos.s3_proxy import S3Proxy


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[S3Proxy]:  # noqa: F811
    with S3Proxy(s3.endpoint) as running:
        yield running


def through(proxy: S3Proxy, s3: S3Server) -> Store:  # noqa: F811
    """A store behind the proxy, at a prefix of its own."""
    return Store(s3.uri(), endpoint=proxy.endpoint("a"), limits=s3.limits)


def test_a_record_that_is_garbled_on_its_way_is_not_taken(
    proxy: S3Proxy,
    s3: S3Server,  # noqa: F811
) -> None:
    """SeaweedFS does not compare a body with the SHA-256 that was signed."""
    store = through(proxy, s3)
    proxy.begin(At("a", 0, Fault(Kind.GARBLE_REQUEST)))
    store.put("record", b"a COMMIT", only_if_absent=True)
    assert store.get("record") == b"a COMMIT"
    assert [entry.status for entry in proxy.log] == [400, 200, 200]


def test_a_shard_that_is_garbled_on_its_way_is_not_taken(
    proxy: S3Proxy,
    s3: S3Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    store = through(proxy, s3)
    (tmp_path / "shard").write_bytes(bytes(range(256)) * 1000)
    proxy.begin(At("a", 0, Fault(Kind.GARBLE_REQUEST)))
    store.upload_file("shard", tmp_path / "shard")
    assert store.get("shard") == (tmp_path / "shard").read_bytes()


@pytest.mark.parametrize(
    "said",
    [
        "Connection closed by peer [127.0.0.1]:1",
        "[pair.cc:545] Read error [127.0.0.1]:45952: Connection reset by peer. This is typically",
        "[pair.cc:566] Write error [127.0.0.1]:45952: Broken pipe",
    ],
)
def test_gloo_says_in_several_ways_that_a_peer_is_lost(said: str) -> None:
    code, told = outcome.of_exception(RuntimeError(said))
    assert (code, told.reason) == (ExitCode.PEER_LOST, "PeerLost")

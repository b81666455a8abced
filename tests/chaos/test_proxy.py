"""The proxy before S3: what it says that it did, it did."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kubedistill_trainer.store import Store
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)

from chaos.faults import PASS, At, Fault, Kind
from chaos.s3_proxy import S3Proxy


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[S3Proxy]:  # noqa: F811
    with S3Proxy(s3.endpoint) as running:
        yield running


_OF_REQUESTS = (Kind.TRUNCATE_REQUEST, Kind.GARBLE_REQUEST)


@pytest.mark.parametrize("kind", [*_OF_REQUESTS, Kind.TRUNCATE, Kind.GARBLE])
@pytest.mark.parametrize("method", ["get", "put"])
def test_what_has_no_body_is_not_said_to_be_broken(
    proxy: S3Proxy,
    s3: S3Server,  # noqa: F811
    kind: Kind,
    method: str,
) -> None:
    store = Store(s3.uri(), endpoint=proxy.endpoint("a"), limits=s3.limits)
    store.put("x", b"xxxx")
    proxy.begin(At("a", 0, Fault(kind)))
    store.get("x") if method == "get" else store.put("x", b"yy")
    fits = (method == "put") == (kind in _OF_REQUESTS)
    met = [entry.fault for entry in proxy.log if entry.fault != PASS]
    assert met == ([Fault(kind)] if fits else [])

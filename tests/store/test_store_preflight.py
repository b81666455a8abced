"""The pre-flight: it passes a good store, and refuses a bad one in a sentence."""

from __future__ import annotations

import pytest
from kubedistill_trainer.store import (
    AccessDenied,
    NoSuchBucket,
    Store,
    StoreError,
    StoreUnavailable,
    UnsupportedStore,
    preflight,
)
from s3_fixture import Faults, S3Server, s3  # noqa: F401  (s3 is a fixture)


def test_a_good_store_passes_and_is_left_clean(s3: S3Server) -> None:  # noqa: F811
    store = s3.store()
    preflight(store)
    assert list(store.list()) == []


def test_a_lost_answer_does_not_make_a_good_store_bad(s3: S3Server) -> None:  # noqa: F811
    store = s3.store()
    Faults(store).lose_answers("PUT", 2)
    preflight(store)


def test_a_store_that_ignores_conditions_is_refused_and_left_clean(
    s3: S3Server,  # noqa: F811
) -> None:
    store = s3.store()
    Faults(store).ignore_conditions()
    with pytest.raises(UnsupportedStore, match="ignores If-None-Match") as caught:
        preflight(store)
    assert "AWS S3, SeaweedFS" in str(caught.value), "it says what to use instead"
    assert list(store.list()) == []


def test_a_store_that_loses_races_is_refused(s3: S3Server) -> None:  # noqa: F811
    store = s3.store()

    def strip(params: dict[str, dict[str, str]], **_event: object) -> None:
        if str(params["url_path"]).endswith("/race"):
            params["headers"].pop("If-None-Match", None)

    store._connection.client.meta.events.register("before-call.s3.PutObject", strip)
    with pytest.raises(UnsupportedStore, match="8 of 8 simultaneous"):
        preflight(store)
    assert list(store.list()) == []


def test_what_is_wrong_is_named(
    s3: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(NoSuchBucket):
        preflight(Store("s3://no-such-bucket", endpoint=s3.endpoint, limits=s3.limits))
    with pytest.raises(StoreUnavailable):
        preflight(Store("s3://bucket", endpoint="http://127.0.0.1:1", limits=s3.limits))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessDenied) as caught:
        preflight(s3.store())
    assert isinstance(caught.value, StoreError)
    assert caught.value.operation == "list"
    assert s3.secret_key not in str(caught.value)

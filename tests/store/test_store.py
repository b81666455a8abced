"""The store against a real S3 server: contracts, and errors in words."""

from __future__ import annotations

import random
import socket
import time
from contextlib import nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_trainer.store import (
    AccessDenied,
    CredentialsMissing,
    InvalidStoreUri,
    Limits,
    NoSuchBucket,
    NotFound,
    PreconditionFailed,
    S3Uri,
    Store,
    StoreUnavailable,
)
from kubedistill_trainer.store.metrics import BYTES, ERRORS
from kubedistill_trainer.store.translate import retry_more
from s3_fixture import Faults, S3Server, s3  # noqa: F401  (s3 is a fixture)

MIB = 1024 * 1024


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def test_what_is_put_is_got(store: Store) -> None:
    store.put("a/b", b"0123456789")
    assert store.get("a/b") == b"0123456789"
    assert store.get_range("a/b", 2, 3) == b"234"
    assert store.get_range("a/b", 8, 100) == b"89"
    assert store.get_range("a/b", 0, 0) == b""
    store.put("empty", b"")
    assert store.get("empty") == b""


def test_missing_objects(store: Store, tmp_path: Path) -> None:
    assert store.head("nothing") is None
    with pytest.raises(NotFound, match="nothing"):
        store.get("nothing")
    with pytest.raises(NotFound):
        store.download_file("nothing", tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert list(store.list("nothing")) == []
    store.delete(["nothing"])


def test_a_conditional_put_creates_and_never_overwrites(store: Store) -> None:
    store.put("slot", b"first", only_if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put("slot", b"second", only_if_absent=True)
    assert store.get("slot") == b"first"
    store.put("slot", b"third")
    assert store.get("slot") == b"third"


def test_list_is_sorted_and_relative(store: Store) -> None:
    keys = ["a", "a-b", "a/b", "a/b/c", "b/1", "b/10", "b/2"]
    for key in reversed(keys):
        store.put(key, key.encode())
    assert [info.key for info in store.list()] == sorted(keys)
    assert [info.key for info in store.list("b/1")] == ["b/1", "b/10"]
    assert [info.key for info in store.child("a").list()] == ["b", "b/c"]
    assert [info.size_bytes for info in store.list("a/")] == [3, 5]
    head = store.head("a/b")
    assert head is not None
    assert head == next(info for info in store.list("a/") if info.key == "a/b")


def test_delete_takes_more_than_one_request_holds(store: Store) -> None:
    store.put("kept", b"")
    store.put("gone", b"")
    store.delete([*(f"never-{number}" for number in range(1000)), "gone"])
    assert [info.key for info in store.list()] == ["kept"]


def test_big_files_go_in_parts(store: Store, tmp_path: Path) -> None:
    content = bytes(range(256)) * (40 * MIB // 256)
    (tmp_path / "up").write_bytes(content)
    before = BYTES.labels("upload")._value.get()
    faults = Faults(store)
    store.upload_file("big", tmp_path / "up")
    assert sum(request.startswith("PUT") for request in faults.requests) == 3
    store.download_file("big", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == content
    assert store.get("big") == content
    assert BYTES.labels("upload")._value.get() - before == len(content)


def test_stale_multipart_uploads_are_aborted(store: Store) -> None:
    client = store._connection.client
    key = f"{store.prefix}/data/part"
    client.create_multipart_upload(Bucket=store.bucket, Key=key)
    store.put("later", b"")
    later = store.head("later")
    assert later is not None
    assert store.abort_uploads("other/", later.last_modified) == 0
    time.sleep(1.1)  # the server's clock counts seconds
    store.put("later", b"")
    later = store.head("later")
    assert later is not None
    assert store.abort_uploads("data/", later.last_modified) == 1
    assert store.abort_uploads("data/", later.last_modified) == 0


def test_uploads_of_writers_that_must_be_dead_are_aborted_by_the_stores_clock(store: Store) -> None:
    client = store._connection.client
    client.create_multipart_upload(Bucket=store.bucket, Key=f"{store.prefix}/data/part")
    time.sleep(1.1)  # the server's clock counts seconds
    assert store.abort_older_uploads("data/", 3600) == 0
    assert store.abort_older_uploads("other/", 0) == 0
    assert store.abort_older_uploads("data/", 0) == 1
    assert store.uploads() == ()


def test_a_lost_answer_is_retried_and_counted(store: Store) -> None:
    before = ERRORS.labels("PutObject", "ConnectionClosedError")._value.get()
    Faults(store).lose_answers("PUT")
    store.put("key", b"value")
    assert store.get("key") == b"value"
    assert ERRORS.labels("PutObject", "ConnectionClosedError")._value.get() == before + 1


class Conflicting(BaseHTTPRequestHandler):
    """Answers 409, 429 and then 200, as AWS does to conditional writes that met."""

    answers: ClassVar[list[tuple[int, str]]] = []

    def do_PUT(self) -> None:
        status, code = self.answers.pop(0) if self.answers else (200, "")
        self.rfile.read(int(self.headers["Content-Length"]))
        body = f"<Error><Code>{code}</Code></Error>".encode() if code else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        ([(409, "ConditionalRequestConflict"), (429, "TooManyRequests")], None),
        ([(503, "SlowDown"), (500, "InternalError")], None),
        ([(409, "ConditionalRequestConflict")] * 9, StoreUnavailable),
        ([(503, "SlowDown")] * 9, StoreUnavailable),
        ([(412, "PreconditionFailed")], PreconditionFailed),
    ],
    ids=["conflict", "throttled", "conflict for ever", "throttled for ever", "taken"],
)
def test_retries_are_bounded(
    s3: S3Server,  # noqa: F811
    answers: list[tuple[int, str]],
    wanted: type[Exception] | None,
) -> None:
    Conflicting.answers = list(answers)
    with ThreadingHTTPServer(("127.0.0.1", 0), Conflicting) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        store = Store("s3://bucket/x", endpoint=endpoint, limits=Limits(attempts=3))
        try:
            with pytest.raises(wanted) if wanted else nullcontext():
                store.put("key", b"value", only_if_absent=True)
        finally:
            server.shutdown()
            thread.join()
    sent = len(answers) - len(Conflicting.answers)
    assert sent == min(len(answers), 3)


def test_our_own_retries_leave_the_generator_of_training_alone() -> None:
    state = random.getstate()
    answer = SimpleNamespace(status_code=429)
    parsed = {"Error": {"Code": "TooManyRequests"}}
    assert retry_more(response=(answer, parsed), attempts=1, limit=2) is not None
    assert retry_more(response=(answer, parsed), attempts=2, limit=2) is None
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("access_key", "secret_key"),
    [("nobody", "test"), (None, "wrong-secret")],
    ids=["unknown key", "wrong secret"],
)
def test_wrong_keys(
    s3: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    access_key: str | None,
    secret_key: str,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access_key or s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
    store = s3.store()
    with pytest.raises(AccessDenied, match=r"storage\.secretRef"):
        store.put("key", b"")
    with pytest.raises(AccessDenied):
        store.head("key")


def test_no_keys_at_all(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(CredentialsMissing, match="AWS_ACCESS_KEY_ID"):
        s3.store().get("key")


def test_a_missing_bucket(s3: S3Server) -> None:  # noqa: F811
    store = Store("s3://no-such-bucket/x", endpoint=s3.endpoint)
    with pytest.raises(NoSuchBucket, match=r"'no-such-bucket' does not exist at http"):
        store.get("key")


def test_a_closed_port_is_unavailable_soon(s3: S3Server) -> None:  # noqa: F811
    with socket.socket() as closed:  # bound and not listening
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        store = Store("s3://bucket/x", endpoint=endpoint, limits=Limits(attempts=3))
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"storage\.endpoint"):
            store.get("key")
    assert time.monotonic() - started < 15


def test_a_store_that_drips_meets_the_deadline(s3: S3Server) -> None:  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                try:
                    for _ in range(1000):
                        connection.sendall(b"x")
                        time.sleep(0.1)
                except OSError:
                    return

        thread = Thread(target=drip)
        thread.start()
        limits = Limits(attempts=2, deadline_floor_seconds=1.0, read_timeout_seconds=5)
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="by the deadline"):
            Store("s3://bucket/x", endpoint=endpoint, limits=limits).get("key")
        assert time.monotonic() - started < 10
        thread.join(20)


def test_an_upload_that_stalls_meets_the_deadline(
    s3: S3Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_bytes(bytes(40 * MIB))
    limits = replace(s3.limits, attempts=2, deadline_floor_seconds=0.2, read_timeout_seconds=2)
    limits = replace(limits, slowest_bytes_per_second=1e12)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:  # accepts, never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="s3://bucket/x/file"):
            Store("s3://bucket/x", endpoint=endpoint, limits=limits).upload_file(
                "file", tmp_path / "file"
            )
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("text", "bucket", "prefix"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("s3://my.bucket-1/a/b/", "my.bucket-1", "a/b"),
        ("s3://bucket/ä b", "bucket", "ä b"),
    ],
)
def test_uris(text: str, bucket: str, prefix: str) -> None:
    assert S3Uri.parse(text) == S3Uri(bucket, prefix)


@pytest.mark.parametrize(
    "text",
    ["", "bucket/a", "http://bucket/a", "s3:/bucket", "s3://", "s3://B/a", "s3://ab/x",
     "s3://bucket//a", "s3://bucket/a//b", "s3://bucket/../a", "s3://bucket/a\nb",
     "s3://bucket/" + "x" * 1025],
)  # fmt: skip
def test_bad_uris_are_refused(text: str) -> None:
    with pytest.raises(InvalidStoreUri):
        S3Uri.parse(text)


@pytest.mark.parametrize(
    "endpoint", ["store:9000", "ftp://store", "http://", "http://a:b", "http://a b"]
)
def test_bad_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(InvalidStoreUri):
        Store("s3://bucket", endpoint=endpoint)


@pytest.mark.parametrize("region", ["\x16+í", "123", "-east", "us_east"])
def test_bad_regions_are_refused(region: str) -> None:
    """A teacher's pod failed on one and was tried again for minutes (make chaos SEED=0
    FAMILY=operator-fuzz CASE=7)."""
    with pytest.raises(InvalidStoreUri, match="not a region; write one such as us-east-1"):
        Store("s3://bucket", region=region)


@given(parts=st.lists(st.text("abcXYZ09-_.", min_size=1, max_size=8), max_size=5))
def test_a_uri_survives_its_text(parts: list[str]) -> None:
    if any(part in (".", "..") for part in parts):
        return
    uri = S3Uri("bucket", "/".join(parts))
    assert S3Uri.parse(str(uri)) == uri


def test_limits_may_come_from_the_environment() -> None:
    given = {
        "KUBEDISTILL_STORE_READ_TIMEOUT_SECONDS": "2.5",
        "KUBEDISTILL_STORE_ATTEMPTS": "3",
        "KUBEDISTILL_STORE_MULTIPART_THRESHOLD_BYTES": "8388608",
        "KUBEDISTILL_STORE_MULTIPART_PART_BYTES": "5242880",
    }
    limits = Limits.from_environment(given, upload_bytes_per_second=7)
    assert limits == Limits(
        read_timeout_seconds=2.5,
        attempts=3,
        upload_bytes_per_second=7,
        multipart_threshold_bytes=8 << 20,
        multipart_part_bytes=5 << 20,
    )
    assert Limits.from_environment({}) == Limits()
    for wrong in ("soon", "0", "-1", "nan"):
        with pytest.raises(ValueError, match=f"READ_TIMEOUT_SECONDS: found '{wrong}'; write"):
            Limits.from_environment({"KUBEDISTILL_STORE_READ_TIMEOUT_SECONDS": wrong})


def test_a_bandwidth_below_the_slowest_speed_stretches_the_deadline() -> None:
    assert Limits(deadline_floor_seconds=10).deadline_seconds(1 << 20) == 11
    slow = Limits(deadline_floor_seconds=10, upload_bytes_per_second=1 << 10)
    assert slow.deadline_seconds(1 << 20) == 10 + 2048

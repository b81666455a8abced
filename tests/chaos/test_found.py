"""What the faults found, each in its smallest form."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer import outcome
from kubedistill_trainer.checkpoint.log import CommitLog, slot_key
from kubedistill_trainer.checkpoint.records import Commit, ShardRecord
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.models import folder
from kubedistill_trainer.store import AccessDenied, Limits, NotFound, Store
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)

from chaos.faults import PASS, At, Call, Fault, Kind
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


def test_half_an_exported_model_is_no_model(
    proxy: S3Proxy,
    s3: S3Server,  # noqa: F811
    tmp_path: Path,
) -> None:
    """config.json went first; who was pointed at the folder then took weights without a tokenizer."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt"):
        (tmp_path / name).write_text('{"model_type": "llama"}')
    for number in range(4):
        proxy.begin(At("a", number, Fault(Kind.ANSWER, 403, "AccessDenied")))
        store = through(proxy, s3).child(f"ended-at-{number}")
        with pytest.raises(AccessDenied):
            folder.upload(tmp_path, store)
        [digest] = {info.key.split("/")[0] for info in store.list()} or {"none"}
        with pytest.raises(InputsRefused, match=r"no config\.json"):
            folder.read_config(store.child(digest), "spec.student.model")
    _, whole = folder.upload(tmp_path, through(proxy, s3).child("whole"))
    assert folder.read_config(whole, "spec.student.model") == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("accepted", "code"),
    [(False, ExitCode.UNREADABLE_INPUT), (True, ExitCode.STORAGE_UNAVAILABLE)],
)
def test_inputs_in_a_bucket_that_vanishes_may_come_back(
    proxy: S3Proxy,
    s3: S3Server,  # noqa: F811
    accepted: bool,
    code: ExitCode,
) -> None:
    """The job ended for good, as if its inputs could never be read."""
    store = through(proxy, s3)
    proxy.begin(At("a", 0, Fault(Kind.ANSWER, 404, "NoSuchBucket")))
    with pytest.raises(InputsRefused) as caught:
        folder.read_config(store, "spec.student.model")
    found, told = outcome.of_exception(caught.value, accepted=accepted)
    assert (found, bool(told.problems)) == (code, not accepted)


def test_a_clock_that_is_off_is_not_blamed_on_the_keys(
    proxy: S3Proxy,
    s3: S3Server,  # noqa: F811
) -> None:
    store = through(proxy, s3)
    proxy.begin(At("a", 0, Fault(Kind.ANSWER, 403, "RequestTimeTooSkewed")))
    with pytest.raises(AccessDenied, match=r"clock of this machine.*NTP"):
        store.put("x", b"x")


def test_a_full_disk_changes_no_exit_code(tmp_path: Path) -> None:
    """The outcome could not be written, and the rank ended as one with an unknown error."""
    (tmp_path / "outcome-0.json").symlink_to("/dev/full")
    script = (
        "from pathlib import Path; from types import SimpleNamespace; "
        "from kubedistill_trainer.failures import RunFailure; "
        "from kubedistill_trainer.rank import leave\n"
        "def work(): raise RunFailure(15, 'the store is away')\n"
        f"leave(SimpleNamespace(scratch=Path({str(tmp_path)!r})), 0, work)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == ExitCode.STORAGE_UNAVAILABLE, ended.stderr


@pytest.mark.parametrize(
    "said",
    [
        "Connection closed by peer [127.0.0.1]:1",
        "[pair.cc:545] Read error [127.0.0.1]:45952: Connection reset by peer. This is typically",
        "[pair.cc:566] Write error [127.0.0.1]:45952: Broken pipe",
        "[unbound_buffer.cc:89] Timed out waiting 600000ms for recv operation to complete",
    ],
)
def test_gloo_says_in_several_ways_that_a_peer_is_lost(said: str) -> None:
    code, told = outcome.of_exception(RuntimeError(said))
    assert (code, told.reason) == (ExitCode.PEER_LOST, "PeerLost")


_PART_BYTES = 5 << 20
_IN_PARTS = Limits(
    attempts=3, multipart_threshold_bytes=_PART_BYTES, multipart_part_bytes=_PART_BYTES
)


@pytest.mark.parametrize("slot", [0, 1])
def test_a_record_that_is_garbled_on_its_way_back_is_not_rejected(
    proxy: S3Proxy,
    s3: S3Server,  # noqa: F811
    slot: int,
) -> None:
    """The newest commit was given up for good, for one bit that only its reader saw."""
    store = through(proxy, s3)
    written = CommitLog(store, fence=1)
    written.take_over()
    shard = ShardRecord(path="a", rank=0, shared=False, size_bytes=0, sha256="0" * 64, crc32c=[])
    written.append(
        Commit, step=2, world_size=1, data="data/e1/s2/x", shards=[shard], cursor={},
        config_digest="a",
    )  # fmt: skip
    key = f"/{slot_key(slot)}"

    def garble_once(call: Call) -> Fault:
        met = any(entry.fault != PASS for entry in proxy.log)
        return Fault(Kind.GARBLE) if call.path.endswith(key) and not met else PASS

    proxy.begin(garble_once)
    read = CommitLog(store)
    read.read()
    assert [entry.fault.kind for entry in proxy.log if entry.fault != PASS] == [Kind.GARBLE]
    assert read.unreadable() == []
    assert [commit.record.step for commit in read.commits()] == [2]


class _Forgotten:
    """The first completion of an upload meets `fault`, and from then on its id is forgotten."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._times = 0

    def __call__(self, call: Call) -> Fault:
        if call.method != "POST" or "uploadId" not in call.target:
            return PASS
        self._times += 1
        return self._fault if self._times == 1 else Fault(Kind.ANSWER, 404, "NoSuchUpload")


@pytest.mark.parametrize("source", ["stream", "file"])
def test_a_completion_whose_answer_was_lost_is_not_a_failed_upload(
    proxy: S3Proxy,
    s3: S3Server,  # noqa: F811
    tmp_path: Path,
    source: str,
) -> None:
    """botocore repeats it, and some stores do not know the upload any more: the save failed."""
    data = os.urandom(2 * _PART_BYTES + 1)
    store = Store(s3.uri(), endpoint=proxy.endpoint("a"), limits=_IN_PARTS)
    proxy.begin(_Forgotten(Fault(Kind.RESET_AFTER)))
    if source == "file":
        (tmp_path / "shard").write_bytes(data)
        store.upload_file("shard", tmp_path / "shard")
    else:
        # About as long as it says.
        store.upload_stream("shard", io.BytesIO(data), len(data) - 7)
    assert store.get("shard") == data


@pytest.mark.parametrize("before", [b"", b"short", bytes(2 * _PART_BYTES)])
def test_an_upload_that_somebody_ended_has_failed(
    proxy: S3Proxy,
    s3: S3Server,  # noqa: F811
    before: bytes,
) -> None:
    """Whatever lies at its key from another time is not it."""
    store = Store(s3.uri(), endpoint=proxy.endpoint("a"), limits=_IN_PARTS)
    data = os.urandom(2 * _PART_BYTES)
    if before:
        store.put("shard", before)
        # The store's clock counts seconds.
        written = store.head("shard")
        assert written is not None
        while (clock := _write_and_head(store)) <= written.last_modified.timestamp() + 1:
            assert clock
    proxy.begin(_Forgotten(Fault(Kind.ANSWER, 404, "NoSuchUpload")))
    with pytest.raises(NotFound, match="upload"):
        store.upload_stream("shard", io.BytesIO(data), len(data))
    assert store.uploads() == ()


def _write_and_head(store: Store) -> float:
    store.put("clock", b"")
    written = store.head("clock")
    assert written is not None
    return written.last_modified.timestamp()

"""Records: what is written is read, and anything else is refused."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_trainer.checkpoint.records import (
    Commit,
    Fence,
    Record,
    RecordTooNew,
    RecordUnreadable,
    Reject,
    Retire,
    ShardRecord,
    decode,
    digest,
    encode,
)

counts = st.integers(0, 2**63)
texts = st.text(max_size=20)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
common: dict[str, Any] = {
    "nonce": st.uuids().map(lambda u: u.hex),
    "fence": counts,
    "attempt": texts,
    "trainer_version": texts,
    "time": texts,
    "run": texts,
}
shards = st.builds(
    ShardRecord,
    path=st.text(min_size=1, max_size=20),
    rank=counts,
    shared=st.booleans(),
    size_bytes=counts,
    sha256=hashes,
    crc32c=st.lists(st.integers(0, 2**32 - 1), max_size=4),
)
commits = st.builds(
    Commit,
    **common,
    step=counts,
    world_size=st.integers(1, 4096),
    data=st.text(min_size=1, max_size=20),
    shards=st.lists(shards, min_size=1, max_size=3),
    cursor=st.dictionaries(texts, json_values, max_size=3),
    config_digest=texts,
    config=st.dictionaries(texts, json_values, max_size=3),
)
records = st.one_of(
    st.builds(Fence, **common),
    commits,
    st.builds(Reject, **common, sequence=counts, reason=texts),
    st.builds(
        Retire, **common, sequences=st.lists(counts, min_size=1, max_size=3), data=st.lists(texts)
    ),
)
FENCE = Fence(nonce="0" * 32, fence=1, attempt="a", trainer_version="1", time="now")


@given(record=records)
def test_what_is_written_is_read(record: Record) -> None:
    data = encode(record)
    assert decode(data) == record
    assert json.loads(data)["sha256"] == digest(record)


@given(record=records, place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_seen(record: Record, place: float, bit: int) -> None:
    data = bytearray(encode(record))
    data[int(place * len(data))] ^= 1 << bit
    try:
        found = decode(bytes(data))
    except RecordUnreadable:
        return
    # `1E5` for `1e5` and `\u00E9` for `\u00e9` are the same JSON: the flip changed nothing.
    assert found == record


@given(record=records, kept=st.floats(0, 1, exclude_max=True))
def test_a_torn_record_is_seen(record: Record, kept: float) -> None:
    data = encode(record)
    with pytest.raises(RecordUnreadable):
        decode(data[: int(kept * len(data))])


def signed(**changes: Any) -> bytes:
    """FENCE with other fields and a hash that fits them."""
    fields = FENCE.model_dump(mode="json") | changes
    fields = {name: value for name, value in fields.items() if value is not ...}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return json.dumps(fields | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode()


def test_the_helper_signs_as_the_code_does() -> None:
    assert decode(signed()) == FENCE


@pytest.mark.parametrize(
    "data",
    [
        signed(kind="LATEST"),
        signed(kind=...),
        signed(version=0),
        signed(version="3"),
        signed(version=3)[:-3] + b'0"}',
        signed(fence=-1),
        signed(fence="1"),
        signed(fence=1.5),
        signed(nonce="short"),
        signed(nonce=...),
        signed(extra=1),
        b"",
        b"null",
        b"[]",
        b'"FENCE"',
        b"{}",
        b"\x80\x04\x95",
        b'{"fence": NaN}',
        b'{"sha256": "", "fence": NaN}',
        b'{"sha256": "", "version": 9, "fence": 1e999}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(RecordUnreadable):
        decode(data)


def test_a_commit_without_shards_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="shards"):
        Commit(
            **FENCE.model_dump(exclude={"kind"}),
            step=1, world_size=1, data="d", shards=[], cursor={}, config_digest="",
        )  # fmt: skip


def test_a_whole_record_of_a_later_version_is_not_taken_for_damage() -> None:
    with pytest.raises(RecordTooNew, match=r"version 3, written by kubedistill 9\.1") as caught:
        decode(signed(version=3, trainer_version="9.1", kind="LATEST", extra=[1]))
    assert (caught.value.version, caught.value.trainer_version) == (3, "9.1")


def test_a_record_of_version_1_is_read_and_keeps_its_hash() -> None:
    data = signed(version=1, run=..., restart=...)
    record = decode(data)
    assert (record.version, record.run) == (1, "")
    assert digest(record) == json.loads(data)["sha256"]


def test_empty_fields_of_version_2_are_left_out() -> None:
    assert not {"run", "restart"} & set(json.loads(encode(FENCE)))
    named = FENCE.model_copy(update={"run": "team/job/uid"})
    assert json.loads(encode(named))["run"] == "team/job/uid"
    assert decode(encode(named)) == named

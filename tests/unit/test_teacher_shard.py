"""Shards: what goes in comes out, and damage anywhere is seen before data is returned."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kubedistill_trainer.teacher.codec import decode_outputs, encode_outputs, token_hash
from kubedistill_trainer.teacher.errors import ShardCorrupt, StreamMismatch
from kubedistill_trainer.teacher.shard import ShardReader, ShardSummary, ShardWriter
from teacher_builders import (
    VOCABULARY,
    assert_is_sample,
    hash_of,
    identity,
    outputs_of,
    tokens_of,
)


def _shard(records: dict[int, bytes], block_bytes: int = 64) -> tuple[bytes, ShardSummary]:
    writer = ShardWriter("digest", block_bytes=block_bytes)
    for sample, record in records.items():
        writer.add(sample, 1000 + sample, record)
    summary = writer.finish()
    return writer.getvalue(), summary


RECORDS = {sample: bytes([sample]) * (20 + sample) for sample in (3, 5, 9, 11)}
SHARD, SUMMARY = _shard(RECORDS)


@given(
    records=st.dictionaries(st.integers(0, 2**40), st.binary(max_size=200), min_size=1),
    block_bytes=st.integers(1, 500),
)
@settings(max_examples=50, deadline=None)
def test_round_trip_in_any_order(records: dict[int, bytes], block_bytes: int) -> None:
    data, summary = _shard(records, block_bytes)
    assert summary.count == len(records)
    assert summary.size_bytes == len(data)
    assert summary.sha256 == hashlib.sha256(data).hexdigest()
    reader = ShardReader(data, name="s", stream="digest")
    for sample in reversed(list(records)):
        assert reader.read(sample, 1000 + sample) == records[sample]


def test_a_file_reads_like_bytes(tmp_path: Path) -> None:
    path = tmp_path / "one.shard"
    writer = ShardWriter("digest", path)
    writer.add(4, 40, b"four")
    summary = writer.finish()
    assert path.stat().st_size == summary.size_bytes
    with ShardReader(path, name="s", stream="digest") as reader:
        assert reader.read(4, 40) == b"four"
        with pytest.raises(KeyError):
            reader.read(5, 40)


def test_every_flipped_bit_is_detected() -> None:
    """One bit of every byte: header, blocks, footer and tail."""
    for offset in range(len(SHARD)):
        bad = bytearray(SHARD)
        bad[offset] ^= 1 << (offset % 8)
        with pytest.raises(ShardCorrupt, match="shard here"):
            _read_all(bytes(bad))


def test_a_flip_in_a_block_names_the_sample_and_spares_the_others() -> None:
    with ShardReader(SHARD, name="here") as good:
        offset = good._blocks[1][0]
    bad = bytearray(SHARD)
    bad[offset + 6] ^= 1
    reader = ShardReader(bytes(bad), name="here")
    assert reader.read(3) == RECORDS[3]
    with pytest.raises(ShardCorrupt, match=r"shard here, sample 11: CRC32C of block 1 is"):
        reader.read(11)


def test_every_truncation_is_detected() -> None:
    for size in range(len(SHARD)):
        with pytest.raises(ShardCorrupt):
            _read_all(SHARD[:size])


def test_other_tokens_are_refused() -> None:
    with pytest.raises(StreamMismatch, match="token hash of sample 3"):
        ShardReader(SHARD, name="here").read(3, 7)


def test_a_shard_of_another_stream_is_refused() -> None:
    with pytest.raises(
        StreamMismatch, match="stream of shard here is digest, this job needs other"
    ):
        ShardReader(SHARD, name="here", stream="other")


def test_a_sample_goes_in_once_and_an_empty_shard_is_none() -> None:
    writer = ShardWriter("digest")
    with pytest.raises(ValueError, match="at least one"):
        writer.finish()
    writer.add(1, 1, b"")
    with pytest.raises(ValueError, match="sample 1 is already"):
        writer.add(1, 1, b"")


def test_records_carry_both_payloads() -> None:
    specs = identity().payloads
    record = encode_outputs(outputs_of(3), specs, VOCABULARY)
    assert_is_sample(decode_outputs(record, specs), 3)
    with pytest.raises(ValueError, match="payload"):
        decode_outputs(record[:4], specs)
    with pytest.raises(ValueError, match="payloads take"):
        decode_outputs(record + b"x", specs)


def test_token_hash_depends_on_values_and_order_only() -> None:
    tokens = tokens_of(1)
    assert hash_of(1) == token_hash(tokens.tolist()) == token_hash(tokens.to(torch.int32))
    assert hash_of(1) != token_hash(tokens.flip(0))
    assert 0 <= hash_of(1) < 2**64


def _read_all(data: bytes) -> None:
    reader = ShardReader(data, name="here", stream="digest")
    for sample in RECORDS:
        assert reader.read(sample, 1000 + sample) == RECORDS[sample]

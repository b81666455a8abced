"""Shards: they come down as they went up, or not at all."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kubedistill_trainer.checkpoint import CheckpointCorrupt, shards
from kubedistill_trainer.checkpoint.records import ShardRecord
from kubedistill_trainer.checkpoint.shards import PART_BYTES
from kubedistill_trainer.checkpoint.staged import Staged
from kubedistill_trainer.store import Store, StoreUnavailable
from s3_fixture import Faults, S3Server, s3  # noqa: F401  (s3 is a fixture)


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def uploaded(store: Store, folder: Path, content: bytes) -> ShardRecord:
    path = "state/mp_rank_00_model_states.pt"
    [receipt] = shards.upload(
        store, [Staged(path, len(content), lambda: io.BytesIO(content))], rank=3
    )
    return receipt


@pytest.mark.parametrize("size", [0, 1, 1000, PART_BYTES, PART_BYTES * 2 + 5])
def test_a_shard_comes_down_as_it_went_up(store: Store, tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    receipt = uploaded(store, tmp_path, content)
    assert (receipt.path, receipt.rank, receipt.shared) == (
        "state/mp_rank_00_model_states.pt",
        3,
        True,
    )
    assert receipt.size_bytes == size
    assert len(receipt.crc32c) == -(-size // PART_BYTES)
    shards.check_by_head(store, [receipt])
    shards.download(store, receipt, tmp_path / "down/a.pt")
    assert (tmp_path / "down/a.pt").read_bytes() == content
    assert [path.name for path in (tmp_path / "down").iterdir()] == ["a.pt"]


def flip(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes | None], str, bool]] = {
    "missing": (lambda content: None, "missing", True),
    "truncated": (lambda content: content[:-1], "999 bytes|999 of 1000", True),
    "empty": (lambda content: b"", "0 bytes|0 of 1000", True),
    "longer": (lambda content: content + b"x", "1001 bytes", True),
    "flipped": (flip, "CRC32C", False),
    "swapped": (lambda content: bytes(1000), "CRC32C", False),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen(store: Store, tmp_path: Path, damage: str) -> None:
    change, message, seen_by_head = DAMAGES[damage]
    content = random.Random(1).randbytes(1000)
    receipt = uploaded(store, tmp_path, content)
    changed = change(content)
    if changed is None:
        store.delete([receipt.path])
    else:
        store.put(receipt.path, changed)
    if seen_by_head:
        with pytest.raises(CheckpointCorrupt, match=message):
            shards.check_by_head(store, [receipt])
    if damage != "longer":  # a download asks for what was committed and would not see more
        with pytest.raises(CheckpointCorrupt, match=message) as caught:
            shards.download(store, receipt, tmp_path / "down")
        assert store.uri_of(receipt.path) in str(caught.value)
        assert not (tmp_path / "down").exists()
        assert not list(tmp_path.glob("*.partial"))


def test_a_truncated_big_shard_is_seen_past_its_end(store: Store, tmp_path: Path) -> None:
    content = random.Random(2).randbytes(PART_BYTES + 10)
    receipt = uploaded(store, tmp_path, content)
    store.put(receipt.path, content[:PART_BYTES])
    with pytest.raises(CheckpointCorrupt, match=f"offset {PART_BYTES}"):
        shards.download(store, receipt, tmp_path / "down")


@pytest.mark.parametrize(
    "change",
    [{"sha256": "0" * 64}, {"crc32c": [0]}, {"crc32c": []}, {"size_bytes": 999}],
    ids=str,
)
def test_a_record_that_does_not_fit_is_seen(
    store: Store, tmp_path: Path, change: dict[str, Any]
) -> None:
    receipt = uploaded(store, tmp_path, random.Random(3).randbytes(1000))
    with pytest.raises(CheckpointCorrupt):
        shards.download(store, receipt.model_copy(update=change), tmp_path / "down")


def test_a_part_garbled_once_on_its_way_is_fetched_again(store: Store, tmp_path: Path) -> None:
    receipt = uploaded(store, tmp_path, b"x" * 1000)
    garbled = []

    def garble(parsed: dict[str, Any], **_event: Any) -> None:
        if not garbled:
            body = parsed["Body"]
            garbled.append(body)
            whole = body._raw_stream.read1

            def read1(size: int) -> bytes:
                return flip(whole(size))

            body._raw_stream.read1 = read1

    store._connection.client.meta.events.register("after-call.s3.GetObject", garble)
    shards.download(store, receipt, tmp_path / "down")
    assert garbled
    assert (tmp_path / "down").read_bytes() == b"x" * 1000


def test_a_store_that_is_away_says_nothing_of_the_shard(store: Store, tmp_path: Path) -> None:
    receipt = uploaded(store, tmp_path, b"x" * 1000)
    Faults(store).lose_answers("GET", 100)
    with pytest.raises(StoreUnavailable):
        shards.download(store, receipt, tmp_path / "down")

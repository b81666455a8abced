"""Identities: one request, one address; a stream that does not match is refused by field."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kubedistill_trainer.teacher.errors import StreamCorrupt, StreamDamaged, StreamMismatch
from kubedistill_trainer.teacher.head import load_head, publish_head
from kubedistill_trainer.teacher.manifest import (
    MANIFEST_KEY,
    StreamIdentity,
    check_identity,
    publish_manifest,
    read_manifest,
)
from kubedistill_trainer.teacher.partition_log import LogRecord, TextShard
from kubedistill_trainer.teacher.payload_spec import HiddenSpec, SparseSpec
from kubedistill_trainer.teacher.repairs import head_is_sound
from teacher_builders import GRID, HIDDEN, VOCABULARY, MemoryStore, identity, manifest

CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("teacher_digest", {"teacher_digest": "x"}, "teacher_digest"),
    ("tokenizer_digest", {"tokenizer_digest": "x"}, "tokenizer_digest"),
    ("chat_template_digest", {"chat_template_digest": "x"}, "chat_template_digest"),
    ("teacher_vocab_size", {"teacher_vocab_size": 65}, "teacher_vocab_size"),
    ("visible_vocab_size", {"visible_vocab_size": 50}, "visible_vocab_size"),
    ("hidden_size", {"hidden_size": 1}, "hidden_size"),
    ("dataset_digest", {"dataset_digest": "x"}, "dataset_digest"),
    ("packing_digest", {"packing_digest": "x"}, "packing_digest"),
    ("sequence_length", {"sequence_length": 9}, "sequence_length"),
    ("seed", {"seed": 8}, "seed"),
    ("license_spdx", {"license_spdx": None}, "license_spdx"),
    ("format_version", {"format_version": 99}, "format_version"),
    ("payloads", {"payloads": (HiddenSpec(),)}, "payloads"),
    (
        "k",
        {"payloads": (SparseSpec(k=11, temperatures=GRID), HiddenSpec())},
        r"payloads\[0\]\.k",
    ),
    (
        "temperatures",
        {"payloads": (SparseSpec(k=10, temperatures=(1.0,)), HiddenSpec())},
        r"payloads\[0\]\.temperatures",
    ),
    (
        "group_size",
        {"payloads": (SparseSpec(k=10, temperatures=GRID), HiddenSpec(group_size=16))},
        r"payloads\[1\]\.group_size",
    ),
]


@pytest.mark.parametrize(
    ("changes", "field"), [row[1:] for row in CHANGES], ids=[r[0] for r in CHANGES]
)
def test_each_field_is_in_the_digest_and_named_when_it_differs(
    changes: dict[str, Any], field: str
) -> None:
    found = identity(**changes)
    assert found.digest() != identity().digest()
    with pytest.raises(StreamMismatch, match=rf"its {field} is .*, this job needs "):
        check_identity(found, identity())


def test_every_field_of_the_identity_is_covered_here() -> None:
    assert set(StreamIdentity.model_fields) <= {row[0] for row in CHANGES}


def test_equal_requests_have_one_address() -> None:
    check_identity(identity(), identity())
    assert identity().address == f"streams/{identity().digest()}"
    assert StreamIdentity.model_validate_json(identity().model_dump_json()) == identity()
    assert len(identity().digest()) == 64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"visible_vocab_size": 65}, "exceeds teacher_vocab_size"),
        ({"payloads": (HiddenSpec(), HiddenSpec())}, "name a kind twice"),
        ({"payloads": (SparseSpec(k=61),)}, "k 61 exceeds the vocabulary 60"),
    ],
)
def test_identities_that_make_no_sense(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        identity(**changes)


def test_the_first_writer_decides_the_layout() -> None:
    store = MemoryStore()
    assert read_manifest(store, identity()) is None
    first = publish_manifest(store, manifest(partitions=3))
    second = publish_manifest(store, manifest(partitions=5))
    assert first == second
    assert second.partitions == 3
    with pytest.raises(StreamMismatch, match="samples is 12, this job needs 13"):
        publish_manifest(store, manifest(samples=13))


def test_a_manifest_of_another_stream_or_a_torn_one_is_refused() -> None:
    store = MemoryStore()
    publish_manifest(store, manifest())
    key = f"{identity().address}/{MANIFEST_KEY}"
    good = store.objects[key]
    store.objects[key] = good.replace(b"sha256:teacher", b"sha256:student")
    with pytest.raises(StreamMismatch, match="teacher_digest is sha256:student"):
        read_manifest(store, identity())
    store.objects[key] = good[:-5]
    with pytest.raises(StreamCorrupt, match="not a manifest"):
        read_manifest(store, identity())


def test_samples_are_dealt_to_partitions_completely_and_once() -> None:
    layout = manifest(samples=11, partitions=4)
    dealt = [
        layout.sample_at(partition, position)
        for partition in range(4)
        for position in range(layout.samples_of(partition))
    ]
    assert sorted(dealt) == list(range(11))
    assert all(layout.partition_of(sample) == sample % 4 for sample in dealt)


def test_the_head_is_stored_once_and_verified(tmp_path: Path) -> None:
    store = MemoryStore()
    weight = torch.randn(VOCABULARY, HIDDEN).to(torch.bfloat16)
    digest = publish_head(store, identity(), weight, tmp_path)
    assert publish_head(store, identity(), weight, tmp_path) == digest
    assert [call[0] for call in store.calls].count("put") == 1
    known = manifest().model_copy(update={"head_sha256": digest})
    assert torch.equal(load_head(store, known, tmp_path / "a"), weight)
    (key,) = store.keys("head/")
    store.objects[key] = store.objects[key][:-1] + b"x"
    assert torch.equal(load_head(store, known, tmp_path / "a"), weight)
    stream = store.child(identity().address)
    assert head_is_sound(stream, digest)  # as far as anybody has noticed
    with pytest.raises(StreamDamaged, match=r"head/.*wanted sha256.*write it again"):
        load_head(store, known, tmp_path / "b")
    assert not head_is_sound(stream, digest)
    publish_head(store, identity(), weight, tmp_path)
    assert head_is_sound(stream, digest)
    assert torch.equal(load_head(store, known, tmp_path / "b"), weight)
    del store.objects[key]
    with pytest.raises(StreamDamaged, match="found nothing"):
        load_head(store, known, tmp_path / "c")
    with pytest.raises(StreamMismatch, match="shape of the teacher's LM head"):
        publish_head(store, identity(), weight[1:], tmp_path)


def test_records_without_text_are_hashed_as_before_there_was_text() -> None:
    """What older writers committed is still taken for intact."""
    fields = {
        "kind": "SHARD", "partition": 1, "slot": 2, "nonce": "n", "count": 3, "key": "k",
        "size_bytes": 4, "sha256": "s", "first_sample": 5, "last_sample": 9, "tokens": 6, "version": 0,
    }  # fmt: skip
    seal = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    old = LogRecord.model_validate({**fields, "self_hash": seal})
    assert old.intact
    text = old.model_copy(update={"text": TextShard(answer_tokens=6)}).sealed()
    assert text.intact and text.self_hash != seal
    assert not text.model_copy(update={"text": TextShard(answer_tokens=7)}).intact

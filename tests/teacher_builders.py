"""Small teacher streams for tests: identities, outputs, and a store that can misbehave."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from kubedistill_trainer.store.errors import NotFound, PreconditionFailed
from kubedistill_trainer.teacher.codec import token_hash
from kubedistill_trainer.teacher.manifest import Manifest, StreamIdentity, publish_manifest
from kubedistill_trainer.teacher.payload import Hidden, TeacherOutputs, sparse_of_logits
from kubedistill_trainer.teacher.payload_spec import HiddenSpec, SparseSpec
from kubedistill_trainer.teacher.stream_writer import StreamWriter, WriterSettings

LENGTH, VOCABULARY, HIDDEN = 8, 64, 48
GRID = (1.0, 2.0, 4.0)
SMALL = WriterSettings(first_shard_bytes=3000, shard_bytes=3000)


def identity(**changes: Any) -> StreamIdentity:
    fields: dict[str, Any] = {
        "teacher_digest": "sha256:teacher",
        "tokenizer_digest": "sha256:tokenizer",
        "teacher_vocab_size": VOCABULARY,
        "visible_vocab_size": VOCABULARY - 4,
        "hidden_size": HIDDEN,
        "dataset_digest": "sha256:data",
        "packing_digest": "sha256:packing",
        "sequence_length": LENGTH,
        "payloads": (SparseSpec(k=10, temperatures=GRID), HiddenSpec()),
        "seed": 7,
        "license_spdx": "Apache-2.0",
    }
    return StreamIdentity(**(fields | changes))


def manifest(samples: int = 12, partitions: int = 2, **changes: Any) -> Manifest:
    return Manifest(identity=identity(**changes), partitions=partitions, samples=samples)


def tokens_of(sample: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + sample)
    return torch.randint(0, VOCABULARY, (LENGTH,), generator=generator)


def hash_of(sample: int) -> int:
    return token_hash(tokens_of(sample))


@functools.cache
def outputs_of(sample: int) -> TeacherOutputs:
    generator = torch.Generator().manual_seed(sample)
    logits = 3 * torch.randn(LENGTH, VOCABULARY, generator=generator)
    states = torch.randn(LENGTH, HIDDEN, generator=generator)
    sparse = sparse_of_logits(logits, 10, GRID, visible_vocab_size=VOCABULARY - 4)
    return TeacherOutputs(sparse, Hidden(states))


def assert_is_sample(found: TeacherOutputs, sample: int) -> None:
    wanted = outputs_of(sample)
    assert found.sparse is not None
    assert wanted.sparse is not None
    assert found.hidden is not None
    assert wanted.hidden is not None
    assert torch.equal(found.sparse.token_ids, wanted.sparse.token_ids)
    assert torch.allclose(found.hidden.states, wanted.hidden.states, atol=0.05)


Keys = list[str]  # `list` is a method of the store


@dataclass
class MemoryStore:
    """The part of `Store` that streams use. `before(operation, key)` may raise or change objects;
    `altered(key, data)` returns what a download gets."""

    prefix: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    hooks: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            before=lambda operation, key: None,
            after=lambda operation, key: None,
            altered=lambda key, data: data,
        )
    )
    lock: Any = field(default_factory=threading.RLock)

    @property
    def uri(self) -> str:
        return f"memory://{self.prefix}"

    def uri_of(self, key: str) -> str:
        return f"memory://{self.prefix}{key}"

    def child(self, suffix: str) -> MemoryStore:
        return MemoryStore(
            f"{self.prefix}{suffix}/", self.objects, self.calls, self.hooks, self.lock
        )

    def get(self, key: str) -> bytes:
        with self._call("get", key):
            return self.hooks.altered(key, self._object("get", key))

    def put(self, key: str, data: bytes, *, only_if_absent: bool = False) -> None:
        with self._call("put", key):
            if only_if_absent and self.prefix + key in self.objects:
                raise PreconditionFailed("put", self.uri_of(key), "exists")
            self.objects[self.prefix + key] = data

    def head(self, key: str) -> Any:
        with self._call("head", key):
            data = self.objects.get(self.prefix + key)
            return None if data is None else SimpleNamespace(key=key, size_bytes=len(data))

    def upload_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def abort_older_uploads(self, prefix: str, age_seconds: float) -> int:
        """Nothing is written in parts here."""
        return 0

    def download_file(self, key: str, path: Path) -> None:
        with self._call("download", key):
            path.write_bytes(self.hooks.altered(key, self._object("download", key)))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._call("delete", key):
                self.objects.pop(self.prefix + key, None)

    def list(self, prefix: str) -> Any:
        with self._call("list", prefix):
            whole = self.prefix + prefix
            return [
                SimpleNamespace(key=key.removeprefix(self.prefix), size_bytes=len(data))
                for key, data in sorted(self.objects.items())
                if key.startswith(whole)
            ]

    def keys(self, part: str) -> Keys:
        return sorted(key for key in self.objects if part in key)

    def _object(self, operation: str, key: str) -> bytes:
        try:
            return self.objects[self.prefix + key]
        except KeyError:
            raise NotFound(operation, self.uri_of(key), "no such object") from None

    def _call(self, operation: str, key: str) -> Any:
        store = self

        class Call:
            def __enter__(self) -> None:
                store.lock.acquire()
                try:
                    store.calls.append((operation, key))
                    store.hooks.before(operation, key)
                except BaseException:
                    store.lock.release()
                    raise

            def __exit__(self, kind: object, *rest: object) -> None:
                try:
                    if kind is None:
                        store.hooks.after(operation, key)
                finally:
                    store.lock.release()

        return Call()


def once(action: Callable[[], None]) -> Callable[[], None]:
    """`action` on the first call, nothing afterwards."""
    left = [action]

    def call() -> None:
        if left:
            left.pop()()

    return call


def write_stream(store: MemoryStore, scratch: Path, *, upto: int = 12) -> None:
    """A stream of 12 samples in two partitions, as far as a sample."""
    layout = publish_manifest(store, manifest())
    for partition in range(2):
        with StreamWriter(store, layout, partition, scratch=scratch, settings=SMALL) as writer:
            for sample in writer.samples():
                if sample >= upto:
                    break
                writer.write(sample, tokens_of(sample), outputs_of(sample))
            writer.commit()
            if writer.next_sample is None:
                writer.end()

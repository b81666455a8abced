"""A teacher's states through S3, as the trainer's own pods write and read them.

`StreamWriter` → a SeaweedFS server of its own → `StreamReader`, with the payload Hidden: shards,
manifest, commits, checks and read-ahead are the product's, and so is what a student gets
(`StreamTeacher`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kubedistill_trainer.data.packing import Packed
from kubedistill_trainer.methods.signal import StreamTeacher
from kubedistill_trainer.store import Store
from kubedistill_trainer.teacher.head import load_head, publish_head
from kubedistill_trainer.teacher.manifest import Manifest, StreamIdentity, publish_manifest
from kubedistill_trainer.teacher.payload import Hidden, TeacherOutputs
from kubedistill_trainer.teacher.payload_spec import HiddenSpec
from kubedistill_trainer.teacher.stream_reader import StreamReader
from kubedistill_trainer.teacher.stream_writer import StreamWriter
from torch import Tensor

PARTITIONS = 2
Open = Callable[[], StreamTeacher]
"""A reader for one student; close it."""


@contextmanager
def streamed(states: Tensor, head: Tensor, packed: Packed) -> Iterator[Open]:
    """Write final states [samples, L, H] and head [V, H]; the stream is there within the block."""
    from devcluster.s3 import S3Server

    with tempfile.TemporaryDirectory(prefix="quality-") as name:
        folder = Path(name)
        server = S3Server(folder / "s3")
        server.start()
        try:
            access = server.access
            os.environ["AWS_ACCESS_KEY_ID"] = access.access_key
            os.environ["AWS_SECRET_ACCESS_KEY"] = access.secret_key
            store = Store(f"s3://{access.bucket}/bench", endpoint=access.endpoint)
            manifest = _written(store, states, head, packed, folder / "writers")
            count = 0

            def opened() -> StreamTeacher:
                nonlocal count
                count += 1
                return _opened(store, manifest, packed, folder / f"reader-{count}")

            yield opened
        finally:
            server.stop()


def _written(store: Store, states: Tensor, head: Tensor, packed: Packed, folder: Path) -> Manifest:
    identity = StreamIdentity(
        teacher_digest="bench",
        tokenizer_digest="bench",
        teacher_vocab_size=head.shape[0],
        visible_vocab_size=head.shape[0],
        hidden_size=head.shape[1],
        dataset_digest="bench",
        packing_digest="bench",
        sequence_length=packed.sequence_length,
        payloads=(HiddenSpec(),),
    )
    digest = publish_head(store, identity, head, folder)
    manifest = publish_manifest(
        store,
        Manifest(identity=identity, partitions=PARTITIONS, samples=len(packed), head_sha256=digest),
    )
    for partition in range(PARTITIONS):
        scratch = folder / str(partition)
        scratch.mkdir()
        with StreamWriter(store, manifest, partition, scratch=scratch) as writer:
            for sample in writer.samples():
                outputs = TeacherOutputs(hidden=Hidden(states[sample]))
                writer.write(sample, packed.tokens[sample], outputs)
            writer.end()
    return manifest


def _opened(store: Store, manifest: Manifest, packed: Packed, cache: Path) -> StreamTeacher:
    reader = StreamReader(store, manifest.identity, cache=cache)
    head = load_head(store, reader.manifest, cache)
    # Of a dataset a teacher looks at the tokens alone.
    dataset: Any = SimpleNamespace(packed=packed)
    return StreamTeacher(reader, head, dataset, 1.0, None, "", [])

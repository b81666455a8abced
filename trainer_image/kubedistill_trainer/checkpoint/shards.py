"""Shard files: upload with their sums, look for them, download them verified."""

from __future__ import annotations

import hashlib
from pathlib import Path

import google_crc32c

from kubedistill_trainer.checkpoint.errors import CheckpointCorrupt
from kubedistill_trainer.checkpoint.records import Shard
from kubedistill_trainer.store import NotFound, Store

PIECE_BYTES = 16 << 20


def sums(path: Path) -> tuple[str, tuple[int, ...]]:
    """SHA-256 (hex) of a file, and the CRC-32C of each 16 MiB of it."""
    whole = hashlib.sha256()
    pieces: list[int] = []
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            whole.update(piece)
            pieces.append(google_crc32c.value(piece))
    return whole.hexdigest(), tuple(pieces)


def upload(store: Store, prefix: str, folder: Path, rank: int) -> list[Shard]:
    """Put all files below `folder` under `prefix`, which is this attempt's alone."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        sha256, crc32c = sums(path)
        key = f"{prefix}/r{rank}/{name}"
        store.upload_file(key, path)
        found.append(
            Shard(
                key=key,
                rank=rank,
                name=name,
                size_bytes=path.stat().st_size,
                sha256=sha256,
                crc32c=crc32c,
            )
        )
    return found


def check_present(store: Store, shards: list[Shard]) -> None:
    """HEAD each shard. CheckpointCorrupt names the first that is missing or of another size."""
    for shard in shards:
        info = store.head(shard.key)
        if info is None:
            raise CheckpointCorrupt(f"{store.uri_of(shard.key)} is missing")
        if info.size_bytes != shard.size_bytes:
            raise CheckpointCorrupt(
                f"{store.uri_of(shard.key)} has {info.size_bytes} bytes, "
                f"{shard.size_bytes} were committed"
            )


def download(store: Store, shards: list[Shard], folder: Path) -> None:
    """Fetch shards below `folder`, verified: CheckpointCorrupt names the first that is not."""
    for shard in shards:
        path = folder / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            store.download_file(shard.key, path)
        except NotFound as error:
            raise CheckpointCorrupt(f"{store.uri_of(shard.key)} is missing") from error
        sha256, _ = sums(path)
        if sha256 != shard.sha256:
            raise CheckpointCorrupt(
                f"{store.uri_of(shard.key)} has SHA-256 {sha256[:12]}…, "
                f"{shard.sha256[:12]}… was committed"
            )

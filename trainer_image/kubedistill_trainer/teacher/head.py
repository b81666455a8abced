"""The teacher's LM head beside a Hidden stream: one safetensors file, named by its own SHA-256."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

import safetensors.torch
from torch import Tensor

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import NotFound
from kubedistill_trainer.teacher.errors import StreamDamaged, StreamMismatch
from kubedistill_trainer.teacher.manifest import Manifest, StreamIdentity
from kubedistill_trainer.teacher.repairs import head_asked_key, head_key

_TENSOR = "weight"
_ATTEMPTS = 3


def publish_head(store: Store, identity: StreamIdentity, weight: Tensor, scratch: Path) -> str:
    """Store the head [teacher_vocab_size, hidden_size] in its own dtype; its SHA-256 (hex).

    `store` is rooted at the storage URI; `scratch` is a local folder. StreamMismatch for a wrong
    shape. Does nothing when the head is there already, and nobody found it damaged.
    """
    wanted = (identity.teacher_vocab_size, identity.hidden_size)
    if tuple(weight.shape) != wanted:
        raise StreamMismatch("shape of the teacher's LM head", tuple(weight.shape), wanted)
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / f"{uuid.uuid4().hex}.safetensors"
    try:
        safetensors.torch.save_file({_TENSOR: weight.detach().cpu().contiguous()}, path)
        digest = _sha256(path)
        stream = store.child(identity.address)
        info, asked = stream.head(head_key(digest)), head_asked_key(digest)
        if info is None or info.size_bytes != path.stat().st_size or stream.head(asked):
            stream.upload_file(head_key(digest), path)
            stream.delete([asked])
    finally:
        path.unlink(missing_ok=True)
    return digest


def load_head(store: Store, manifest: Manifest, cache: Path) -> Tensor:
    """The head [teacher_vocab_size, hidden_size], from `cache` or the store, verified.

    StreamMismatch when the stream has no head, StreamDamaged when it stays wrong: then the next
    `publish_head` writes it again.
    """
    if manifest.head_sha256 is None:
        raise StreamMismatch("head_sha256", None, "a teacher LM head (payload Hidden)")
    stream = store.child(manifest.identity.address)
    key = head_key(manifest.head_sha256)
    path = cache / f"{manifest.head_sha256}.safetensors"
    cache.mkdir(parents=True, exist_ok=True)
    found = "nothing"
    for _ in range(_ATTEMPTS):
        if not path.exists():
            _download(stream, key, path)
        if path.exists():
            found = f"sha256 {_sha256(path)}"
            if found == f"sha256 {manifest.head_sha256}":
                return safetensors.torch.load_file(path)[_TENSOR]
            path.unlink()
    stream.put(head_asked_key(manifest.head_sha256), found.encode())
    raise StreamDamaged(stream.uri_of(key), f"found {found}, wanted sha256 {manifest.head_sha256}")


def _download(stream: Store, key: str, path: Path) -> None:
    """Fetch `key` to `path` whole or not at all; leaves nothing when the object is missing."""
    partial = path.with_name(f"{uuid.uuid4().hex}.partial")
    try:
        stream.download_file(key, partial)
        partial.replace(path)
    except NotFound:
        return
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

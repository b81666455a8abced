"""A model folder in Hugging Face layout, addressed by a digest of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kubedistill_trainer.failures import unreadable
from kubedistill_trainer.models.weights import check_files, no_weights
from kubedistill_trainer.store import NoSuchBucket, NotFound, Store

_LOADED = (".json", ".safetensors", ".jinja", ".txt", ".model")
"""What a model is made of; all else in its folder is for people."""
_NOT_IN_DIGEST = ("report.json",)
_CONFIG = "config.json"


def digest_of(files: Iterable[tuple[str, str]]) -> str:
    """SHA-256 (hex) over (name, SHA-256 of the content) of a model's files, in name order.

    Cards and reports are no part of it.
    """
    lines = [
        f"{digest}  {name}\n"
        for name, digest in sorted(files)
        if name.endswith(_LOADED) and name not in _NOT_IN_DIGEST
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_config(store: Store, field: str) -> dict[str, Any]:
    """config.json of a model folder. InputsRefused when there is none or it is not JSON."""
    try:
        config = json.loads(store.get(_CONFIG))
    except (NotFound, NoSuchBucket) as error:
        raise unreadable(
            field, f"no {_CONFIG} in {store.uri}", "give a folder in Hugging Face layout"
        ) from error
    except ValueError as error:  # no JSON, or no text at all
        raise unreadable(field, f"{store.uri_of(_CONFIG)}: {error}", "give JSON") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise unreadable(
            field, f"no model_type in {store.uri_of(_CONFIG)}", "give a Hugging Face config"
        )
    return config


def download(store: Store, target: Path, field: str, wanted_digest: str = "") -> str:
    """Copy a model folder to `target`; its digest (hex).

    InputsRefused when it holds no safetensors or dead ones, or when `wanted_digest` is given and
    differs: a model that another job finished is used as it was finished, or not at all.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = [i.key for i in store.list("") if "/" not in i.key and i.key.endswith(_LOADED)]
    if not any(name.endswith(".safetensors") for name in names):
        raise no_weights(field, store.uri)
    for name in names:
        store.download_file(name, target / name)
    digest = digest_of((name, file_sha256(target / name)) for name in names)
    if wanted_digest and digest != wanted_digest:
        raise unreadable(
            field,
            f"{store.uri} has digest {digest}",
            f"the job that made it recorded {wanted_digest}: somebody changed the folder",
        )
    check_files(target, field, store.uri)
    return digest


def upload(source: Path, store: Store) -> tuple[str, Store]:
    """Put the files of `source` under their digest below `store`; (digest, the folder's store).

    `config.json`, without which nobody takes a folder for a model, goes last: an upload that was
    ended half-way leaves no half of a model to be read.
    """
    files = sorted(path for path in source.iterdir() if path.is_file())
    digest = digest_of((path.name, file_sha256(path)) for path in files)
    folder = store.child(digest)
    for path in sorted(files, key=lambda path: path.name == _CONFIG):
        folder.upload_file(path.name, path)
    return digest, folder

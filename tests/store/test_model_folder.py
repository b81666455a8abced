"""A finished model's folder in S3: found again under its digest, whatever lies beside the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.models.folder import download, upload
from kubedistill_trainer.store import Store
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)
from safetensors.torch import save

MODEL = {
    "config.json": b"{}", "model.safetensors": save({"w": torch.ones(2, 2)}),
    "tokenizer.json": b"{}", "merges.txt": b"m",
}  # fmt: skip
BESIDE = {
    "MODEL_CARD.md": b"# m",
    "report.json": b"{}",
    "report.html": b"<p>",
    "plot.svg": b"<svg>",
}


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def _folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def test_cards_and_reports_are_no_part_of_the_digest(store: Store, tmp_path: Path) -> None:
    digest, folder = upload(_folder(tmp_path / "whole", MODEL | BESIDE), store)
    assert download(folder, tmp_path / "got", "spec.teacher", digest) == digest
    plain, _ = upload(_folder(tmp_path / "plain", MODEL), store)
    assert plain == digest
    other, _ = upload(_folder(tmp_path / "other", MODEL | {"merges.txt": b"n"}), store)
    assert other != digest


def test_a_folder_that_somebody_changed_is_refused(store: Store, tmp_path: Path) -> None:
    digest, folder = upload(_folder(tmp_path / "whole", MODEL), store)
    folder.put("config.json", b'{"changed": 1}')
    with pytest.raises(InputsRefused, match="somebody changed the folder"):
        download(folder, tmp_path / "got", "spec.teacher", digest)

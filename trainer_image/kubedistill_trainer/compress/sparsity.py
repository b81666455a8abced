"""Zeros among the weights: which ones, and the record of them that lies beside a model.

The zeros are their own mask: a weight of the matrices that the record names, and that is zero, stays
zero (methods/masks.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kubedistill_api.pruning import Sparse
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from torch import Tensor, nn

from kubedistill_trainer.compress.calibration import Batch, loss_of
from kubedistill_trainer.compress.precision import SPARSITY_RECORD

_BLOCK = 4
_ZEROS = 2


class SparsityRecord(BaseModel):
    """Beside a sparse model. `tensors`: names of the matrices that were made sparse."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    pattern: str
    sparsity: float
    tensors: tuple[str, ...]

    def write(self, folder: Path) -> None:
        (folder / SPARSITY_RECORD).write_text(self.model_dump_json(indent=1) + "\n")


def read_record(folder: Path) -> SparsityRecord | None:
    """The record of a model folder; None for a dense model."""
    path = folder / SPARSITY_RECORD
    return SparsityRecord.model_validate_json(path.read_bytes()) if path.is_file() else None


def matrices(model: Any) -> dict[str, nn.Linear]:
    """What is made sparse, by the names of their weights: every linear map of the decoder. The head
    and the embedding stay as they are."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def mask_of(scores_OI: Tensor, wanted: Sparse) -> Tensor:
    """Which weights stay, of a matrix [out, in] with these scores: those with more matter more.

    `Any`: over the whole matrix. 2:4: of every four of a row.
    """
    if wanted.pattern == "2:4":
        blocks = scores_OI.reshape(len(scores_OI), -1, _BLOCK)
        worst = blocks.argsort(dim=-1, stable=True)[..., :_ZEROS]
        keep = torch.ones_like(blocks, dtype=torch.bool)
        return keep.scatter_(-1, worst, False).flatten(1)
    zeros = round(wanted.share * scores_OI.numel())
    worst = scores_OI.flatten().argsort(stable=True)[:zeros]
    keep = torch.ones(scores_OI.numel(), dtype=torch.bool, device=scores_OI.device)
    keep[worst] = False
    return keep.view_as(scores_OI)


@torch.no_grad()
def apply(model: Any, scores: dict[str, Tensor], wanted: Sparse) -> None:
    """Set to zero what matters least of each matrix."""
    for name, module in matrices(model).items():
        module.weight.mul_(mask_of(scores[name].to(module.weight.device), wanted))


def by_magnitude(model: Any) -> dict[str, Tensor]:
    """|w|."""
    return {name: module.weight.detach().abs() for name, module in matrices(model).items()}


def by_gradient(model: Any, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Σ over batches of (w · ∂L/∂w)², L being cross-entropy: how much the loss changes to first order
    without the weight (Molchanov et al. 2017, arXiv 1611.06440, per weight)."""
    chosen = matrices(model)
    model.requires_grad_(False)
    for module in chosen.values():
        module.weight.requires_grad_(True)
    scores = {n: torch.zeros_like(m.weight, dtype=torch.float32) for n, m in chosen.items()}
    for tokens, positions, labels in batches:
        torch.autograd.backward(loss_of(model, tokens, positions, labels))
        for name, module in chosen.items():
            gradient = module.weight.grad
            if gradient is not None:
                scores[name] += (module.weight.detach().float() * gradient.float()).square()
            module.weight.grad = None
    model.requires_grad_(False)
    return scores


@dataclass(frozen=True)
class Zeros:
    """Of the matrices that were made sparse, in a folder. `asked`: the share that was asked for."""

    pattern: str
    asked: float
    share: float


def zeros_of(folder: Path) -> Zeros | None:
    """The zeros of a model's files; None for a dense model."""
    record = read_record(folder)
    if record is None:
        return None
    names, zeros, total = set(record.tensors), 0, 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in names & set(file.keys()):
                tensor = file.get_tensor(name)
                zeros += int((tensor == 0).sum())
                total += tensor.numel()
    return Zeros(record.pattern, record.sparsity, zeros / total if total else 0.0)

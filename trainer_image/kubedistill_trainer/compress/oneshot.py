"""Weights in fewer bits, or with zeros among them: a model folder in, a model folder out.

What llm-compressor does, it does here (quantised folders are in compressed-tensors' format). As a
program: `… TASK`, a JSON file of `Task`; see methods/apart.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kubedistill_api.base import ApiModel
from kubedistill_api.pruning import Sparse
from kubedistill_api.quantization import Quantize
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from kubedistill_trainer.compress import sparsity
from kubedistill_trainer.compress.calibration import Batch
from kubedistill_trainer.compress.precision import group_size
from kubedistill_trainer.compress.sparsity import SparsityRecord, matrices
from kubedistill_trainer.imports import quiet_collector
from kubedistill_trainer.models.load import dtype_of, load_model

_KEPT = ["lm_head"]
"""In full precision, and dense: its errors are those of every answer."""
_BITS = {"W4A16": 4, "W8A16": 8, "W8A8": 8}


class Task(ApiModel):
    """One of `quantize` and `sparse`. `calibration`: an .npz with tokens, positions and labels."""

    source: Path
    target: Path
    calibration: Path
    precision: str
    batch_size: int
    quantize: Quantize | None = None
    sparse: Sparse | None = None


def quantize(
    model: Any, wanted: Quantize, batches: Sequence[Batch], folder: Path, field: str
) -> None:
    """Write `model`, which is used up, to `folder`, without a tokenizer."""
    _apply(model, _quantizing(wanted, model.config.to_dict(), field), batches)
    model.save_pretrained(folder, save_compressed=True)
    (folder / "recipe.yaml").unlink(missing_ok=True)


def sparsify(model: Any, wanted: Sparse, batches: Sequence[Batch], folder: Path) -> None:
    """Write `model`, which is used up, to `folder` with zeros among its weights, and their record."""
    names = tuple(matrices(model))
    if wanted.criterion == "Magnitude":
        sparsity.apply(model, sparsity.by_magnitude(model), wanted)
    elif wanted.criterion == "Gradient":
        sparsity.apply(model, sparsity.by_gradient(model, batches), wanted)
    else:
        _apply(model, _pruning(wanted), batches)
    model.save_pretrained(folder)
    (folder / "recipe.yaml").unlink(missing_ok=True)
    SparsityRecord(pattern=wanted.pattern, sparsity=wanted.share, tensors=names).write(folder)


def _apply(model: Any, recipe: list[Any], batches: Sequence[Batch]) -> None:
    # Late: it takes ten seconds to import.
    with quiet_collector():
        from llmcompressor import oneshot

    with _pinning_nothing_without_cuda():
        oneshot(
            model=model,
            processor=_no_tokenizer(),
            recipe=recipe,
            dataset=DataLoader(_Rows(batches), batch_size=None),
        )


@contextmanager
def _pinning_nothing_without_cuda() -> Iterator[None]:
    """AWQ of llm-compressor 0.14 pins memory for a GPU wherever it runs, which fails without one."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    pin = IntermediatesCache.pin_memory
    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *_: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin


def _no_tokenizer() -> PreTrainedTokenizerFast:
    """One is asked for, and for batches of tokens not used."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({})))


def _quantizing(wanted: Quantize, config: Mapping[str, Any], field: str) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights: dict[str, Any] = {"num_bits": _BITS[wanted.scheme], "type": "int", "symmetric": True}
    if wanted.scheme == "W4A16":
        weights |= {"strategy": "group", "group_size": group_size(wanted, config, field)}
    else:
        weights |= {"strategy": "channel"}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if wanted.scheme == "W8A8":
        group["input_activations"] = {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
        }  # fmt: skip
    parts: dict[str, Any] = {"config_groups": {"weights": group}, "ignore": _KEPT}
    if wanted.kv_cache:
        parts["kv_cache_scheme"] = {
            "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False,
        }  # fmt: skip
    if wanted.algorithm == "GPTQ":
        return [GPTQModifier(**parts)]
    rounding = QuantizationModifier(**parts)
    return [AWQModifier(), rounding] if wanted.algorithm == "AWQ" else [rounding]


def _pruning(wanted: Sparse) -> list[Any]:
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier

    modifier = {"SparseGPT": SparseGPTModifier, "Wanda": WandaPruningModifier}[wanted.criterion]
    structure = "0:0" if wanted.pattern == "Any" else wanted.pattern
    return [
        modifier(sparsity=wanted.share, mask_structure=structure, targets=["Linear"], ignore=_KEPT)
    ]


class _Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Calibration batches as llm-compressor takes them."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= len(self._batches):
            raise IndexError(index)
        tokens, positions, _ = self._batches[index]
        return {"input_ids": tokens, "position_ids": positions}


def main() -> None:
    task = Task.model_validate_json(Path(sys.argv[1]).read_bytes())
    with np.load(task.calibration) as arrays:
        parts = [torch.from_numpy(arrays[name]) for name in ("tokens", "positions", "labels")]
    batches = list(zip(*(torch.split(part, task.batch_size) for part in parts), strict=True))
    model = load_model(task.source, "spec.student", dtype_of(task.precision))
    if task.quantize is not None:
        quantize(model, task.quantize, batches, task.target, "spec.quantize")
    elif task.sparse is not None:
        sparsify(model, task.sparse, batches, task.target)


if __name__ == "__main__":
    main()

"""Zeros among weights: where they come, by what they are chosen, and the record of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kubedistill_api.pruning import Sparse
from kubedistill_api.quantization import Quantize
from kubedistill_trainer.compress.calibration import Batch, loss_of
from kubedistill_trainer.compress.oneshot import sparsify
from kubedistill_trainer.compress.precision import check_blocks, check_quantizable
from kubedistill_trainer.compress.sparsity import (
    by_gradient,
    mask_of,
    matrices,
    read_record,
    zeros_of,
)
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.models.load import load_model
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


def saved(folder: Path) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_model(folder, "spec.student", torch.float32)


def batches() -> list[Batch]:
    tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(16).expand(2, 16)
    return [(part, positions, part) for part in tokens.split(2)]


def test_the_least_of_the_whole_matrix_go() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.4], [0.2, 0.8, 0.3, 0.7]])
    kept = mask_of(scores, Sparse(sparsity=0.5))
    assert kept.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert mask_of(scores, Sparse(sparsity=0.25)).sum() == 6


def test_of_four_beside_each_other_two_stay() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 1, 2, 3, 4], [1, 1, 1, 1, 0, 5, 0, 5]])
    kept = mask_of(scores, Sparse(pattern="2:4"))
    assert kept.int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 1, 0, 1]]


def dense_loss(model: Any, batch: Batch) -> float:
    """The same loss, in float64 throughout."""
    tokens, _, labels = batch
    logits = model(tokens).logits.flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum"))


def test_the_gradient_says_what_the_loss_loses_without_a_weight(tmp_path: Path) -> None:
    """To first order: measured by taking a small part of single weights away."""
    model = saved(tmp_path).double()
    batch = batches()[0]
    scores = by_gradient(model, [batch])
    assert float(loss_of(model, *batch)) == pytest.approx(dense_loss(model, batch), rel=1e-5)
    name = "model.layers.1.mlp.down_proj.weight"
    weight, flat = matrices(model)[name].weight, scores[name].flatten()
    for place in flat.argsort(descending=True)[[0, 1, 2, 50]].tolist():
        row, column = divmod(place, weight.shape[1])
        with torch.no_grad():
            kept, losses = float(weight[row, column]), []
            for part in (1.1, 0.9):
                weight[row, column] = kept * part
                losses.append(dense_loss(model, batch))
            weight[row, column] = kept
        assert flat[place] == pytest.approx(((losses[0] - losses[1]) / 0.2) ** 2, rel=2e-2)


@pytest.mark.parametrize("criterion", ["Magnitude", "Gradient", "Wanda", "SparseGPT"])
@pytest.mark.parametrize("wanted", [{"sparsity": 0.6}, {"pattern": "2:4"}])
def test_every_matrix_gets_its_share_of_zeros_and_the_folder_says_so(
    tmp_path: Path, criterion: Any, wanted: dict[str, Any]
) -> None:
    model = saved(tmp_path / "dense")
    asked = Sparse(criterion=criterion, **wanted)
    sparsify(model, asked, batches(), tmp_path / "sparse")
    assert read_record(tmp_path / "dense") is None and zeros_of(tmp_path / "dense") is None
    found = zeros_of(tmp_path / "sparse")
    assert found is not None and (found.pattern, found.asked) == (asked.pattern, asked.share)
    assert found.share == pytest.approx(asked.share, abs=0.02)
    again = load_model(tmp_path / "sparse", "spec.student", torch.float32)
    record = read_record(tmp_path / "sparse")
    assert record is not None and set(record.tensors) == set(matrices(again))
    assert not any("lm_head" in name or "embed" in name for name in record.tensors)
    for name, module in matrices(again).items():
        zero = module.weight == 0
        assert float(zero.float().mean()) == pytest.approx(asked.share, abs=0.05), name
        if asked.pattern == "2:4":
            assert bool((zero.unflatten(1, (-1, 4)).sum(-1) >= 2).all()), name
    tokens = batches()[0][0]
    assert torch.isfinite(again(tokens).logits).all()


def test_what_cannot_be_is_refused() -> None:
    config = {"hidden_size": 30, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    with pytest.raises(InputsRefused, match="2:4 for hidden_size 30, which 4 does not divide"):
        check_blocks(config, "spec.prune.unstructured.pattern")
    sparse = {**config, "hidden_size": 32}
    check_blocks(sparse, "spec.prune.unstructured.pattern")
    with pytest.raises(InputsRefused, match=r"algorithm: found GPTQ for .* write RTN or AWQ"):
        check_quantizable(Quantize(), sparse, True)
    check_quantizable(Quantize(algorithm="RTN"), sparse, True)
    check_quantizable(Quantize(), sparse, False)

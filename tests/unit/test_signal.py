"""From a stream's samples to what the loss takes."""

from __future__ import annotations

import pytest
import torch
from kubedistill_trainer.losses import distillation_loss
from kubedistill_trainer.methods.signal import joined_sparse
from kubedistill_trainer.teacher.payload import TeacherOutputs, sparse_of_logits

GRID = (1.0, 2.0, 4.0)


def sampled(count: int) -> TeacherOutputs:
    return TeacherOutputs(sparse=sparse_of_logits(torch.randn(count, 17), 5, GRID))


@pytest.mark.parametrize("temperature", GRID)
def test_several_samples_become_one_batch_at_the_temperature(temperature: float) -> None:
    torch.manual_seed(0)
    samples = [sampled(3), sampled(4)]
    batch = joined_sparse(samples, temperature, torch.device("cpu"))
    expected = torch.cat([s.sparse.log_z_at(temperature) for s in samples if s.sparse])
    assert torch.equal(batch.log_z_N, expected)
    loss = distillation_loss(
        torch.randn(7, 8), torch.randn(17, 8), torch.randint(17, (7,)), batch,
        temperature=temperature, soft_weight=0.5, normalizer=7.0, vocab_size=17,
    )  # fmt: skip
    assert loss.soft >= 0


def test_a_temperature_outside_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="not in this stream's grid"):
        joined_sparse([sampled(2)], 3.0, torch.device("cpu"))

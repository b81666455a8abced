"""What stands for DeepSpeed's engine where nothing is trained."""

from __future__ import annotations

from typing import Any

import torch

from kubedistill_trainer.methods.student import StudentWithLoss


def device_of(local_rank: int) -> torch.device:
    """Where a rank computes."""
    return torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")


class Untrained:
    """A whole model in each rank, without gradients or optimizer: for evaluation and export."""

    def __init__(self, module: StudentWithLoss, rank: int, local_rank: int) -> None:
        self.device = device_of(local_rank)
        self.module = module.to(self.device).requires_grad_(False)
        self.global_rank = rank

    def __call__(self, *inputs: Any) -> Any:
        with torch.no_grad():
            return self.module(*inputs)

    def eval(self) -> Untrained:
        self.module.eval()
        return self

    def zero_optimization_stage(self) -> int:
        """Nothing is partitioned."""
        return 0

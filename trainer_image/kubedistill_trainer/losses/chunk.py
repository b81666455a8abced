"""Runs the loss over chunks of tokens in one reused workspace, and sums up the gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kubedistill_trainer.losses import fused
from kubedistill_trainer.losses.pointwise import Pointwise
from kubedistill_trainer.losses.types import Objective, Teacher, TeacherHidden
from kubedistill_trainer.losses.workers import each

WORKSPACE_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
"""All the logits of a chunk with their temporaries. A GPU wants tall matrix products."""
_BLOCKS_BYTES = 8 << 20
"""One fp32 temporary of all of a CPU's workers together, each with a block of its tokens. A smaller
block stays in a nearer cache from the first pass to the last, but costs its dozens of small operators
once more: of 1, 2 and 4 MiB a core, 4 was fastest."""
_TILE_ROWS = 8192
"""Rows of the LM head whose half-precision gradient is widened at a time, or whose product with few
tokens is."""
_FEW_TOKENS = 32
"""On a CPU the product of fewer tokens with a long head is added up one by one, and loses digits."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of reductions and gradient sums: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ChunkRunner:
    """The state of one loss: the workspace, and the sums of the loss and of both gradients.

    Matrix products run in the inputs' own type. On a CPU the tokens of a chunk are shared out among
    threads for the pointwise part.
    """

    def __init__(
        self,
        hidden_NH: Tensor,
        head_VH: Tensor,
        teacher: Teacher | None,
        objective: Objective,
        scale: float,
        needs: tuple[bool, bool],
        chunk_tokens: int | None,
    ) -> None:
        self._hidden_NH = hidden_NH
        self._head_VH = head_VH[: objective.vocab_size]
        self._teacher = teacher if objective.soft_weight > 0 else None
        self._objective = objective
        self._wide = wide_dtype(head_VH.dtype)
        # fp16 would lose a gradient of 1e-9 a logit: there the sums are scaled, in fp32, at the end.
        self._late_scale = scale if head_VH.dtype == torch.float16 else 1.0
        self._grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=self._wide) if needs[0] else None
        self._grad_head_VH = torch.zeros_like(head_VH, dtype=self._wide) if needs[1] else None
        self.chunk_tokens, block_tokens = self._sizes(chunk_tokens)
        threads = torch.get_num_threads() if head_VH.device.type == "cpu" else 1
        vocab, device, dtype = objective.vocab_size, head_VH.device, head_VH.dtype
        self._student_CV = torch.empty(self.chunk_tokens, vocab, dtype=dtype, device=device)
        teacher_rows, teacher_dtype = 0, dtype
        if isinstance(self._teacher, TeacherHidden):
            teacher_rows, teacher_dtype = self.chunk_tokens, self._teacher.head_VH.dtype
        self._teacher_CV = torch.empty(teacher_rows, vocab, dtype=teacher_dtype, device=device)
        early = None if not any(needs) else scale / self._late_scale
        self._workers: Sequence[Pointwise | fused.FusedPointwise]
        if fused.worth_fusing(device):
            self._workers = [
                fused.FusedPointwise(self._teacher, objective, early, self._wide, device)
            ]
            return
        self._workers = [
            Pointwise(
                self._teacher, objective, early, block_tokens, self._wide, device,
                (dtype, teacher_dtype),
            )
            for _ in range(threads)
        ]  # fmt: skip

    @property
    def sums(self) -> Tensor:
        """Sums of the soft and of the hard loss, fp64 [2]."""
        return torch.stack([worker.sums for worker in self._workers]).sum(0)

    def add(self, rows_C: Tensor, labels_C: Tensor) -> None:
        """Add the tokens at rows_C [C] of the hidden states, C ≤ `chunk_tokens`."""
        count = len(rows_C)
        hidden_CH = self._hidden_NH[rows_C].to(self._head_VH.dtype)
        z_CV, t_CV = self._student_CV[:count], self._teacher_CV[:count]
        torch.mm(hidden_CH, self._head_VH.T, out=z_CV)
        if isinstance(self._teacher, TeacherHidden):
            head_VH = self._teacher.head_VH[: self._objective.vocab_size]
            states_CH = self._teacher.hidden_NH[rows_C].to(head_VH.dtype)
            torch.mm(states_CH, head_VH.T, out=t_CV)
        share = max(1, math.ceil(count / len(self._workers)))
        parts = [slice(start, start + share) for start in range(0, count, share)]
        each(
            [
                partial(worker.add, z_CV[part], t_CV[part], rows_C[part], labels_C[part])
                for worker, part in zip(self._workers, parts, strict=False)
            ]
        )
        if self._grad_hidden_NH is not None:
            self._grad_hidden_NH[rows_C] = self._to_hidden(z_CV)
        if self._grad_head_VH is not None:
            self._add_to_head(z_CV, hidden_CH)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the hidden states and of the head, fp32 or fp64; None where not needed."""
        for grad in (self._grad_hidden_NH, self._grad_head_VH):
            if grad is not None and self._late_scale != 1:
                grad.mul_(self._late_scale)
        return self._grad_hidden_NH, self._grad_head_VH

    def _sizes(self, chunk_tokens: int | None) -> tuple[int, int]:
        """Tokens of a chunk and of a worker's block, by the bytes that they take."""
        vocab, device = self._objective.vocab_size, self._head_VH.device.type
        narrow, wide = self._head_VH.dtype.itemsize, self._wide.itemsize
        wide_buffers = 3 if narrow == wide else 5
        # What a mix of divergences makes beside its buffers.
        wide_buffers += 0 if self._objective.divergence.is_forward_kl else 2
        budget = WORKSPACE_BYTES.get(device, WORKSPACE_BYTES["cuda"])
        token_bytes = 2 * vocab * narrow
        if device == "cpu":
            budget -= wide_buffers * _BLOCKS_BYTES
        else:  # the temporaries are as large as the chunk
            token_bytes += vocab * wide_buffers * wide
        chunk = chunk_tokens or max(1, budget // token_bytes)
        chunk = max(1, min(chunk, len(self._hidden_NH)))
        if device != "cpu":
            return chunk, chunk
        threads = torch.get_num_threads()
        block = max(1, _BLOCKS_BYTES // threads // (vocab * wide))
        return chunk, min(block, math.ceil(chunk / threads))

    def _to_hidden(self, grad_CV: Tensor) -> Tensor:
        """grad_CV · head [C, H] in the wide type."""
        if len(grad_CV) >= _FEW_TOKENS or grad_CV.device.type != "cpu":
            return (grad_CV @ self._head_VH).to(self._wide)
        total_CH = self._head_VH.new_zeros(len(grad_CV), self._head_VH.shape[1], dtype=self._wide)
        for start in range(0, len(self._head_VH), _TILE_ROWS):
            tile = slice(start, start + _TILE_ROWS)
            total_CH += grad_CV[:, tile] @ self._head_VH[tile]
        return total_CH

    def _add_to_head(self, grad_CV: Tensor, hidden_CH: Tensor) -> None:
        """grad_head += grad_CVᵀ · hidden_CH; the product of half types is widened tile by tile."""
        assert self._grad_head_VH is not None
        head_VH = self._grad_head_VH[: self._objective.vocab_size]
        if grad_CV.dtype == self._wide:
            head_VH.addmm_(grad_CV.T, hidden_CH)
            return
        for start in range(0, len(head_VH), _TILE_ROWS):
            tile = slice(start, start + _TILE_ROWS)
            head_VH[tile] += grad_CV[:, tile].T @ hidden_CH

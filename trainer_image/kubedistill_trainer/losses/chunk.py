"""Runs the loss over chunks of tokens in one reused workspace, and sums up the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kubedistill_trainer.losses.divergence import (
    Scratch,
    dense_divergence,
    sampled_kl,
    sparse_divergence,
)
from kubedistill_trainer.losses.types import (
    Objective,
    Teacher,
    TeacherHidden,
    TeacherSampled,
    TeacherSparse,
)

WORKSPACE_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""All the logits of a chunk with their temporaries. A GPU wants tall matrix products."""
_BLOCK_BYTES = 1 << 20
"""One fp32 temporary, per core: a block stays in the cache from the first pass to the last."""
_TILE_ROWS = 8192
"""Rows of the LM head whose half-precision gradient is widened at a time."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of reductions and gradient sums: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class ChunkRunner:
    """The state of one loss: the workspace, and the sums of the loss and of both gradients.

    Matrix products run in the inputs' own type. The pointwise part runs on blocks of a chunk:
    on a CPU a block fits the cache, on a GPU it is the chunk.
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
        self._needs_gradient = any(needs)
        self._wide = wide_dtype(head_VH.dtype)
        # fp16 would lose a gradient of 1e-9 a logit: there the sums are scaled, in fp32, at the end.
        self._late_scale = scale if head_VH.dtype == torch.float16 else 1.0
        self._scale = 1.0 if head_VH.dtype == torch.float16 else scale
        self.sums = torch.zeros(2, dtype=torch.float64, device=head_VH.device)
        self._grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=self._wide) if needs[0] else None
        self._grad_head_VH = torch.zeros_like(head_VH, dtype=self._wide) if needs[1] else None
        self.chunk_tokens, self._block_tokens = self._sizes(chunk_tokens)
        self._allocate()

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
        for start in range(0, count, self._block_tokens):
            block = slice(start, start + self._block_tokens)
            self._block(z_CV[block], t_CV[block], rows_C[block], labels_C[block, None])
        if self._grad_hidden_NH is not None:
            self._grad_hidden_NH[rows_C] = (z_CV @ self._head_VH).to(self._wide)
        if self._grad_head_VH is not None:
            self._add_to_head(z_CV, hidden_CH)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the hidden states and of the head, fp32 or fp64; None where not needed."""
        for grad in (self._grad_hidden_NH, self._grad_head_VH):
            if grad is not None and self._late_scale != 1:
                grad.mul_(self._late_scale)
        return self._grad_hidden_NH, self._grad_head_VH

    def _sizes(self, chunk_tokens: int | None) -> tuple[int, int]:
        """Tokens of a chunk and of a block, by the bytes that they take."""
        vocab, device = self._objective.vocab_size, self._head_VH.device.type
        narrow, wide = self._head_VH.dtype.itemsize, self._wide.itemsize
        wide_buffers = 3 if narrow == wide else 5
        # What a mix of divergences makes beside its buffers.
        wide_buffers += 0 if self._objective.divergence.is_forward_kl else 2
        # On a GPU the temporaries are as large as the chunk.
        token_bytes = vocab * (2 * narrow + (0 if device == "cpu" else wide_buffers * wide))
        budget = WORKSPACE_BYTES.get(device, WORKSPACE_BYTES["cuda"])
        chunk = chunk_tokens or max(1, budget // token_bytes)
        chunk = max(1, min(chunk, len(self._hidden_NH)))
        if device != "cpu":
            return chunk, chunk
        threads = torch.get_num_threads()
        block = max(threads, threads * _BLOCK_BYTES // (vocab * wide))
        return chunk, min(chunk, block)

    def _allocate(self) -> None:
        vocab, dtype = self._objective.vocab_size, self._head_VH.dtype
        device = self._head_VH.device
        self._student_CV = torch.empty(self.chunk_tokens, vocab, dtype=dtype, device=device)
        teacher_dtype, teacher_rows = dtype, 0
        if isinstance(self._teacher, TeacherHidden):
            teacher_dtype, teacher_rows = self._teacher.head_VH.dtype, self.chunk_tokens
        self._teacher_CV = torch.empty(teacher_rows, vocab, dtype=teacher_dtype, device=device)

        def wide() -> Tensor:
            return torch.empty(self._block_tokens, vocab, dtype=self._wide, device=device)

        self._scratch = Scratch(wide(), wide(), wide())
        self._student_RV = None if dtype == self._wide else wide()
        self._teacher_RV = None if teacher_dtype == self._wide or not teacher_rows else wide()

    def _block(self, z_RV: Tensor, t_RV: Tensor, rows_R: Tensor, labels_R1: Tensor) -> None:
        """Adds the block's loss to the sums and overwrites its logits by their gradient."""
        w, T = self._objective.soft_weight, self._objective.temperature
        divergence = self._objective.divergence
        scratch = self._scratch.head(len(rows_R))
        wide_RV = _widened(z_RV, self._student_RV, self._objective.softcap)
        max_R1 = wide_RV.amax(-1, keepdim=True)
        if isinstance(self._teacher, TeacherHidden):
            wide_t_RV = _widened(t_RV, self._teacher_RV, self._teacher.softcap)
            soft_R = dense_divergence(wide_RV, max_R1, wide_t_RV, T, divergence, scratch)
            self.sums[0] += T * T * soft_R.sum()
        elif isinstance(self._teacher, TeacherSampled):
            drawn = TeacherSampled(self._teacher.ids_NK[rows_R], self._teacher.shares_NK[rows_R])
            self.sums[0] += T * T * sampled_kl(wide_RV, drawn, T, scratch).sum()
        elif self._teacher is not None:
            kept = _rows(self._teacher, rows_R)
            self.sums[0] += T * T * sparse_divergence(wide_RV, kept, T, divergence, scratch).sum()
        if w < 1:
            q1_RV = scratch.b_RV
            # dense_divergence has left it there for T = 1.
            if T != 1 or not isinstance(self._teacher, TeacherHidden):
                torch.softmax(wide_RV, -1, out=q1_RV)
            log_z_R1 = max_R1.double() - q1_RV.amax(-1, keepdim=True).double().log()
            self.sums[1] += (log_z_R1 - wide_RV.gather(-1, labels_R1)).sum()
            q1_RV.scatter_add_(-1, labels_R1, q1_RV.new_full(labels_R1.shape, -1.0))
        if self._needs_gradient:
            self._write_gradient(z_RV, wide_RV, scratch)

    def _write_gradient(self, z_RV: Tensor, wide_RV: Tensor, scratch: Scratch) -> None:
        """z_RV = scale · (w · T · ∂D/∂u + (1 − w) · ∂CE/∂z), from c_RV and b_RV of the scratch."""
        w, cap = self._objective.soft_weight, self._objective.softcap
        soft, hard = self._scale * w * self._objective.temperature, self._scale * (1 - w)
        if cap is not None:
            # d(cap · tanh(x / cap)) / dx = 1 − (z / cap)², where z is what the cap let through.
            torch.div(wide_RV, cap, out=scratch.a_RV).square_().neg_().add_(1)
        if w == 0:
            torch.mul(scratch.b_RV, hard, out=wide_RV)
        else:
            torch.mul(scratch.c_RV, soft, out=wide_RV)
            if w < 1:
                wide_RV.add_(scratch.b_RV, alpha=hard)
        if cap is not None:
            wide_RV.mul_(scratch.a_RV)
        if wide_RV.dtype != z_RV.dtype:
            z_RV.copy_(wide_RV)

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


def _widened(x_RV: Tensor, buffer_RV: Tensor | None, softcap: float | None) -> Tensor:
    """Logits in the wide type, capped; in place unless there is a buffer for the wide type."""
    if buffer_RV is not None:
        x_RV = buffer_RV[: len(x_RV)].copy_(x_RV)
    return x_RV if softcap is None else x_RV.div_(softcap).tanh_().mul_(softcap)


def _rows(teacher: TeacherSparse, rows: Tensor) -> TeacherSparse:
    return TeacherSparse(teacher.ids_NK[rows], teacher.logprobs_NK[rows], teacher.log_z_N[rows])

"""Builders of the loss tests: a student near its teacher, and the oracle's view of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kubedistill_trainer.losses import (
    LossParts,
    Teacher,
    TeacherHidden,
    TeacherSparse,
    distillation_loss,
)
from kubedistill_trainer.losses.reference import dense_loss
from torch import Tensor

TEMPERATURES = [0.5, 1.0, 2.0, 4.0, 10.0, 20.0]


@dataclass
class Case:
    """Inputs of one call in fp64; `rows` of the head may exceed the vocabulary."""

    hidden: Tensor
    head: Tensor
    labels: Tensor
    teacher: TeacherHidden

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Copies of hidden states and head that take a gradient."""
        return (
            self.hidden.detach().clone().requires_grad_(),
            self.head.detach().clone().requires_grad_(),
        )

    @property
    def valid(self) -> float:
        return float((self.labels != -100).sum())

    def cast(self, dtype: torch.dtype) -> Case:
        teacher = self.teacher
        states, head = teacher.hidden_NH.to(dtype), teacher.head_VH.to(dtype)
        return Case(
            self.hidden.to(dtype),
            self.head.to(dtype),
            self.labels,
            TeacherHidden(states, head, teacher.softcap),
        )


def case(
    tokens: int = 37,
    vocab: int = 211,
    *,
    rows: int | None = None,
    width: int = 19,
    spread: float = 2.0,
    seed: int = 0,
) -> Case:
    """A student near its teacher, as in training; a third of the tokens has no label."""
    torch.manual_seed(seed)
    hidden, teacher_width = torch.randn(tokens, width).double(), width + 4
    head = spread * torch.randn(rows or vocab, width).double() / width**0.5
    labels = torch.randint(0, vocab, (tokens,))
    labels[torch.rand(tokens) < 0.33] = -100
    lift = torch.randn(width, teacher_width).double() / width**0.5
    states = hidden @ lift + 0.3 * torch.randn(tokens, teacher_width).double()
    teacher_head = head @ lift + 0.1 * torch.randn(rows or vocab, teacher_width).double()
    # The oracle gets exactly the numbers that fp32 gets.
    return (
        Case(hidden, head, labels, TeacherHidden(states, teacher_head))
        .cast(torch.float32)
        .cast(torch.float64)
    )


def sparse_of(
    teacher: TeacherHidden, k: int, temperature: float, vocab: int | None = None
) -> TeacherSparse:
    logits = teacher.hidden_NH @ teacher.head_VH[:vocab].T
    log_p = torch.log_softmax(logits, dim=-1)
    top = log_p.topk(k)
    return TeacherSparse(top.indices, top.values, (log_p / temperature).logsumexp(-1))


def evaluate(
    c: Case, teacher: Teacher | None, *, oracle: bool = False, **options: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, ∂/∂hidden, ∂/∂head)."""
    hidden, head = c.leaves()
    function = dense_loss if oracle else distillation_loss
    result = function(hidden, head, c.labels, teacher, normalizer=c.valid, **options)  # type: ignore[operator]
    total = result.total if isinstance(result, LossParts) else result
    total.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return total.detach(), hidden.grad, head.grad


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((found.double() - expected).norm() / expected.norm())


def check(
    c: Case, teacher_of: str, tolerance: float, dtype: torch.dtype, **options: float | None
) -> None:
    narrow = c.cast(dtype)
    teacher: Teacher | None = c.teacher
    narrow_teacher: Teacher | None = narrow.teacher
    if teacher_of == "sparse":
        vocab = options.get("vocab_size")
        kept = sparse_of(c.teacher, 17, options["temperature"] or 1, vocab and int(vocab))
        teacher = kept
        # In fp32 already: what the stream gives is what the oracle must get.
        narrow_teacher = kept
    elif teacher_of == "none":
        teacher = narrow_teacher = None
    found = evaluate(narrow, narrow_teacher, **options)
    expected = evaluate(c, teacher, oracle=True, **options)
    for name, ours, oracle in zip(("loss", "hidden", "head"), found, expected, strict=True):
        assert error(ours, oracle) < tolerance, (name, error(ours, oracle))

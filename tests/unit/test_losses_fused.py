"""The form of the pointwise part that is compiled on a GPU, against the one that runs on a CPU.

Each is captured as one graph, as on a GPU: what cannot be fails. Two of them are compiled to the end,
for the CPU; that takes many seconds each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from kubedistill_trainer.losses import (
    TeacherHidden,
    TeacherSampled,
    distillation_loss,
    fused,
)
from kubedistill_trainer.losses.types import FORWARD_KL, Divergence
from torch import Tensor
from unit.test_losses_kit import Case, case, error, sparse_of

CAPTURED, COMPILED = "aot_eager", "inductor"
MIX = Divergence(0.4, 0.3, 0.3, 0.3)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Called with a compiler's name, it makes the loss take the form that is compiled."""
    torch._dynamo.reset()

    def take(backend: str) -> None:
        whole = torch.compile(fused.fused_chunk, dynamic=True, fullgraph=True, backend=backend)
        monkeypatch.setattr(fused, "worth_fusing", lambda device: True)
        monkeypatch.setattr(fused, "_compiled", lambda: whole)

    yield take
    torch._dynamo.reset()


def _teachers(c: Case, temperature: float) -> dict[str, object]:
    ids = torch.stack([torch.randperm(211)[:12] for _ in c.labels])
    return {
        "none": None,
        "hidden": TeacherHidden(c.teacher.hidden_NH, c.teacher.head_VH, 1.5),
        "sampled": TeacherSampled(ids, torch.rand(len(ids), 12).softmax(-1)),
        "sparse": sparse_of(c.teacher, 9, temperature),
        "whole": sparse_of(c.teacher, 211, temperature),
    }


def _evaluate(c: Case, teacher: object, **options: object) -> list[Tensor]:
    hidden, head = c.leaves()
    parts = distillation_loss(
        hidden, head, c.labels, teacher, normalizer=c.valid, chunk_tokens=16, **options
    )  # type: ignore[arg-type]
    parts.total.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return [parts.total.detach(), hidden.grad, head.grad]


@pytest.mark.parametrize(
    ("kind", "divergence", "temperature", "weight", "backend"),
    [
        ("none", FORWARD_KL, 1.0, 0.6, CAPTURED), ("hidden", FORWARD_KL, 4.0, 0.6, COMPILED),
        ("hidden", FORWARD_KL, 1.0, 0.6, CAPTURED), ("hidden", MIX, 4.0, 1.0, CAPTURED),
        ("sampled", FORWARD_KL, 4.0, 0.6, CAPTURED), ("sparse", FORWARD_KL, 1.0, 0.6, COMPILED),
        ("sparse", MIX, 4.0, 1.0, CAPTURED), ("whole", FORWARD_KL, 4.0, 0.6, CAPTURED),
    ],
)  # fmt: skip
def test_it_computes_the_same(
    kind: str,
    divergence: Divergence,
    temperature: float,
    weight: float,
    backend: str,
    compiled: Callable[[str], None],
) -> None:
    c = case()
    teacher = _teachers(c, temperature)[kind]
    options = {
        "temperature": temperature, "soft_weight": weight, "divergence": divergence,
        "softcap": 2.5 if kind == "hidden" else None,
    }  # fmt: skip
    expected = _evaluate(c, teacher, **options)
    compiled(backend)
    for ours, plain in zip(_evaluate(c, teacher, **options), expected, strict=True):
        assert error(ours, plain) < 1e-9


@pytest.mark.parametrize("kind", ["hidden", "sparse"])
def test_half_precision_logits_are_widened(kind: str, compiled: Callable[[str], None]) -> None:
    c = case().cast(torch.bfloat16)
    teacher = {"hidden": c.teacher, "sparse": sparse_of(case().teacher, 9, 2.0)}[kind]
    options = {"temperature": 2.0, "soft_weight": 0.5}
    expected = _evaluate(c, teacher, **options)
    compiled(CAPTURED)
    for ours, plain in zip(_evaluate(c, teacher, **options), expected, strict=True):
        assert error(ours, plain.double()) < 2e-3


def test_large_logits_far_from_the_kept_tokens(compiled: Callable[[str], None]) -> None:
    """A student that is sure of a kept token leaves a tail that underflows in fp32."""
    c = case(spread=60.0).cast(torch.float32)
    teacher = sparse_of(case(spread=60.0).teacher, 9, 1.0)
    options = {"temperature": 1.0, "soft_weight": 1.0}
    expected = _evaluate(c, teacher, **options)
    compiled(CAPTURED)
    for ours, plain in zip(_evaluate(c, teacher, **options), expected, strict=True):
        assert torch.isfinite(ours).all()
        assert error(ours, plain.double()) < 1e-4

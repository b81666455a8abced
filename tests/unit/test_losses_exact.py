"""Where fp32 runs out of digits: models that all but agree, that are all but uniform, or sure.

The heads are unit matrices, so that the logits are exactly those that are given: what is left is what
the loss itself rounds. A product with a real head rounds logits of 100 by 1e-5, which at T = 0.5 is
2e-5 of a probability and of the gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kubedistill_trainer.losses import (
    Divergence,
    TeacherHidden,
    TeacherSampled,
    TeacherSparse,
    fused,
)
from torch import Tensor
from unit.test_losses_kit import Case, error, evaluate, sparse_of

DIVERGENCES = {
    "forward": Divergence(),
    "reverse": Divergence(0, 1),
    "jsd": Divergence(0, 0, 1),
    "jsd(0.9)": Divergence(0, 0, 1, beta=0.9),
    "mix": Divergence(0.5, 0.3, 0.7, beta=0.25),
}


@pytest.fixture(params=["blocks", "fused"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss as on a CPU, and step by step in the form that a GPU's compiler is given."""
    if request.param == "fused":
        monkeypatch.setattr(fused, "worth_fusing", lambda device: True)
        monkeypatch.setattr(fused, "_compiled", lambda: fused.fused_chunk)


def _logits(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Case:
    """A case in fp64 with just these logits, [N, V] fp32."""
    eye = torch.eye(student.shape[1]).double()
    if labels is None:
        labels = torch.randint(student.shape[1], (len(student),))
    return Case(student.double(), eye, labels, TeacherHidden(teacher.double(), eye))


def _near(spread: float, distance: float, tokens: int = 9, vocab: int = 157) -> Case:
    torch.manual_seed(1)
    student, other = torch.randn(2, tokens, vocab)
    return _logits(spread * student, spread * (student + distance * other))


def _check(c: Case, teacher: TeacherSparse | TeacherSampled | str | None, **options: Any) -> None:
    narrow = c.cast(torch.float32)
    if teacher == "sparse":
        teacher = sparse_of(c.teacher, 17, options["temperature"])
    theirs, ours = (c.teacher, narrow.teacher) if teacher == "hidden" else (teacher, teacher)
    found = evaluate(narrow, ours, **options)  # type: ignore[arg-type]
    expected = evaluate(c, theirs, oracle=True, **options)  # type: ignore[arg-type]
    for name, a, b in zip(("loss", "hidden", "head"), found, expected, strict=True):
        assert error(a, b) < 1e-5, (name, error(a, b))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("teacher", ["hidden", "sparse"])
@pytest.mark.parametrize(
    ("spread", "temperature"), [(0.01, 1.0), (0.01, 20.0), (0.1, 10.0), (1, 20.0)]
)
def test_two_models_that_are_all_but_uniform(
    spread: float, temperature: float, teacher: str, name: str
) -> None:
    """D is 1e-9 and p − q a thousandth of p."""
    _check(
        _near(spread, 0.3), teacher, temperature=temperature, soft_weight=1.0,
        divergence=DIVERGENCES[name],
    )  # fmt: skip


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_student_that_all_but_is_its_teacher(temperature: float, name: str) -> None:
    _check(
        _near(2.0, 0.003), "hidden", temperature=temperature, soft_weight=1.0,
        divergence=DIVERGENCES[name],
    )  # fmt: skip


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("spread", "temperature"), [(10.0, 0.5), (30.0, 1.0), (100.0, 3.0)])
def test_great_logits(spread: float, temperature: float, name: str) -> None:
    _check(
        _near(spread, 0.3), "hidden", temperature=temperature, soft_weight=1.0,
        divergence=DIVERGENCES[name],
    )  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher", ["none", "hidden", "sparse", "sampled"])
def test_a_student_that_is_sure_of_what_is_right(teacher: str, temperature: float) -> None:
    """q of the label is 1 − 1e-5: in fp32, q − 1 has two digits."""
    torch.manual_seed(2)
    labels = torch.randint(157, (9,))
    logits = torch.randn(2, 9, 157)
    logits.scatter_(-1, labels.expand(2, -1)[..., None], 18.0)
    c = _logits(*logits, labels)
    ids = torch.cat([labels[:, None], (labels[:, None] + 1) % 157], -1)
    drawn = TeacherSampled(ids, torch.tensor([1.0, 0.0]).expand(9, -1))
    given: Any = {"none": None, "sampled": drawn}.get(teacher, teacher)
    _check(c, given, temperature=temperature, soft_weight=0.5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_student_that_is_sure_of_what_the_teacher_excludes(
    temperature: float, beta: float
) -> None:
    """JSD is all but at its bound, and its gradient is e^-12 and less."""
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 9, 157)
    student[:, 5:7] += 16.0 * temperature
    teacher[:, 8] += 17.0 * temperature
    _check(
        _logits(student, teacher), "hidden", temperature=temperature, soft_weight=1.0,
        divergence=Divergence(0, 0, 1, beta=beta),
    )  # fmt: skip


@pytest.mark.parametrize("name", DIVERGENCES)
def test_logits_that_differ_by_a_constant(name: str) -> None:
    torch.manual_seed(4)
    student, other = 2 * torch.randn(2, 9, 157)
    _check(
        _logits(student, student + 0.3 * other + 100), "hidden", temperature=3.0, soft_weight=1.0,
        divergence=DIVERGENCES[name],
    )  # fmt: skip

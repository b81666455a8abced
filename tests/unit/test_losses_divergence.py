"""Reverse KL, JSD and mixes of divergences, against the dense float64 oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kubedistill_trainer.losses import (
    Divergence,
    TeacherHidden,
    TeacherSparse,
    distillation_loss,
    fused,
)
from unit.test_losses_kit import TEMPERATURES, Case, case, check, error, evaluate, sparse_of

DIVERGENCES = {
    "reverse": Divergence(0, 1, 0),
    "jsd": Divergence(0, 0, 1),
    "jsd(0.1)": Divergence(0, 0, 1, beta=0.1),
    "jsd(0.9)": Divergence(0, 0, 1, beta=0.9),
    "mix": Divergence(0.5, 0.3, 0.7, beta=0.25),
    "twice": Divergence(2.0),
}
each = pytest.mark.parametrize("name", DIVERGENCES)


@each
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("teacher", ["hidden", "sparse"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_the_oracle(
    name: str, teacher: str, temperature: float, dtype: torch.dtype, tolerance: float
) -> None:
    check(
        case(), teacher, tolerance, dtype, temperature=temperature, soft_weight=0.7,
        divergence=DIVERGENCES[name],
    )  # fmt: skip


@each
@pytest.mark.parametrize("teacher", ["hidden", "sparse"])
def test_softcap_and_padded_vocabulary(name: str, teacher: str) -> None:
    c = case(vocab=150, rows=163)
    c.teacher = TeacherHidden(c.teacher.hidden_NH, c.teacher.head_VH[:152], None)
    check(
        c, teacher, 1e-5, torch.float32, temperature=3.0, soft_weight=0.6, softcap=2.5,
        vocab_size=150, divergence=DIVERGENCES[name],
    )  # fmt: skip


@each
def test_a_large_vocabulary_at_high_temperature_keeps_its_digits(name: str) -> None:
    check(
        case(tokens=16, vocab=30_011), "hidden", 1e-5, torch.float32, temperature=20.0,
        soft_weight=1.0, divergence=DIVERGENCES[name],
    )  # fmt: skip


@each
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_a_vocabulary_as_large_as_real_ones(name: str, temperature: float) -> None:
    check(
        case(tokens=8, vocab=151_936), "hidden", 1e-5, torch.float32, temperature=temperature,
        soft_weight=0.6, divergence=DIVERGENCES[name],
    )  # fmt: skip


@each
def test_all_tokens_kept_is_the_dense_loss(name: str) -> None:
    c = case(vocab=97)
    options = {"temperature": 2.0, "soft_weight": 0.5, "divergence": DIVERGENCES[name]}
    dense = evaluate(c, c.teacher, **options)
    sparse = evaluate(c, sparse_of(c.teacher, 97, 2.0), **options)
    for a, b in zip(sparse, dense, strict=True):
        assert error(a, b) < 1e-10


@each
@pytest.mark.parametrize("kind", ["hidden", "sparse"])
def test_gradcheck(name: str, kind: str) -> None:
    c = case(tokens=4, vocab=7, width=3)
    teacher = c.teacher if kind == "hidden" else sparse_of(c.teacher, 4, 2.0)

    def loss(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return distillation_loss(
            hidden, head, c.labels, teacher, temperature=2.0, soft_weight=0.4, normalizer=3.0,
            softcap=3.0, chunk_tokens=2, divergence=DIVERGENCES[name],
        ).total  # fmt: skip

    assert torch.autograd.gradcheck(loss, (c.hidden.requires_grad_(), c.head.requires_grad_()))


def _sure(seed: int, spread: float) -> Case:
    """Student and teacher that are sure, each of tokens of its own."""
    c, other = (
        case(64, 512, width=32, spread=spread, seed=seed),
        case(64, 512, spread=spread, seed=9),
    )
    c.labels = c.labels.clamp_min(0)
    c.teacher = other.teacher
    return c


@pytest.fixture(params=["blocks", "fused"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss as on a CPU, and step by step in the form that a GPU's compiler is given."""
    if request.param == "fused":
        monkeypatch.setattr(fused, "worth_fusing", lambda device: True)
        monkeypatch.setattr(fused, "_compiled", lambda: fused.fused_chunk)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("beta", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_student_that_is_sure_keeps_its_digits(beta: float, temperature: float) -> None:
    check(
        _sure(1, 17.0), "hidden", 5e-6, torch.float32, temperature=temperature, soft_weight=1.0,
        divergence=Divergence(0, 0, 1, beta=beta),
    )  # fmt: skip


@pytest.mark.usefixtures("form")
def test_the_tail_of_great_logits_keeps_its_digits() -> None:
    """Against itself in fp64: the oracle's tail is 1 − Σ p, which is nothing here."""
    c = case(65, 1031, width=3, spread=35.0)
    kept = sparse_of(case(65, 1031, spread=1.0, seed=99).teacher, 4, 0.5)
    options: dict[str, Any] = {
        "temperature": 0.5, "soft_weight": 1.0, "divergence": Divergence(0, 0, 1, beta=0.05),
    }  # fmt: skip
    expected = evaluate(c, kept, **options)
    for ours, wide in zip(evaluate(c.cast(torch.float32), kept, **options), expected, strict=True):
        assert error(ours, wide) < 5e-6


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("teacher", ["none", "sparse"])
def test_where_a_cap_holds_little_is_left_and_that_is_right(teacher: str) -> None:
    """Logits of 8 to 18 under a cap of 1: its slope is 5e-7 and less."""
    c = case(9, 23, width=1)
    c.hidden, c.head = (x.sign() * (1 + x.abs() % 0.5) for x in (c.hidden, c.head))
    c.head *= 8
    options = {"temperature": 2.0, "soft_weight": 0.5, "softcap": 1.0}
    check(c.cast(torch.float32).cast(torch.float64), teacher, 5e-6, torch.float32, **options)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", ["reverse", "mix"])
@pytest.mark.parametrize("kept", [9, 60])
def test_a_token_that_the_teacher_all_but_excludes_counts_in_full(name: str, kept: int) -> None:
    """Its log p is known, however small it is."""
    c = case(7, 60)
    logits = torch.randn(7, 60).double().scatter(-1, torch.arange(7)[:, None], -100.0)
    log_p = logits.log_softmax(-1)
    ids = torch.arange(kept).expand(7, -1)
    teacher = TeacherSparse(ids, log_p[:, :kept], (log_p / 2).logsumexp(-1))
    options: dict[str, Any] = {
        "temperature": 2.0, "soft_weight": 1.0, "divergence": DIVERGENCES[name],
    }  # fmt: skip
    expected = evaluate(c, teacher, oracle=True, **options)
    for ours, oracle in zip(evaluate(c, teacher, **options), expected, strict=True):
        assert error(ours, oracle) < 1e-10


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(DIVERGENCES)),
    temperature=st.sampled_from(TEMPERATURES),
    spread=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    sparse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_finite_and_never_negative_however_far_apart(
    name: str, temperature: float, spread: float, sparse: bool, seed: int
) -> None:
    c = case(7, 60, spread=spread, seed=seed).cast(torch.float32)
    c.labels = c.labels.clamp_min(0)
    c.hidden = -c.hidden.flip(0)
    hidden = c.hidden.clone().requires_grad_()
    teacher = sparse_of(c.teacher, 9, temperature) if sparse else c.teacher
    parts = distillation_loss(
        hidden, c.head, c.labels, teacher, temperature=temperature, soft_weight=1.0,
        normalizer=1.0, divergence=DIVERGENCES[name],
    )  # fmt: skip
    parts.total.backward()
    assert float(parts.soft) >= -1e-5
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(parts.total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward": 0}, "one or more that are positive"),
        ({"reverse": -1}, "one or more that are positive"),
        ({"jsd": 1, "beta": 0}, "beta: 0"),
        ({"jsd": 1, "beta": 1}, "beta: 1"),
    ],
)
def test_refuses(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Divergence(**arguments)

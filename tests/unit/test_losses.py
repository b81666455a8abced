"""The chunked core against the dense float64 oracle: loss and both gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kubedistill_trainer.losses import (
    FORWARD_KL,
    Divergence,
    Teacher,
    TeacherHidden,
    TeacherSampled,
    TeacherSparse,
    distillation_loss,
)
from kubedistill_trainer.losses.reference import dense_loss
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from unit.test_losses_kit import TEMPERATURES, case, check, error, evaluate, sparse_of

MIX = Divergence(0.5, 0.3, 0.7, beta=0.25)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("teacher", ["hidden", "sparse", "none"])
def test_equals_the_oracle(
    teacher: str, weight: float, temperature: float, dtype: torch.dtype, tolerance: float
) -> None:
    check(case(), teacher, tolerance, dtype, temperature=temperature, soft_weight=weight)


@pytest.mark.parametrize("teacher", ["hidden", "sparse", "none"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_softcap_and_padded_vocabulary(teacher: str, chunk: int) -> None:
    c = case(vocab=150, rows=163)
    c.teacher = TeacherHidden(c.teacher.hidden_NH, c.teacher.head_VH[:152], None)
    found = {
        "soft_weight": 0.6, "temperature": 3.0, "vocab_size": 150, "softcap": 2.5,
    }  # fmt: skip
    check(c, teacher, 1e-5, torch.float32, **found)
    kept: Teacher | None = {"hidden": c.teacher, "none": None}.get(
        teacher, sparse_of(c.teacher, 9, 3.0, 150)
    )
    ours = evaluate(c, kept, chunk_tokens=chunk, **found)
    for a, b in zip(ours, evaluate(c, kept, oracle=True, **found), strict=True):
        assert error(a, b) < 1e-10
    assert not ours[2][150:].any()


def test_softcap_of_the_teacher() -> None:
    c = case()
    c.teacher = TeacherHidden(c.teacher.hidden_NH, c.teacher.head_VH, 1.5)
    check(c, "hidden", 1e-5, torch.float32, temperature=2.0, soft_weight=0.5)


@pytest.mark.parametrize("teacher", ["hidden", "sparse"])
def test_a_large_vocabulary_at_high_temperature_keeps_its_digits(teacher: str) -> None:
    """KL is a thousandth of log Z here: the plain sum p (log p − log q) has 1e-4 of error."""
    c = case(tokens=16, vocab=30_011)
    check(c, teacher, 1e-5, torch.float32, temperature=20.0, soft_weight=1.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("weight", [0.6, 1.0])
@pytest.mark.parametrize(
    ("teacher", "seed"), [("hidden", 0), ("hidden", 1), ("sparse", 1), ("none", 1)]
)
def test_a_vocabulary_as_large_and_as_padded_as_real_ones(
    teacher: str, seed: int, weight: float, temperature: float
) -> None:
    """What rounding does to the sum of a row of 151,936 must not get into q − p."""
    c = case(tokens=8, vocab=151_936, rows=152_064, seed=seed)
    c.head[151_936:] = 9
    c.teacher.head_VH[151_936:] = 9
    check(
        c, teacher, 1e-5, torch.float32, temperature=temperature, soft_weight=weight,
        vocab_size=151_936,
    )  # fmt: skip


@pytest.mark.parametrize("teacher", ["hidden", "sparse", "none"])
def test_masked_tokens_cost_nothing_and_say_nothing(teacher: str) -> None:
    """As many products as without them, and what stands there may be anything."""
    c = case().cast(torch.float32)
    full: Teacher | None = {"hidden": c.teacher, "none": None}.get(
        teacher, sparse_of(c.teacher, 9, 4.0)
    )
    valid = c.labels != -100
    assert 0 < int(valid.sum()) < len(valid)
    options = {"temperature": 4.0, "soft_weight": 0.7, "normalizer": 9.0}

    def cost(rows: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
        hidden, head = c.leaves()
        part = full
        if isinstance(full, TeacherHidden):
            part = TeacherHidden(full.hidden_NH[rows], full.head_VH)
        elif isinstance(full, TeacherSparse):
            part = TeacherSparse(full.ids_NK[rows], full.logprobs_NK[rows], full.log_z_N[rows])
        counter = FlopCounterMode(display=False)
        with counter:
            loss = distillation_loss(hidden[rows], head, c.labels[rows], part, **options).total
        loss.backward()
        assert hidden.grad is not None
        assert head.grad is not None
        return counter.get_total_flops(), loss.detach(), hidden.grad, head.grad

    alone = cost(valid.nonzero().flatten())
    c.hidden[~valid] = float("nan")
    c.teacher.hidden_NH[~valid] = float("inf")
    whole = cost(torch.arange(len(valid)))
    assert whole[0] == alone[0] > 0
    assert torch.equal(whole[1], alone[1])
    assert not whole[2][~valid].any()
    for found, expected in zip(whole[2:], alone[2:], strict=True):
        assert torch.equal(found, expected)


def test_a_teacher_is_given_and_not_learnt() -> None:
    """Its states and head take part in the loss; no gradient reaches them, wanted or not."""
    c = case()
    states = c.teacher.hidden_NH.clone().requires_grad_()
    head = c.teacher.head_VH.clone().requires_grad_()
    found = evaluate(c, TeacherHidden(states, head), temperature=4.0, soft_weight=0.7)
    assert states.grad is None
    assert head.grad is None
    for ours, plain in zip(
        found, evaluate(c, c.teacher, temperature=4.0, soft_weight=0.7), strict=True
    ):
        assert torch.equal(ours, plain)


def test_a_constant_added_to_the_teachers_logits_changes_nothing() -> None:
    c = case(vocab=3_001).cast(torch.float32)
    ones = torch.ones(len(c.hidden), 1)
    shifted = TeacherHidden(
        torch.cat([c.teacher.hidden_NH, ones], 1),
        torch.cat([c.teacher.head_VH, torch.full((3_001, 1), 40.0)], 1),
    )
    options = {"temperature": 10.0, "soft_weight": 1.0}
    plain, moved = evaluate(c, c.teacher, **options), evaluate(c, shifted, **options)
    for a, b in zip(plain, moved, strict=True):
        # 40 has 32 times fewer digits behind the point than a logit.
        assert error(b, a.double()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("teacher", "divergence"),
    [
        ("hidden", FORWARD_KL),
        ("hidden", MIX),
        ("sparse", FORWARD_KL),
        ("sparse", MIX),
        ("sampled", FORWARD_KL),
        ("none", FORWARD_KL),
    ],
)
def test_any_split_gives_the_same(teacher: str, divergence: Divergence, dtype: torch.dtype) -> None:
    """Micro-batches, ranks and accumulation steps all are sums of parts over one normaliser."""
    c = case(tokens=41).cast(dtype)
    kept = sparse_of(c.teacher, 9, 4.0)
    drawn = TeacherSampled(kept.ids_NK, kept.logprobs_NK.softmax(-1))
    full: Teacher | None = {"hidden": c.teacher, "none": None, "sampled": drawn}.get(teacher, kept)
    options: dict[str, Any] = {
        "temperature": 4.0, "soft_weight": 0.7, "divergence": divergence,
    }  # fmt: skip
    whole = evaluate(c, full, **options)
    hidden, head = c.leaves()
    total = torch.zeros(())
    for rows in torch.arange(41).split([1, 5, 30, 0, 5]):
        part = full
        if isinstance(full, TeacherHidden):
            part = TeacherHidden(full.hidden_NH[rows], full.head_VH)
        elif isinstance(full, TeacherSparse):
            part = TeacherSparse(full.ids_NK[rows], full.logprobs_NK[rows], full.log_z_N[rows])
        elif isinstance(full, TeacherSampled):
            part = TeacherSampled(full.ids_NK[rows], full.shares_NK[rows])
        loss = distillation_loss(
            hidden[rows], head, c.labels[rows], part, normalizer=torch.tensor(c.valid), **options
        ).total
        (loss * 3).backward()
        total = total + loss.detach()
    assert error(total, whole[0].double()) < 1e-6
    assert hidden.grad is not None
    assert head.grad is not None
    assert error(hidden.grad / 3, whole[1].double()) < 1e-6
    assert error(head.grad / 3, whole[2].double()) < 1e-6


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_any_chunk_gives_the_same(chunk: int) -> None:
    c = case()
    options = {"temperature": 2.0, "soft_weight": 0.3}
    expected = evaluate(c, c.teacher, **options)
    for a, b in zip(evaluate(c, c.teacher, chunk_tokens=chunk, **options), expected, strict=True):
        assert error(a, b) < 1e-12


def test_without_any_label_it_is_zero_and_every_gradient_exists() -> None:
    c = case()
    c.labels = torch.full_like(c.labels, -100)
    hidden, head = c.leaves()
    parts = distillation_loss(
        hidden, head, c.labels, c.teacher, temperature=4.0, soft_weight=0.5, normalizer=12
    )
    parts.total.backward()
    assert [float(x.detach()) for x in (parts.total, parts.soft, parts.hard)] == [0, 0, 0]
    for grad in (hidden.grad, head.grad):
        assert grad is not None
        assert not grad.any()


def test_a_tied_head_gets_both_gradients() -> None:
    c = case(vocab=61)
    tokens = torch.randint(0, 61, (len(c.labels),))
    grads = []
    for oracle in (False, True):
        head = c.head.clone().requires_grad_()
        options = {"temperature": 4.0, "soft_weight": 0.7, "normalizer": c.valid}
        hidden = torch.tanh(head[tokens])
        if oracle:
            loss = dense_loss(hidden, head, c.labels, c.teacher, **options)
        else:
            loss = distillation_loss(hidden, head, c.labels, c.teacher, **options).total
        loss.backward()
        assert head.grad is not None
        grads.append(head.grad)
    assert error(grads[0], grads[1]) < 1e-10


def test_what_needs_no_gradient_gets_none() -> None:
    c = case()
    options = {"temperature": 4.0, "soft_weight": 0.7, "normalizer": c.valid}
    frozen_head = c.hidden.clone().requires_grad_()
    distillation_loss(frozen_head, c.head, c.labels, c.teacher, **options).total.backward()
    assert c.head.grad is None
    assert (
        error(frozen_head.grad, evaluate(c, c.teacher, **_without_normaliser(options))[1]) < 1e-12
    )
    with torch.no_grad():
        parts = distillation_loss(frozen_head, c.head, c.labels, c.teacher, **options)
    assert not parts.total.requires_grad
    assert float(parts.total.detach()) == pytest.approx(float(0.7 * parts.soft + 0.3 * parts.hard))


def _without_normaliser(options: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in options.items() if name != "normalizer"}


def test_a_part_without_weight_is_not_computed() -> None:
    c = case()
    soft_only = distillation_loss(
        c.hidden, c.head, c.labels, c.teacher, temperature=4, soft_weight=1, normalizer=1
    )
    assert torch.isnan(soft_only.hard)
    assert float(soft_only.total) == float(soft_only.soft)
    hard_only = distillation_loss(
        c.hidden, c.head, c.labels, None, temperature=4, soft_weight=1, normalizer=1
    )
    assert torch.isnan(hard_only.soft)
    assert float(hard_only.total) == float(hard_only.hard)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_sum_in_fp32(dtype: torch.dtype) -> None:
    c = case(vocab=501)
    half = c.cast(dtype)
    c = half.cast(torch.float64)
    for options in (
        {"temperature": 1.0, "soft_weight": 0.5},
        {"temperature": 4.0, "soft_weight": 1.0},
    ):
        found = evaluate(half, half.teacher, **options)
        expected = evaluate(c, c.teacher, oracle=True, **options)
        assert found[1].dtype == found[2].dtype == dtype
        for ours, oracle in zip(found, expected, strict=True):
            assert error(ours, oracle) < (2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_fp16_gradients_survive_a_large_normaliser_through_loss_scaling() -> None:
    half = case(vocab=501).cast(torch.float16)
    hidden, head = half.leaves()
    options = {"temperature": 4.0, "soft_weight": 0.7, "normalizer": 1e6}
    parts = distillation_loss(hidden, head, half.labels, half.teacher, **options)
    (parts.total * 2.0**16).backward()
    wide = half.cast(torch.float64)
    expected = evaluate(wide, wide.teacher, oracle=True, temperature=4.0, soft_weight=0.7)[2]
    assert head.grad is not None
    assert error(head.grad.double() / 2**16 * 1e6 / wide.valid, expected) < 5e-3


@pytest.mark.parametrize("kind", ["hidden", "sparse", "none"])
def test_gradcheck(kind: str) -> None:
    c = case(tokens=4, vocab=7, width=3)
    teacher: Teacher | None = {"hidden": c.teacher, "none": None}.get(
        kind, sparse_of(c.teacher, 4, 2.0)
    )

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return distillation_loss(
            hidden, head, c.labels, teacher, temperature=2.0, soft_weight=0.4, normalizer=3.0,
            softcap=3.0, chunk_tokens=2,
        ).total  # fmt: skip

    assert torch.autograd.gradcheck(loss, (c.hidden.requires_grad_(), c.head.requires_grad_()))


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9),
    vocab=st.integers(2, 300),
    temperature=st.sampled_from(TEMPERATURES),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_kl_is_never_negative_and_zero_for_equal_models(
    tokens: int, vocab: int, temperature: float, spread: float, seed: int
) -> None:
    c = case(tokens, vocab, spread=spread, seed=seed).cast(torch.float32)
    c.labels = c.labels.clamp_min(0)
    options = {"temperature": temperature, "soft_weight": 1.0, "normalizer": 1.0}
    for teacher in (c.teacher, sparse_of(c.teacher, (vocab + 1) // 2, temperature)):
        parts = distillation_loss(c.hidden, c.head, c.labels, teacher, **options)
        assert float(parts.soft) >= -1e-5
    same = TeacherHidden(c.hidden, c.head)
    hidden = c.hidden.requires_grad_()
    parts = distillation_loss(hidden, c.head, c.labels, same, **options)
    parts.total.backward()
    assert abs(float(parts.soft)) < 1e-5
    assert float(hidden.grad.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"soft_weight": 1.5}, "soft_weight: 1.5"),
        ({"normalizer": 0.0}, "normalizer: 0.0"),
        ({"vocab_size": 999}, "the student's head has 211 rows"),
    ],
)
def test_refuses(change: dict[str, float], message: str) -> None:
    c = case()
    options = {"temperature": 1.0, "soft_weight": 0.5, "normalizer": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        distillation_loss(c.hidden, c.head, c.labels, c.teacher, **options)  # type: ignore[arg-type]

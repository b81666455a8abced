"""Sampled payload: the draws, their bytes, and the loss of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kubedistill_trainer.losses import Divergence, TeacherSampled, distillation_loss
from kubedistill_trainer.methods.signal import joined_sampled
from kubedistill_trainer.teacher.codec import decode_outputs, encode_outputs
from kubedistill_trainer.teacher.payload import Sampled, TeacherOutputs, sampled_of_logits
from kubedistill_trainer.teacher.payload_spec import SampledSpec
from kubedistill_trainer.teacher.sampled import decode_sampled, encode_sampled
from unit.test_losses_kit import TEMPERATURES, case, error, evaluate


def _drawn(logits: torch.Tensor, draws: int, temperature: float = 1.0, seed: int = 0) -> Sampled:
    generator = torch.Generator().manual_seed(seed)
    return sampled_of_logits(logits, draws, temperature, generator)


@given(
    positions=st.integers(1, 12),
    vocabulary=st.integers(1, 150),
    draws=st.sampled_from([1, 7, 50, 300]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_round_trip(positions: int, vocabulary: int, draws: int, spread: float, seed: int) -> None:
    logits = spread * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(1))
    drawn, spec = _drawn(logits, draws, seed=seed), SampledSpec(draws=draws)
    assert (drawn.counts.sum(-1) == draws).all()
    kept = drawn.counts > 0
    assert (drawn.token_ids[kept] < vocabulary).all()
    assert (drawn.token_ids[~kept] >= vocabulary).all()
    found = decode_sampled(encode_sampled(drawn, spec, vocabulary), spec)
    assert torch.equal(found.token_ids, drawn.token_ids)
    assert torch.equal(found.counts, drawn.counts)


def test_the_same_seed_draws_the_same() -> None:
    logits = torch.randn(5, 40)
    assert torch.equal(_drawn(logits, 20).token_ids, _drawn(logits, 20).token_ids)
    assert not torch.equal(_drawn(logits, 20).counts, _drawn(logits, 20, seed=1).counts)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_shares_estimate_the_distribution_without_bias(temperature: float) -> None:
    logits = 2 * torch.randn(1, 9, generator=torch.Generator().manual_seed(3))
    drawn = _drawn(logits.expand(4000, 9), 50, temperature)
    teacher = joined_sampled([TeacherOutputs(sampled=drawn)], torch.device("cpu"))
    total = torch.zeros(4000, 9).scatter_add_(1, teacher.ids_NK, teacher.shares_NK)
    assert torch.allclose(total.sum(1), torch.ones(4000))
    expected = torch.softmax(logits[0] / temperature, -1)
    # 200,000 draws: a standard error below 0.0011.
    assert float((total.mean(0) - expected).abs().max()) < 0.005


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    logits = torch.zeros(50, 12)
    logits[:, 8:] = 30.0
    generator = torch.Generator().manual_seed(0)
    drawn = sampled_of_logits(logits, 20, 1.0, generator, visible_vocab_size=8)
    assert int(drawn.token_ids[drawn.counts > 0].max()) < 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.tensor([[1, 1]])}, "do not sum to 3 draws"),
        ({"token_ids": torch.tensor([[4, 4]])}, "must rise strictly"),
        ({"token_ids": torch.tensor([[4, 99]])}, "must rise strictly within 0…11"),
        ({"token_ids": torch.tensor([[4, 10]])}, "beyond the vocabulary of 10 was drawn"),
    ],
)
def test_refuses(change: dict[str, torch.Tensor], message: str) -> None:
    parts = {"token_ids": torch.tensor([[4, 7]]), "counts": torch.tensor([[1, 2]]), **change}
    with pytest.raises(ValueError, match=message):
        encode_sampled(Sampled(**parts), SampledSpec(draws=3), 10)


@pytest.mark.parametrize("cut", [3, 20, -1])
def test_a_damaged_record_is_refused(cut: int) -> None:
    spec = SampledSpec(draws=30)
    record = encode_outputs(TeacherOutputs(sampled=_drawn(torch.randn(8, 60), 30)), [spec], 60)
    assert decode_outputs(record, [spec]).positions == 8
    with pytest.raises(ValueError, match=r"record|coded ids|raw bits"):
        decode_outputs(record[:cut], [spec])


def _teacher(temperature: float) -> TeacherSampled:
    """For all tokens of `case()`, in two samples of different widths."""
    c = case()
    logits = c.teacher.hidden_NH @ c.teacher.head_VH.T
    parts = [_drawn(rows, 25, temperature) for rows in (logits[:9], logits[9:])]
    return joined_sampled([TeacherOutputs(sampled=part) for part in parts], torch.device("cpu"))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("weight", [0.6, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_loss_equals_the_oracle(
    temperature: float, weight: float, dtype: torch.dtype, tolerance: float
) -> None:
    teacher = _teacher(temperature)
    exact = TeacherSampled(teacher.ids_NK, (teacher.shares_NK.double() * 25).round() / 25)
    options = {"temperature": temperature, "soft_weight": weight}
    found = evaluate(case().cast(dtype), exact, **options)
    for ours, oracle in zip(found, evaluate(case(), exact, oracle=True, **options), strict=True):
        assert error(ours, oracle) < tolerance


def test_other_divergences_are_refused() -> None:
    c = case()
    with pytest.raises(ValueError, match="draws estimate the plain KL"):
        distillation_loss(
            c.hidden, c.head, c.labels, _teacher(1.0), temperature=1.0, soft_weight=0.5,
            normalizer=1.0, divergence=Divergence(0, 1, 0),
        )  # fmt: skip

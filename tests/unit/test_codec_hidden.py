"""Hidden payload: size, error, shapes that do not divide, refusal of what cannot be stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kubedistill_trainer.teacher.hidden import decode_hidden, encode_hidden
from kubedistill_trainer.teacher.payload import Hidden
from kubedistill_trainer.teacher.payload_spec import HiddenSpec


def _round_trip(states: torch.Tensor, spec: HiddenSpec | None = None) -> torch.Tensor:
    return decode_hidden(encode_hidden(Hidden(states), spec or HiddenSpec())).states


@pytest.mark.parametrize("size", [576, 4096, 8192, 2050])
def test_size_is_at_most_1_07_bytes_a_channel(size: int) -> None:
    for positions in (64, 256, 1024):
        data = encode_hidden(Hidden(torch.randn(positions, size)), HiddenSpec())
        assert len(data) / positions <= 1.07 * size


@given(
    positions=st.integers(0, 9),
    size=st.integers(1, 130),
    group=st.sampled_from([1, 7, 32, 200]),
    scale=st.sampled_from([1e-9, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_error_is_within_half_a_step_of_its_group(
    positions: int, size: int, group: int, scale: float, seed: int
) -> None:
    states = scale * torch.randn(positions, size, generator=torch.Generator().manual_seed(seed))
    found = _round_trip(states, HiddenSpec(group_size=group))
    assert found.shape == states.shape
    for first in range(0, size, group):
        part = states[:, first : first + group]
        # half a step, the rounding of the fp16 scale, and its smallest step
        bound = part.abs().amax(1, keepdim=True) * (0.5 / 127 + 6e-4) + 127 * 6e-8
        assert bool(((found[:, first : first + group] - part).abs() <= bound).all())


@pytest.mark.parametrize("peak", [1.0, 4.0, 8.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 10.0])
def test_gradient_error_stays_under_3_percent(peak: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(256, 576, generator=generator)
    states[:, :4] *= 12  # final norms leave a few loud channels
    head = torch.randn(4000, 576, generator=generator) * peak / 576**0.5
    student = (states + 0.5 * torch.randn(256, 576, generator=generator)) @ head.T / temperature
    wanted = torch.softmax(student, -1) - torch.softmax(states @ head.T / temperature, -1)
    coded = _round_trip(states)
    found = torch.softmax(student, -1) - torch.softmax(coded @ head.T / temperature, -1)
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(error.mean()) <= 0.03


def test_a_loud_channel_does_not_drown_its_group() -> None:
    states = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    states[:, 5] *= 30
    quiet = [channel for channel in range(32) if channel != 5]

    def error(found: torch.Tensor) -> float:
        return float((found - states)[:, quiet].pow(2).mean().sqrt())

    short = torch.cat([_round_trip(states[first : first + 128]) for first in (0, 128)])
    assert error(_round_trip(states)) <= 0.35 * error(short)


def test_bfloat16_is_exact_for_bfloat16_states() -> None:
    states = torch.randn(5, 33).to(torch.bfloat16)
    assert torch.equal(_round_trip(states, HiddenSpec(precision="bfloat16")), states.float())


def test_decodes_to_the_dtype_asked_for() -> None:
    data = encode_hidden(Hidden(torch.randn(2, 64)), HiddenSpec())
    assert decode_hidden(data, torch.bfloat16).states.dtype == torch.bfloat16


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_refuses_what_is_not_finite(value: float, words: str) -> None:
    states = torch.zeros(2, 32)
    states[1, 3] = value
    with pytest.raises(ValueError, match=words):
        encode_hidden(Hidden(states), HiddenSpec())


def test_refuses_what_an_fp16_scale_cannot_hold() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        encode_hidden(Hidden(torch.full((1, 32), 1e9)), HiddenSpec())


def test_a_record_cut_short_is_refused() -> None:
    data = encode_hidden(Hidden(torch.randn(3, 40)), HiddenSpec())
    for size in (0, 5, len(data) - 1):
        with pytest.raises(ValueError, match="bytes"):
            decode_hidden(data[:size])

"""Hidden states as int8 with one fp16 scale a group of channels: H + 2·⌈H/32⌉ bytes a position.

Final norms leave some channels tens of times louder than the rest, and a loud channel coarsens the
steps of its whole group. So channels are first divided by the square root of their root mean square
over the sample, which takes error from the many quiet channels and gives the loud one finer steps
than full equalisation would. On SmolLM2-135M's states, against a student with the same states and
30% noise, it cuts the gradient error by 56 to 64% (T = 1 … 10) for one byte a channel and sample;
samples too short to spread that byte do without.

Layout: header (positions u32, hidden size u32, group size u16, precision u8, equalised u8); when
equalised, an exponent i8 [H] with divisor 2^(e/4); the scales of all positions; the values of all
positions. Planes of one type compress better than interleaved ones.
"""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from kubedistill_trainer.teacher.payload import Hidden
from kubedistill_trainer.teacher.payload_spec import HiddenSpec

_HEADER = struct.Struct("<IIHBB")
_PRECISIONS = ("int8", "bfloat16")
_LARGEST = 127
_EQUALISED_FROM = 256  # positions: the exponents then cost at most 0.4% of H
_SMALLEST_SCALE = 2.0**-24  # of fp16
_STEPS_PER_OCTAVE = 4


def encode_hidden(payload: Hidden, spec: HiddenSpec) -> bytes:
    """Bytes of `payload.states` [N, H]. ValueError for NaN, ±inf or values beyond fp16 scales."""
    states = payload.states.detach()
    if states.dim() != 2:
        raise ValueError(f"hidden states must be [positions, H], found {list(states.shape)}")
    if not bool(torch.isfinite(states).all()):
        raise ValueError("hidden states hold NaN or an infinity")
    positions, size = states.shape
    precision = _PRECISIONS.index(spec.precision)
    if spec.precision == "bfloat16":
        header = _HEADER.pack(positions, size, spec.group_size, precision, 0)
        plane = states.to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()
        return header + plane.astype("<i2", copy=False).tobytes()
    states = states.float()
    equalised = positions >= _EQUALISED_FROM
    header = _HEADER.pack(positions, size, spec.group_size, precision, int(equalised))
    exponents = b""
    if equalised:
        steps = _channel_exponents(states)
        states = states / _divisors(steps)
        exponents = steps.cpu().numpy().tobytes()
    values, scales = _quantised(states, spec.group_size)
    planes = (scales.cpu().numpy().astype("<f2", copy=False), values.cpu().numpy())
    return b"".join((header, exponents, *(plane.tobytes() for plane in planes)))


def decode_hidden(data: bytes, dtype: torch.dtype = torch.float32) -> Hidden:
    """Inverse of `encode_hidden`. ValueError when `data` is not as long as its header says."""
    if len(data) < _HEADER.size:
        raise ValueError(f"hidden record has {len(data)} bytes, less than its header")
    positions, size, group_size, precision, equalised = _HEADER.unpack_from(data)
    if group_size == 0 or precision >= len(_PRECISIONS):
        raise ValueError(f"hidden record has group size {group_size}, precision {precision}")
    groups = _groups(size, group_size)
    row = size + 2 * groups if precision == 0 else 2 * size
    first = _HEADER.size + (size if equalised else 0)
    wanted = first + positions * row
    if len(data) != wanted:
        raise ValueError(f"hidden record has {len(data)} bytes, its header says {wanted}")
    if precision == 1:
        plane = np.frombuffer(data, "<i2", offset=first).reshape(positions, size)
        return Hidden(torch.from_numpy(plane.copy()).view(torch.bfloat16).to(dtype))
    scales = np.frombuffer(data, "<f2", positions * groups, first).reshape(positions, groups)
    values = np.frombuffer(data, np.int8, offset=first + 2 * positions * groups)
    states = _restored(
        torch.from_numpy(values.reshape(positions, size).copy()),
        torch.from_numpy(scales.copy()),
        group_size,
    )
    if equalised:
        steps = np.frombuffer(data, np.int8, size, _HEADER.size)
        states.mul_(_divisors(torch.from_numpy(steps.copy())))
    return Hidden(states.to(dtype))


def _channel_exponents(states: Tensor) -> Tensor:
    """int8 [H] of float32 [N, H]: quarter octaves of the square root of each channel's loudness."""
    loudness = states.pow(2).mean(dim=0).sqrt().clamp_min(2.0**-60)
    steps = torch.round(_STEPS_PER_OCTAVE * 0.5 * torch.log2(loudness))
    return steps.clamp(-_LARGEST, _LARGEST).to(torch.int8)


def _divisors(steps: Tensor) -> Tensor:
    return torch.exp2(steps.float() / _STEPS_PER_OCTAVE)


def _groups(size: int, group_size: int) -> int:
    return -(-size // group_size)


def _quantised(states: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 [N, H] and fp16 scales [N, groups] of float32 [N, H]."""
    positions, size = states.shape
    groups = _groups(size, group_size)
    padded = torch.nn.functional.pad(states, (0, groups * group_size - size))
    grouped = padded.reshape(positions, groups, group_size)
    scales = (grouped.abs().amax(dim=-1) / _LARGEST).to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(
            f"hidden states up to {float(states.abs().max()):.3g} exceed what an fp16 scale holds; "
            "use precision bfloat16"
        )
    # quantise by the scale that is stored, so that its own rounding adds no error
    divisors = scales.float().clamp_min(_SMALLEST_SCALE)
    values = (grouped / divisors[..., None]).round_().clamp_(-_LARGEST, _LARGEST)
    flat = values.to(torch.int8).reshape(positions, groups * group_size)
    return flat[:, :size].contiguous(), scales


def _restored(values: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """float32 [N, H] of int8 [N, H] and fp16 [N, groups]."""
    positions, size = values.shape
    if size % group_size == 0:
        grouped = values.view(positions, size // group_size, group_size).float()
        return grouped.mul_(scales.float()[..., None]).view(positions, size)
    return values.float().mul_(scales.float().repeat_interleave(group_size, dim=1)[:, :size])

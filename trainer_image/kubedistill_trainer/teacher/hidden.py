"""Hidden states as int8 with one fp16 scale a group of channels: H + 2·⌈H/32⌉ bytes a position.

Layout: header (positions u32, hidden size u32, group size u16, precision u8, reserved u8), the
scales of all positions, then the values of all positions; planes of one type compress better.
"""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

from kubedistill_trainer.teacher.payload import Hidden, HiddenSpec

_HEADER = struct.Struct("<IIHBB")
_PRECISIONS = ("int8", "bfloat16")
_LARGEST = 127


def encode_hidden(payload: Hidden, spec: HiddenSpec) -> bytes:
    """Bytes of `payload.states` [N, H]. ValueError for NaN, ±inf or values beyond fp16 scales."""
    states = payload.states.detach()
    if states.dim() != 2:
        raise ValueError(f"hidden states must be [positions, H], found {list(states.shape)}")
    positions, size = states.shape
    header = _HEADER.pack(positions, size, spec.group_size, _PRECISIONS.index(spec.precision), 0)
    if not bool(torch.isfinite(states).all()):
        raise ValueError("hidden states hold NaN or an infinity")
    if spec.precision == "bfloat16":
        plane = states.to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()
        return header + plane.astype("<i2", copy=False).tobytes()
    values, scales = _quantised(states.float(), spec.group_size)
    return b"".join(
        (
            header,
            scales.cpu().numpy().astype("<f2", copy=False).tobytes(),
            values.cpu().numpy().tobytes(),
        )
    )


def decode_hidden(data: bytes, dtype: torch.dtype = torch.float32) -> Hidden:
    """Inverse of `encode_hidden`. ValueError when `data` is not as long as its header says."""
    if len(data) < _HEADER.size:
        raise ValueError(f"hidden record has {len(data)} bytes, less than its header")
    positions, size, group_size, precision, _ = _HEADER.unpack_from(data)
    if group_size == 0:
        raise ValueError("hidden record has groups of 0 channels")
    groups = _groups(size, group_size)
    row = size + 2 * groups if precision == 0 else 2 * size
    wanted = _HEADER.size + positions * row
    if precision >= len(_PRECISIONS) or len(data) != wanted:
        raise ValueError(f"hidden record has {len(data)} bytes, its header says {wanted}")
    if precision == 1:
        plane = np.frombuffer(data, "<i2", offset=_HEADER.size).reshape(positions, size)
        return Hidden(torch.from_numpy(plane.copy()).view(torch.bfloat16).to(dtype))
    count = positions * groups
    scales = np.frombuffer(data, "<f2", count, _HEADER.size).reshape(positions, groups)
    values = np.frombuffer(data, np.int8, offset=_HEADER.size + 2 * count)
    states = _restored(
        torch.from_numpy(values.reshape(positions, size).copy()),
        torch.from_numpy(scales.copy()),
        group_size,
    )
    return Hidden(states.to(dtype))


def _groups(size: int, group_size: int) -> int:
    return -(-size // group_size)


def _grouped(states: Tensor, group_size: int) -> Tensor:
    """[N, H] → [N, groups, group_size], zero-padded where H is not a multiple."""
    positions, size = states.shape
    padding = _groups(size, group_size) * group_size - size
    padded = torch.nn.functional.pad(states, (0, padding)) if padding else states
    return padded.reshape(positions, _groups(size, group_size), group_size)


def _quantised(states: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 [N, H] and fp16 scales [N, groups] of float32 [N, H]."""
    positions, size = states.shape
    grouped = _grouped(states, group_size)
    scales = (grouped.abs().amax(dim=-1) / _LARGEST).to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(
            f"hidden states up to {float(states.abs().max()):.3g} exceed what an fp16 scale holds; "
            "use precision bfloat16"
        )
    # quantise by the scale that is stored, so that its own rounding adds no error
    divisor = scales.float().clamp_min(torch.finfo(torch.float16).smallest_normal / 2**10)
    values = (grouped / divisor[..., None]).round_().clamp_(-_LARGEST, _LARGEST)
    flat = values.to(torch.int8).reshape(positions, scales.shape[1] * group_size)
    return flat[:, :size].contiguous(), scales


def _restored(values: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """float32 [N, H] of int8 [N, H] and fp16 [N, groups]."""
    positions, size = values.shape
    if size % group_size == 0:
        grouped = values.view(positions, size // group_size, group_size).float()
        return grouped.mul_(scales.float()[..., None]).view(positions, size)
    return values.float().mul_(scales.float().repeat_interleave(group_size, dim=1)[:, :size])

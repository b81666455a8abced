"""Log-probabilities and normalisers as small integers, with the fine steps where the mass is.

log p = top − range · (level / (levels − 2))²: the square makes steps small next to the largest
probability; the last level means −inf. log Z_T is 16-bit fixed point between its exact bounds, 0
and (1 − 1/T) · log V: 30 times finer than fp16 at the same size.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_U16 = 65535

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def quantised(log_probs: F64, levels: int, vocab_size: int) -> tuple[I64, NDArray[np.float16], I64]:
    """Tops as u16 [N], ranges fp16 [N] and levels [N, K]; see the module's docstring."""
    floor = math.log(max(vocab_size, 2))
    tops = np.rint(_U16 * np.sqrt(np.clip(-log_probs.max(1, initial=-np.inf), 0, floor) / floor))
    top = _top(tops, vocab_size)
    depth = top[:, None] - log_probs
    # beyond what fp16 holds, a probability is zero in every float format
    lost = depth > float(np.finfo(np.float16).max) / 2
    depth[lost] = 0.0
    ranges = np.nextafter(
        np.clip(depth, 0, None).max(1, initial=0.0).astype(np.float16), np.float16(np.inf)
    )
    code = np.rint((levels - 2) * np.sqrt(np.clip(depth / ranges[:, None].astype(float), 0, 1)))
    code[lost] = levels - 1
    return tops.astype(np.int64), ranges, code.astype(np.int64)


def _top(tops: NDArray[np.generic], vocab_size: int) -> F64:
    """The largest log-probability [N]: a square law, finest where the teacher is sure."""
    scaled: F64 = tops.astype(np.float64) / _U16
    return -math.log(max(vocab_size, 2)) * scaled * scaled


def restored(
    tops: NDArray[np.uint16],
    ranges: NDArray[np.float16],
    codes: NDArray[np.integer],
    levels: int,
    vocab_size: int,
) -> F32:
    """log p float32 [N, K] at T = 1."""
    curve = (np.arange(levels) / (levels - 2)).astype(np.float32) ** 2
    curve[-1] = np.inf
    scaled: F32 = curve[codes] * ranges.astype(np.float32)[:, None]
    return _top(tops, vocab_size).astype(np.float32)[:, None] - scaled


def _log_z_bound(temperature: float, vocab_size: int) -> float:
    """log Z_T lies between 0 and this: 0 for a sure teacher, this for a uniform one."""
    return (1.0 - 1.0 / temperature) * math.log(max(vocab_size, 2))


def fixed_log_z(log_z: F64, grid: tuple[float, ...], vocab_size: int) -> I64:
    """Fixed point [N, G without T = 1] of log Z [N, G]."""
    columns = [
        np.rint(np.clip(log_z[:, i] / _log_z_bound(t, vocab_size), 0, 1) * _U16)
        for i, t in enumerate(grid)
        if t != 1.0
    ]
    return np.stack(columns, 1).astype(np.int64) if columns else np.empty((len(log_z), 0), np.int64)


def float_log_z(planes: NDArray[np.uint16], grid: tuple[float, ...], vocab_size: int) -> F32:
    """log Z float32 [N, G] of fixed point [N, G without T = 1]."""
    log_z = np.zeros((len(planes), len(grid)), np.float32)
    others = [i for i, t in enumerate(grid) if t != 1.0]
    for source, column in enumerate(others):
        log_z[:, column] = planes[:, source] * (_log_z_bound(grid[column], vocab_size) / _U16)
    return log_z

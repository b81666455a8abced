"""The record of a Sparse payload.

Layout: header (N, K, V); tops u16 [N]; ranges fp16 [N]; log Z u16 [N, G without T = 1]; then ids
and levels (`sparse_symbols.py`). The numbers are those of `quantise.py`.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from kubedistill_trainer.teacher import quantise
from kubedistill_trainer.teacher.payload import Sparse
from kubedistill_trainer.teacher.payload_spec import SparseSpec
from kubedistill_trainer.teacher.quantise import F32, F64, I64
from kubedistill_trainer.teacher.sparse_symbols import (
    MAX_VOCABULARY,
    decode_symbols,
    encode_symbols,
)

_HEADER = struct.Struct("<III")


def encode_sparse(payload: Sparse, spec: SparseSpec, vocab_size: int) -> bytes:
    """Bytes of one sample. ValueError when `payload` does not fit `spec` or `vocab_size`."""
    ids, log_probs, log_z = _checked(payload, spec, vocab_size)
    tops, ranges, levels = quantise.quantised(log_probs, spec.levels, vocab_size)
    planes = quantise.fixed_log_z(log_z, spec.temperatures, vocab_size)
    return b"".join(
        (
            _HEADER.pack(*ids.shape, vocab_size),
            tops.astype("<u2").tobytes(),
            ranges.astype("<f2").tobytes(),
            planes.astype("<u2").tobytes(),
            encode_symbols(ids, levels, vocab_size, spec.levels),
        )
    )


def decode_sparse(data: bytes, spec: SparseSpec) -> Sparse:
    """Inverse of `encode_sparse` up to quantisation. ValueError when `data` is not such a record.

    The kept mass never exceeds 1 at any T, whatever rounding did, so a tail is never negative.
    """
    if len(data) < _HEADER.size:
        raise ValueError(f"sparse record has {len(data)} bytes, less than its header")
    positions, k, vocab_size = _HEADER.unpack_from(data)
    stored = sum(temperature != 1.0 for temperature in spec.temperatures)
    symbols = _HEADER.size + 2 * positions * (2 + stored)
    if k != spec.k or len(data) < symbols:
        raise ValueError(
            f"sparse record has K = {k}, N = {positions} and {len(data)} bytes; "
            f"K = {spec.k} and at least {symbols} bytes were expected"
        )
    numbers = np.frombuffer(data, "<u2", positions * (2 + stored), _HEADER.size)
    tops, ranges = numbers[:positions], numbers[positions : 2 * positions].view("<f2")
    planes = numbers[2 * positions :].reshape(positions, stored)
    ids, levels = decode_symbols(data[symbols:], positions, k, vocab_size, spec.levels)
    log_probs = quantise.restored(tops, ranges, levels, spec.levels, vocab_size)
    log_z = quantise.float_log_z(planes, spec.temperatures, vocab_size)
    return _consistent(ids, log_probs, log_z, spec.temperatures)


def _checked(payload: Sparse, spec: SparseSpec, vocab_size: int) -> tuple[I64, F64, F64]:
    """The arrays of `payload`, or ValueError that names what is wrong with them."""
    ids = payload.token_ids.detach().cpu().numpy().astype(np.int64)
    log_probs = payload.log_probs.detach().double().cpu().numpy()
    log_z = payload.log_z.detach().double().cpu().numpy()
    if vocab_size > MAX_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab_size} exceeds {MAX_VOCABULARY}")
    if payload.temperatures != spec.temperatures:
        raise ValueError(
            f"payload has temperatures {payload.temperatures}, not {spec.temperatures}"
        )
    n = len(ids)
    if ids.shape != (n, spec.k) or log_probs.shape != ids.shape:
        raise ValueError(f"ids {ids.shape} and values {log_probs.shape} are not [N, {spec.k}]")
    if log_z.shape != (n, len(spec.temperatures)) or not np.isfinite(log_z).all():
        raise ValueError(f"log Z {log_z.shape} is not finite [{n}, {len(spec.temperatures)}]")
    if (np.diff(ids, axis=1) <= 0).any() or (ids < 0).any() or (ids >= vocab_size).any():
        raise ValueError(f"token ids must rise strictly within 0…{vocab_size - 1}")
    if np.isnan(log_probs).any() or (log_probs > 1e-3).any() or np.isinf(log_probs).all(1).any():
        raise ValueError("log-probabilities hold NaN, a positive value, or a row of only −inf")
    return ids, log_probs, log_z


def _consistent(ids: I64, log_probs: F32, log_z: F32, grid: tuple[float, ...]) -> Sparse:
    """The payload, with values and normalisers nudged so that no kept mass exceeds 1."""
    values = torch.from_numpy(np.ascontiguousarray(log_probs))
    normalisers = torch.from_numpy(log_z)
    values -= torch.logsumexp(values, dim=-1, keepdim=True).clamp_min(0.0)
    for column, temperature in enumerate(grid):
        if temperature != 1.0:
            kept = torch.logsumexp(values / temperature, dim=-1)
            normalisers[:, column] = torch.maximum(normalisers[:, column], kept)
    return Sparse(torch.from_numpy(np.ascontiguousarray(ids)), values, normalisers, grid)

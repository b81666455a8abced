"""The record of a Sampled payload: header (N, K, V), then ids and counts (`sparse_symbols.py`).

A padded entry is coded like any other, with the ids behind the vocabulary: one a column, so that
it costs next to nothing.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from kubedistill_trainer.teacher.payload import Sampled
from kubedistill_trainer.teacher.payload_spec import SampledSpec
from kubedistill_trainer.teacher.sparse_symbols import (
    MAX_VOCABULARY,
    decode_symbols,
    encode_symbols,
)

_HEADER = struct.Struct("<III")


def encode_sampled(payload: Sampled, spec: SampledSpec, vocab_size: int) -> bytes:
    """Bytes of one sample. ValueError when `payload` does not fit `spec` or `vocab_size`."""
    ids = payload.token_ids.detach().cpu().numpy().astype(np.int64)
    counts = payload.counts.detach().cpu().numpy().astype(np.int64)
    positions, k = ids.shape
    if vocab_size + k > MAX_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab_size} and {k} exceeds {MAX_VOCABULARY}")
    if counts.shape != ids.shape or (counts < 0).any() or (counts.sum(1) != spec.draws).any():
        raise ValueError(f"counts {counts.shape} do not sum to {spec.draws} draws a position")
    if (np.diff(ids, axis=1) <= 0).any() or (ids < 0).any() or (ids >= vocab_size + k).any():
        raise ValueError(f"token ids must rise strictly within 0…{vocab_size + k - 1}")
    if (counts[ids >= vocab_size] != 0).any():
        raise ValueError(f"a token beyond the vocabulary of {vocab_size} was drawn")
    symbols = encode_symbols(ids, counts, vocab_size + k, spec.draws + 1)
    return _HEADER.pack(positions, k, vocab_size) + symbols


def decode_sampled(data: bytes, spec: SampledSpec) -> Sampled:
    """Inverse of `encode_sampled`. ValueError when `data` is not such a record."""
    if len(data) < _HEADER.size:
        raise ValueError(f"sampled record has {len(data)} bytes, less than its header")
    positions, k, vocab_size = _HEADER.unpack_from(data)
    if k > spec.draws:
        raise ValueError(f"sampled record has K = {k} for {spec.draws} draws")
    ids, counts = decode_symbols(data[_HEADER.size :], positions, k, vocab_size + k, spec.draws + 1)
    if (counts.sum(1) != spec.draws).any():
        raise ValueError(f"counts of a sampled record do not sum to {spec.draws} draws")
    return Sampled(torch.from_numpy(ids), torch.from_numpy(counts.astype(np.int64)))

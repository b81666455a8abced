"""One sample's teacher outputs as the bytes of one record, and back.

A record is the payloads in the order of the stream's identity, each with its length in front.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kubedistill_trainer.teacher.hidden import decode_hidden, encode_hidden
from kubedistill_trainer.teacher.payload import Hidden, Sampled, Sparse, TeacherOutputs
from kubedistill_trainer.teacher.payload_spec import (
    HiddenSpec,
    PayloadSpec,
    SampledSpec,
    SparseSpec,
)
from kubedistill_trainer.teacher.sampled import decode_sampled, encode_sampled
from kubedistill_trainer.teacher.sparse import decode_sparse, encode_sparse

_LENGTH = struct.Struct("<Q")


def token_hash(tokens: Tensor | Sequence[int]) -> int:
    """64-bit hash of a sample's token ids [L]: the same on every machine and in every version."""
    ids = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    canonical = np.ascontiguousarray(ids.reshape(-1).astype("<i8"))
    return int.from_bytes(hashlib.blake2b(canonical.tobytes(), digest_size=8).digest(), "little")


def encode_outputs(outputs: TeacherOutputs, specs: Sequence[PayloadSpec], vocab_size: int) -> bytes:
    """The record of one sample. ValueError when `outputs` does not hold what `specs` ask for."""
    parts = []
    for spec in specs:
        part = _encoded(outputs, spec, vocab_size)
        parts += [_LENGTH.pack(len(part)), part]
    return b"".join(parts)


def decode_outputs(
    record: bytes, specs: Sequence[PayloadSpec], dtype: torch.dtype = torch.float32
) -> TeacherOutputs:
    """Inverse of `encode_outputs`; hidden states in `dtype`. ValueError for a malformed record."""
    sparse: Sparse | None = None
    hidden: Hidden | None = None
    sampled: Sampled | None = None
    offset = 0
    for spec in specs:
        if offset + _LENGTH.size > len(record):
            raise ValueError(f"record of {len(record)} bytes has no {spec.kind} payload")
        (length,) = _LENGTH.unpack_from(record, offset)
        offset += _LENGTH.size
        part = record[offset : offset + length]
        offset += length
        if isinstance(spec, SparseSpec):
            sparse = decode_sparse(part, spec)
        elif isinstance(spec, SampledSpec):
            sampled = decode_sampled(part, spec)
        else:
            hidden = decode_hidden(part, dtype)
    if offset != len(record):
        raise ValueError(f"record has {len(record)} bytes, its payloads take {offset}")
    return TeacherOutputs(sparse, hidden, sampled)


def _encoded(outputs: TeacherOutputs, spec: PayloadSpec, vocab_size: int) -> bytes:
    match spec:
        case SparseSpec() if outputs.sparse is not None:
            return encode_sparse(outputs.sparse, spec, vocab_size)
        case SampledSpec() if outputs.sampled is not None:
            return encode_sampled(outputs.sampled, spec, vocab_size)
        case HiddenSpec() if outputs.hidden is not None:
            return encode_hidden(outputs.hidden, spec)
    raise ValueError(f"the stream carries {spec.kind}, the teacher's outputs have none")

"""Measures what candidate payloads keep of the gradient, on a part of the data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from kubedistill_api.status import PayloadProbe
from torch import Tensor

from kubedistill_trainer.compress.choosing import evenly_spread
from kubedistill_trainer.data.packing import IGNORED, Packed
from kubedistill_trainer.losses.cached import (
    SampledTokens,
    SparseTokens,
    sampled_kl,
    sparse_divergence,
)
from kubedistill_trainer.losses.divergence import Scratch, dense_divergence
from kubedistill_trainer.losses.types import Divergence, TeacherSampled, TeacherSparse
from kubedistill_trainer.models.decoder import final_hidden, softcap_of, softcapped
from kubedistill_trainer.teacher.auto import Answer, Question, choose, label
from kubedistill_trainer.teacher.codec import decode_outputs, encode_outputs
from kubedistill_trainer.teacher.payload import Hidden, Sparse, TeacherOutputs, sparse_of_logits
from kubedistill_trainer.teacher.payload_spec import PayloadSpec, SparseSpec

_PROBE_TOKENS = 32_768
_LEAST_SEQUENCES, _MOST_SEQUENCES = 8, 256
_COMPARED_POSITIONS = 4_096
"""Positions, over all sequences, at which gradients are compared; sizes are of whole sequences."""


@torch.inference_mode()
def probe(model: Any, packed: Packed, question: Question, divergence: Divergence) -> Answer:
    """Measure all candidates on sequences spread over the data, and choose."""
    length = packed.sequence_length
    count = min(max(_PROBE_TOKENS // length, _LEAST_SEQUENCES), _MOST_SEQUENCES, len(packed))
    stride = max(1, count * length // _COMPARED_POSITIONS)
    specs, identity = question.candidates(), question.identity
    sums: SumsOf = defaultdict(Sums)
    for compared in sequences(model, packed, count, identity.visible_vocab_size, stride):
        for spec in specs:
            measure(
                sums, compared, spec, question.temperatures, divergence,
                identity.teacher_vocab_size,
            )  # fmt: skip
    rows = tuple(sums[label(s), t].row(label(s), t) for s in specs for t in question.temperatures)
    return Answer(rows=rows, chosen=choose(specs, rows, question.max_gradient_error))


def sequences(
    model: Any, packed: Packed, count: int, visible: int, stride: int
) -> Iterator[Compared]:
    """`count` sequences spread over the data; gradients are compared at every `stride`-th place that
    is learnt.

    The gradient is the one that a student near the teacher would get: the teacher itself without a
    tenth of its layers (at least one). The nearer the student, the smaller the exact gradient and
    the greater the relative error, so this is nearer to the end of training than to its start.
    """
    for sample in np.linspace(0, len(packed) - 1, count).round().astype(int):
        yield Compared(model, packed.take([sample]), visible, stride)


@dataclass
class Sums:
    """Over the compared positions: squares of the error, of both gradients, their product."""

    error: float = 0.0
    exact: float = 0.0
    found: float = 0.0
    product: float = 0.0
    mass: float = 0.0
    positions: int = 0
    size_bytes: int = 0
    tokens: int = 0

    def add(self, found: Tensor, exact: Tensor) -> None:
        """Compare two gradients [n, V]."""
        self.error += float((found - exact).double().square().sum())
        self.exact += float(exact.double().square().sum())
        self.found += float(found.double().square().sum())
        self.product += float((found.double() * exact.double()).sum())
        self.positions += len(exact)

    def row(self, payload: str, temperature: float) -> PayloadProbe:
        norms = math.sqrt(self.exact * self.found)
        cosine = self.product / norms if norms else 1.0
        error = math.sqrt(self.error / self.exact) if self.exact else float(self.error > 0)
        return PayloadProbe(
            payload=payload,
            temperature=temperature,
            bytes_per_token=round(self.size_bytes / max(1, self.tokens), 2),
            kept_mass=round(self.mass / max(1, self.positions), 6),
            gradient_error=round(error, 6),
            angle_degrees=round(math.degrees(math.acos(max(-1.0, min(1.0, cosine)))), 4),
        )


SumsOf = dict[tuple[str, float], Sums]
"""By payload and temperature."""


class Compared:
    """One sequence: the teacher's states and logits, and the logits of a student near it."""

    def __init__(self, model: Any, sequence: Any, visible: int, stride: int) -> None:
        self.head = model.get_output_embeddings()
        self.softcap = softcap_of(model)
        self.visible = visible
        device = self.head.weight.device
        tokens = torch.from_numpy(sequence.tokens).to(device)
        positions = torch.from_numpy(sequence.positions).to(device)
        decoder = model.get_decoder()
        self.hidden = final_hidden(decoder, tokens, positions)[0]
        self.logits = self.logits_of(self.hidden)
        learnt = torch.from_numpy(sequence.labels[0] != IGNORED).nonzero().flatten()
        # Where little is learnt, the last place of it at least: of no place any payload is exact.
        self.rows = learnt[max(0, min(stride // 2, len(learnt) - 1)) :: stride]
        with _thinned(decoder):
            near = final_hidden(decoder, tokens, positions)[0]
        self.student = self.logits_of(near[self.rows])
        self._exact: dict[float, Tensor] = {}

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits fp32 [n, visible]."""
        states = hidden.to(self.head.weight.dtype)
        return softcapped(self.head(states).float(), self.softcap)[:, : self.visible]

    def exact(self, temperature: float, divergence: Divergence) -> Tensor:
        """The gradient of the teacher's whole distribution."""
        if temperature not in self._exact:
            teacher = self.logits[self.rows]
            self._exact[temperature] = self.dense(teacher, temperature, divergence)
        return self._exact[temperature]

    def dense(self, teacher: Tensor, temperature: float, divergence: Divergence) -> Tensor:
        """∂D/∂u for teacher logits, which stay as they are."""
        scratch = _scratch(self.student)
        top = self.student.amax(-1, keepdim=True)
        _, unit = dense_divergence(
            self.student, top, teacher.clone(), temperature, divergence, scratch
        )
        return scratch.c_RV.mul_(unit)

    def sparse(self, kept: Sparse, temperature: float, divergence: Divergence) -> Tensor:
        """∂D/∂u for a Sparse payload of the whole sequence."""
        device, rows = self.student.device, self.rows
        teacher = TeacherSparse(
            kept.token_ids[rows].to(device),
            kept.log_probs[rows].to(device),
            kept.log_z_at(temperature)[rows].to(device),
        )
        return self.of(teacher, temperature, divergence)

    def of(
        self, teacher: TeacherSparse | TeacherSampled, temperature: float, divergence: Divergence
    ) -> Tensor:
        """∂D/∂u for what is known of the teacher at the compared positions."""
        z, out = self.student, torch.empty_like(self.student)
        u = z.gather(-1, teacher.ids_NK) * (1 / temperature)
        if isinstance(teacher, TeacherSampled):
            soft = sampled_kl(z, SampledTokens.of(teacher, u), temperature, out)
        else:
            tokens = SparseTokens.of(teacher, u, temperature, z.shape[-1])
            soft = sparse_divergence(z, tokens, temperature, divergence, out)
        gradient = out.mul_(soft.factor_R1.to(out.dtype))
        return gradient.scatter_add_(-1, soft.ids_RK, soft.add_RK.to(out.dtype))


def measure(
    sums: SumsOf,
    compared: Compared,
    spec: PayloadSpec,
    temperatures: Sequence[float],
    divergence: Divergence,
    vocab_size: int,
) -> None:
    """Encode, decode, and compare with the exact gradient at every temperature."""
    if isinstance(spec, SparseSpec):
        kept = sparse_of_logits(compared.logits, spec.k, spec.temperatures)
        outputs = TeacherOutputs(sparse=kept)
    else:
        outputs = TeacherOutputs(hidden=Hidden(compared.hidden.float()))
    record = encode_outputs(outputs, [spec], vocab_size)
    decoded = decode_outputs(record, [spec])
    restored = None
    if decoded.hidden is not None:
        states = decoded.hidden.states[compared.rows]
        restored = compared.logits_of(states.to(compared.hidden.device))
    for temperature in temperatures:
        exact = compared.exact(temperature, divergence)
        mass = float(len(exact))
        if restored is not None:
            found = compared.dense(restored, temperature, divergence)
        else:
            assert decoded.sparse is not None
            found = compared.sparse(decoded.sparse, temperature, divergence)
            mass = float(decoded.sparse.log_probs_at(temperature)[compared.rows].exp().sum())
        at = sums[label(spec), temperature]
        at.add(found, exact)
        at.mass += mass
        at.size_bytes += len(record)
        at.tokens += len(compared.hidden)


@contextmanager
def _thinned(decoder: Any) -> Iterator[None]:
    """The decoder without a tenth of its layers, at least one."""
    layers = decoder.layers
    wanted = len(layers) - max(1, len(layers) // 10)
    kept: Sequence[int] = evenly_spread(len(layers), wanted) if wanted else ()
    decoder.layers = torch.nn.ModuleList(layers[i] for i in kept)
    try:
        yield
    finally:
        decoder.layers = layers


def _scratch(like: Tensor) -> Scratch:
    return Scratch(*(torch.empty_like(like) for _ in range(3)))

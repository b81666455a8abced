"""`payload: Auto`: what is measured, what is chosen, and what is said when nothing fits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from kubedistill_api.status import PayloadProbe
from kubedistill_trainer.data.packing import IGNORED, pack
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.losses import FORWARD_KL, Divergence
from kubedistill_trainer.methods.probe import probe
from kubedistill_trainer.teacher.auto import (
    Answer,
    Question,
    choose,
    label,
    publish_answer,
    read_answer,
    table,
)
from kubedistill_trainer.teacher.errors import StreamCorrupt
from kubedistill_trainer.teacher.payload_spec import HiddenSpec, SampledSpec, SparseSpec
from kubedistill_trainer.teacher.request import resolved
from teacher_builders import MemoryStore, identity
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, VOCABULARY = 32, 400
SPECS = [SparseSpec(k=8), SparseSpec(k=64), HiddenSpec()]


def question(*temperatures: float, bound: float = 0.05) -> Question:
    return Question(
        identity=identity(
            payloads=(HiddenSpec(),), hidden_size=WIDTH, teacher_vocab_size=VOCABULARY,
            visible_vocab_size=VOCABULARY - 7,
        ),
        temperatures=temperatures, objective="ForwardKL", top_k=100, max_gradient_error=bound,
    )  # fmt: skip


def row(payload: Any, size: float, error: float, temperature: float = 1.0) -> PayloadProbe:
    return PayloadProbe(
        payload=label(payload), temperature=temperature, bytes_per_token=size, kept_mass=0.5,
        gradient_error=error, angle_degrees=1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(SPECS[0], 10, 0.04), row(SPECS[1], 90, 0.01), row(SPECS[2], 70, 0.0)], SPECS[0]),
        ([row(SPECS[0], 10, 0.06), row(SPECS[1], 90, 0.01), row(SPECS[2], 70, 0.0)], SPECS[2]),
        ([row(SPECS[0], 10, 0.06), row(SPECS[1], 60, 0.05), row(SPECS[2], 70, 0.0)], SPECS[1]),
        # One temperature beyond the bound is enough.
        ([row(SPECS[0], 10, 0.01), row(SPECS[0], 10, 0.9, 4.0), row(SPECS[2], 70, 0.02)], SPECS[2]),
        ([row(SPECS[0], 10, 0.06), row(SPECS[1], 90, 0.07), row(SPECS[2], 70, 0.08)], None),
        ([row(SPECS[0], 10, math.nan), row(SPECS[2], 70, 0.02)], SPECS[2]),
        ([row(SPECS[0], 10, 0.01), row(SPECS[0], 10, math.nan, 4.0)], None),
        ([], None),
    ],
)
def test_the_smallest_within_the_bound_is_chosen(rows: list[PayloadProbe], expected: Any) -> None:
    assert choose(SPECS, rows, 0.05) == expected


def test_candidates_cover_the_grid_and_fit_the_vocabulary() -> None:
    candidates = question(2.0, 4.0).candidates()
    assert [label(c) for c in candidates] == [
        "Sparse, K=32", "Sparse, K=64", "Sparse, K=100", "Sparse, K=256",
        "Hidden, int8", "Hidden, bfloat16",
    ]  # fmt: skip
    assert candidates[0].temperatures == (1.0, 2.0, 4.0)
    small = question(1.0).model_copy(update={"identity": identity(payloads=(HiddenSpec(),))})
    assert [label(c) for c in small.candidates()][:2] == ["Sparse, K=32", "Sparse, K=60"]
    assert not any(isinstance(c, SampledSpec) for c in candidates)


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    """Random, with logits as far apart as a trained model's."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.lm_head.weight.data.normal_(std=0.6)
    return model.eval()


@pytest.fixture(scope="module")
def packed() -> Any:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY - 7, 64 * 12 + 5)
    return pack([tokens], 64)


def _worst(answer: Answer, payload: Any, temperature: float) -> PayloadProbe:
    [found] = [
        r for r in answer.rows if (r.payload, r.temperature) == (label(payload), temperature)
    ]
    return found


@pytest.mark.parametrize("divergence", [FORWARD_KL, Divergence(0, 0, 1)])
def test_the_measurement(teacher: Any, packed: Any, divergence: Divergence) -> None:
    layers = teacher.model.layers
    ask = question(1.0, 10.0)
    answer = probe(teacher, packed, ask, divergence)
    assert teacher.model.layers is layers
    assert len(answer.rows) == 2 * len(ask.candidates())
    hidden, wide = HiddenSpec(), HiddenSpec(precision="bfloat16")
    for temperature in (1.0, 10.0):
        found = _worst(answer, hidden, temperature)
        assert 0 < found.gradient_error < 0.05
        assert found.kept_mass == 1
        # Sequences of 64: a scale of each channel beside int8 and the groups' scales.
        assert WIDTH < found.bytes_per_token < 1.1 * WIDTH + 2
        assert _worst(answer, wide, temperature).gradient_error < 0.05
    sparse = ask.candidates()[0]
    cold, hot = _worst(answer, sparse, 1.0), _worst(answer, sparse, 10.0)
    assert cold.kept_mass > 2 * hot.kept_mass
    assert hot.gradient_error > cold.gradient_error
    assert hot.gradient_error > 0.2
    assert isinstance(answer.chosen, HiddenSpec)


def test_all_of_the_vocabulary_kept_has_the_quantisations_error_only(
    teacher: Any, packed: Any
) -> None:
    ask = question(1.0, 4.0).model_copy(update={"top_k": VOCABULARY})
    answer = probe(teacher, packed, ask, FORWARD_KL)
    found = _worst(answer, SparseSpec(k=VOCABULARY - 7), 4.0)
    assert found.kept_mass == pytest.approx(1, abs=1e-3)
    assert found.gradient_error < 0.1


def test_a_single_learnt_token_of_a_sequence_is_compared(teacher: Any) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY - 7, 1024 * 8)
    whole = pack([tokens], 1024)
    labels = np.full_like(whole.labels, IGNORED)
    labels[:, 500] = whole.labels[:, 500]
    answer = probe(teacher, replace(whole, labels=labels), question(1.0), FORWARD_KL)
    found = _worst(answer, SparseSpec(k=32), 1.0)
    assert 0 < found.kept_mass < 1 and found.gradient_error > 0


def test_the_first_answer_holds() -> None:
    store, ask = MemoryStore(), question(4.0)
    assert read_answer(store, ask) is None
    assert resolved(ask, store) is None
    rows = (row(SPECS[2], 70, 0.01, 4.0),)
    first = publish_answer(store, ask, Answer(rows=rows, chosen=HiddenSpec()))
    second = publish_answer(store, ask, Answer(rows=(), chosen=SPECS[0]))
    assert second == first
    found = resolved(ask, store)
    assert found is not None
    assert found.identity == ask.with_payload(HiddenSpec())
    assert found.rows
    # Another bound is another question.
    assert read_answer(store, question(4.0, bound=0.1)) is None
    store.put(ask.key, b"{}")
    with pytest.raises(StreamCorrupt, match="not a probe"):
        read_answer(store, ask)


def test_where_nothing_fits_the_table_is_said() -> None:
    store, ask = MemoryStore(), question(4.0, bound=0.001)
    rows = (row(SPECS[0], 10, 0.84, 4.0), row(SPECS[2], 70, 0.03, 4.0))
    publish_answer(store, ask, Answer(rows=rows, chosen=None))
    with pytest.raises(InputsRefused) as refused:
        resolved(ask, store)
    message = str(refused.value)
    assert "spec.teacher.maxGradientError: found 0.001, and no payload within it" in message
    assert table(rows) in message
    assert "0.840" in message
    assert "allow a greater error" in message

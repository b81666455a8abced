"""Hidden-state matching, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from kubedistill_api.objective import Objective
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.losses import FeatureMatcher, FeaturePair, uniform_map
from kubedistill_trainer.methods.objective import divergence_of, feature_pairs
from kubedistill_trainer.methods.signal import OnlineTeacher
from kubedistill_trainer.methods.student import StudentWithLoss
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from unit.test_losses_kit import error

PAIRS = [FeaturePair(1, 2, "MSE", 0.5), FeaturePair(2, 4, "Cosine", 2.0)]


def _inputs(dtype: torch.dtype, tokens: int = 23) -> tuple[FeatureMatcher, dict, dict, Tensor]:
    torch.manual_seed(0)
    matcher = FeatureMatcher(PAIRS, 5, 8)
    for weight in matcher.parameters():
        torch.nn.init.normal_(weight)
    student = {n: torch.randn(tokens, 5).to(dtype).requires_grad_() for n in (1, 2)}
    teacher = {n: torch.randn(tokens, 8).to(dtype) for n in (2, 4)}
    labels = torch.arange(tokens)
    labels[::3] = -100
    return matcher.to(dtype), student, teacher, labels


def _by_definition(matcher: FeatureMatcher, student: dict, teacher: dict, labels: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for token in (labels != -100).nonzero().flatten():
        first = student[1][token] @ matcher.projections[0].weight.T - teacher[2][token]
        total = total + 0.5 * (first @ first) / 8
        second, wanted = student[2][token] @ matcher.projections[1].weight.T, teacher[4][token]
        total = total + 2.0 * (1 - second @ wanted / (second.norm() * wanted.norm()))
    return total / 7.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_its_definition(dtype: torch.dtype, tolerance: float) -> None:
    narrow, wide = _inputs(dtype), _inputs(torch.float64)
    found = narrow[0](narrow[1], narrow[2], narrow[3], torch.tensor(7.0))
    expected = _by_definition(*wide)
    found.backward()
    expected.backward()
    assert error(found.detach(), expected.detach()) < tolerance
    for ours, oracle in zip(narrow[0].parameters(), wide[0].parameters(), strict=True):
        assert error(ours.grad, oracle.grad) < tolerance
    for layer, states in narrow[1].items():
        assert error(states.grad, wide[1][layer].grad) < tolerance
        assert not states.grad[::3].any()


def test_any_split_gives_the_same() -> None:
    matcher, student, teacher, labels = _inputs(torch.float32)
    whole = matcher(student, teacher, labels, 7.0)
    parts = [
        matcher(
            {n: s[rows] for n, s in student.items()},
            {n: t[rows] for n, t in teacher.items()},
            labels[rows],
            7.0,
        )
        for rows in torch.arange(23).split([1, 2, 15, 0, 5])
    ]
    assert error(torch.stack(parts).sum().detach(), whole.detach().double()) < 1e-6


def test_without_any_label_it_is_zero_and_every_gradient_exists() -> None:
    matcher, student, teacher, labels = _inputs(torch.float32)
    loss = matcher(student, teacher, torch.full_like(labels, -100), 1.0)
    loss.backward()
    assert float(loss.detach()) == 0
    for weight in matcher.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()


def test_with_equal_widths_it_begins_with_the_states_themselves() -> None:
    matcher = FeatureMatcher([FeaturePair(1, 1, "MSE", 1.0)], 6, 6)
    states = torch.randn(4, 6)
    assert float(matcher({1: states}, {1: states}, torch.zeros(4), 1.0).detach()) == 0


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (1, 1, [(1, 1)]),
        (2, 4, [(1, 2), (2, 4)]),
        (3, 8, [(1, 3), (2, 5), (3, 8)]),
        (4, 3, [(1, 1), (2, 2), (3, 2), (4, 3)]),
        (4, 1, [(1, 1), (2, 1), (3, 1), (4, 1)]),
    ],
)
def test_uniform_map(student: int, teacher: int, expected: list[tuple[int, int]]) -> None:
    assert uniform_map(student, teacher) == expected


def _objective(*features: dict[str, object], **rest: object) -> Objective:
    return Objective.model_validate({"features": list(features), **rest})


def test_an_entry_without_layers_shares_its_weight() -> None:
    pairs = feature_pairs(_objective({"weight": 3.0}, {"studentLayer": 2, "teacherLayer": 7}), 3, 9)
    assert [(p.student_layer, p.teacher_layer, p.weight) for p in pairs] == [
        (1, 3, 1.0), (2, 6, 1.0), (3, 9, 1.0), (2, 7, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((4, 9), r"features\[1\]\.studentLayer: found 4; the student has 3 layers: write 1…3"),
        ((3, 10), r"features\[1\]\.teacherLayer: found 10; the teacher has 9 layers"),
    ],
)
def test_a_layer_outside_a_model_is_refused(layers: tuple[int, int], message: str) -> None:
    given = {"studentLayer": layers[0], "teacherLayer": layers[1]}
    with pytest.raises(RunFailure, match=message):
        feature_pairs(_objective({}, given), 3, 9)


def test_divergence_of_an_objective() -> None:
    assert divergence_of(_objective()).is_forward_kl
    reverse = divergence_of(_objective(loss="ReverseKL"))
    assert (reverse.forward, reverse.reverse, reverse.jsd) == (0, 1, 0)
    jsd = divergence_of(_objective(loss="JSD", beta=0.3))
    assert (jsd.forward, jsd.reverse, jsd.jsd, jsd.beta) == (0, 0, 1, 0.3)
    mix = divergence_of(_objective(loss="Mix", mix={"forwardKL": 1, "jsd": 2}))
    assert (mix.forward, mix.reverse, mix.jsd) == (1, 0, 2)


def _llama(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(width)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
        )
    )  # fmt: skip


def test_a_student_gets_the_feature_term_through_its_own_layers() -> None:
    objective = _objective({"weight": 2.0}, temperature=2.0)
    matcher = FeatureMatcher(feature_pairs(objective, 2, 4), 8, 12)
    student = StudentWithLoss(_llama(8, 2), objective, 61, matcher)
    teacher = OnlineTeacher(_llama(12, 4), matcher.teacher_layers)
    tokens = torch.randint(0, 61, (2, 9))
    positions = torch.arange(9).expand(2, 9)
    batch = teacher.batch(None, tokens, positions)
    parts = student(tokens, positions, tokens, batch, 18.0)
    plain = StudentWithLoss(student.model, objective, 61)(tokens, positions, tokens, batch, 18.0)
    assert float(parts.features) > 0
    assert float(parts.total) == pytest.approx(float(plain.total + parts.features))
    inner = student.model(tokens, output_hidden_states=True).hidden_states
    layers = {n: inner[n].flatten(0, 1) for n in (1, 2)}
    expected = matcher(layers, batch.layers, tokens.flatten(), 18.0)
    assert float(parts.features) == pytest.approx(float(expected), rel=1e-5)
    parts.total.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name

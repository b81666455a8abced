"""A whole student in fp32 against dense float64 autograd: the loss, and every parameter's gradient.

Here the pieces meet: the decoder, a tied or an untied head, capped logits, rows that pad the
vocabulary, tokens without labels, the projections of feature matching.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kubedistill_api.objective import Objective
from kubedistill_trainer.losses import FeatureMatcher, TeacherHidden
from kubedistill_trainer.losses.features import FeaturePair
from kubedistill_trainer.losses.reference import dense_loss
from kubedistill_trainer.methods.objective import divergence_of
from kubedistill_trainer.methods.signal import OnlineTeacher
from kubedistill_trainer.methods.student import StudentWithLoss
from kubedistill_trainer.models.export import gather_weights
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from unit.test_losses_kit import TEMPERATURES, error

IDS = 61
CAP = 1.5
PAIRS = [FeaturePair(1, 2, "MSE", 0.4), FeaturePair(2, 3, "Cosine", 0.8)]
LOSSES: dict[str, dict[str, Any]] = {
    "ForwardKL": {},
    "ReverseKL": {"loss": "ReverseKL"},
    "JSD": {"loss": "JSD", "beta": 0.3},
    "Mix": {"loss": "Mix", "mix": {"forwardKL": 0.5, "reverseKL": 0.25, "jsd": 2.0}, "beta": 0.7},
}
KINDS = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "padded": {"tied": False, "rows": 67},
    "padded and tied": {"tied": True, "rows": 67},
    "capped": {"tied": True, "capped": True},
    "capped and padded": {"tied": True, "rows": 64, "capped": True},
}


def model(width: int, layers: int, *, tied: bool, rows: int = IDS, capped: bool = False) -> Any:
    torch.manual_seed(width)
    sizes: dict[str, Any] = {
        "vocab_size": rows, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": layers, "num_attention_heads": 3, "num_key_value_heads": 1,
        "head_dim": 6, "tie_word_embeddings": tied, "initializer_range": 0.3, "pad_token_id": None,
    }  # fmt: skip
    if capped:
        return Gemma2ForCausalLM(Gemma2Config(final_logit_softcapping=CAP, **sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def batch(masked: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    tokens, labels = torch.randint(0, IDS, (2, 3, 7))
    labels[torch.rand(labels.shape) < 0.4] = -100
    if masked:
        labels[:] = -100
    return tokens, torch.arange(7).expand(3, 7), labels


def compared(
    student: Any, teacher: Any, objective: Objective, *, masked: bool = False, ids: int = IDS
) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """(loss, gradients) of the product in fp32, and of the reference in float64."""
    torch.manual_seed(2)
    widths = student.config.hidden_size, teacher.config.hidden_size
    matcher = FeatureMatcher(PAIRS, *widths) if objective.features else None
    for weight in matcher.parameters() if matcher else ():
        torch.nn.init.normal_(weight)
    module = StudentWithLoss(student, objective, ids, matcher)
    wide = copy.deepcopy(module).double()
    tokens, positions, labels = batch(masked)
    normalizer = float(max(1, (labels != -100).sum()))
    online = OnlineTeacher(copy.deepcopy(teacher), matcher.teacher_layers if matcher else ())
    signal = online.batch(None, tokens, positions)  # type: ignore[arg-type]
    parts = module(tokens, positions, labels, signal, normalizer)
    parts.total.backward()
    expected = _reference(wide, teacher.double(), objective, normalizer, ids, masked)
    expected.backward()
    found_of, wanted_of = ({n: p.grad for n, p in m.named_parameters()} for m in (module, wide))
    assert all(gradient is not None for gradient in found_of.values()), "every parameter has one"
    return parts.total.detach(), found_of, expected.detach(), wanted_of


def _reference(
    module: StudentWithLoss, teacher: Any, objective: Objective, normalizer: float, ids: int,
    masked: bool,
) -> Tensor:  # fmt: skip
    tokens, positions, labels = batch(masked)

    def states(one: Any) -> Any:
        return one.get_decoder()(
            input_ids=tokens, position_ids=positions, use_cache=False, output_hidden_states=True
        )

    inner = states(module.model)
    with torch.no_grad():
        known = states(teacher)
    head = teacher.get_output_embeddings().weight.detach()
    cap = getattr(teacher.config, "final_logit_softcapping", None)
    total = dense_loss(
        inner.last_hidden_state.flatten(0, 1), module.head, labels.flatten(),
        TeacherHidden(known.last_hidden_state.flatten(0, 1), head, cap),
        temperature=objective.temperature, soft_weight=objective.soft_weight,
        normalizer=normalizer, divergence=divergence_of(objective), vocab_size=ids,
        softcap=getattr(module.model.config, "final_logit_softcapping", None),
    )  # fmt: skip
    if module.features is None:
        return total
    rows = labels.flatten() != -100
    for pair, projection in zip(PAIRS, module.features.projections, strict=True):
        ours = inner.hidden_states[pair.student_layer].flatten(0, 1)[rows] @ projection.weight.T
        wanted = known.hidden_states[pair.teacher_layer].flatten(0, 1)[rows]
        if pair.loss == "MSE":
            distance = (ours - wanted).square().mean(-1)
        else:
            distance = 1 - (ours * wanted).sum(-1) / (ours.norm(dim=-1) * wanted.norm(dim=-1))
        total = total + pair.weight * distance.sum() / normalizer
    return total


def check(student: Any, teacher: Any, objective: Objective, ids: int = IDS) -> dict[str, Tensor]:
    """The gradients, after comparing."""
    loss, found, expected, wanted = compared(student, teacher, objective, ids=ids)
    assert error(loss, expected) < 1e-5
    whole = [torch.cat([g.double().flatten() for g in grads.values()]) for grads in (found, wanted)]
    assert error(*whole) < 1e-5
    for name, gradient in found.items():
        assert error(gradient, wanted[name]) < 1e-5, name
    return found


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_of_a_whole_model(kind: str, temperature: float) -> None:
    shape = KINDS[kind]
    student, teacher = model(15, 2, **shape), model(21, 3, **shape | {"tied": False})  # type: ignore[arg-type]
    tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert tied == shape["tied"]
    found = check(student, teacher, Objective(temperature=temperature, soft_weight=0.6))
    head = found.get("model.lm_head.weight")
    if head is not None:
        assert not head[IDS:].any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [0.5, 20.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_every_loss_with_matched_layers(loss: str, temperature: float, weight: float) -> None:
    objective = Objective.model_validate(
        {"temperature": temperature, "softWeight": weight, "features": [{}], **LOSSES[loss]}
    )
    found = check(model(15, 2, tied=True), model(21, 3, tied=False), objective)
    assert sum("projections" in name for name in found) == len(PAIRS)


def test_padded_as_real_models_are() -> None:
    """152,064 rows for 151,936 ids in the teacher, another padding in the student."""
    ids = 151_936
    student, teacher = model(6, 1, tied=True, rows=152_064), model(12, 1, tied=False, rows=152_576)
    with torch.no_grad():
        student.get_output_embeddings().weight[ids:] = 50
        teacher.get_output_embeddings().weight[ids:] = 50
    found = check(student, teacher, Objective(temperature=2.0, soft_weight=0.6), ids)
    tied = found["model.model.embed_tokens.weight"]
    assert not tied[ids:].any()


@pytest.mark.parametrize("tied", [True, False])
def test_a_batch_without_a_label_moves_nothing(tied: bool) -> None:
    objective = Objective.model_validate({"temperature": 4, "features": [{}]})
    loss, found, expected, _ = compared(
        model(15, 2, tied=tied), model(21, 3, tied=False), objective, masked=True
    )
    assert (float(loss), float(expected)) == (0, 0)
    assert not any(gradient.any() for gradient in found.values())


def test_what_is_exported_has_no_projection() -> None:
    objective = Objective.model_validate({"features": [{}]})
    module = StudentWithLoss(
        model(15, 2, tied=False), objective, IDS, FeatureMatcher(PAIRS, 15, 21)
    )
    engine: Any = type(
        "Engine", (), {"module": module, "global_rank": 0, "zero_optimization_stage": lambda _: 1}
    )()
    assert any("projections" in name for name in module.state_dict())
    weights = gather_weights(engine)
    assert weights is not None
    assert weights.keys() == module.model.state_dict().keys()

"""The module that DeepSpeed wraps: the student, with its loss inside the forward pass."""

from __future__ import annotations

from typing import Any

from kubedistill_api.objective import Objective
from torch import Tensor, nn

from kubedistill_trainer.losses import (
    FORWARD_KL,
    FeatureMatcher,
    LossParts,
    TeacherHidden,
    distillation_loss,
)
from kubedistill_trainer.methods.objective import divergence_of
from kubedistill_trainer.methods.signal import TeacherBatch, hidden_states
from kubedistill_trainer.models.decoder import softcap_of, softcapped


class StudentWithLoss(nn.Module):
    """Forward gives the loss, so that DeepSpeed sees the gradient of every parameter.

    The LM head is used outside its own module's forward: ZeRO-3 is told so, and gathers it once.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective | None,
        vocab_size: int,
        features: FeatureMatcher | None = None,
    ) -> None:
        """`objective`: None where there is no teacher."""
        super().__init__()
        self.model = model
        self.features = features
        self._divergence = divergence_of(objective) if objective else FORWARD_KL
        self._temperature = objective.temperature if objective else 1.0
        self._soft_weight = objective.soft_weight if objective else 0.0
        self._vocab_size = vocab_size

    def register_head(self) -> None:
        """Tell ZeRO-3 that this module's forward uses the head's weight. After initialisation."""
        import deepspeed

        deepspeed.zero.register_external_parameter(self, self.head)

    @property
    def head(self) -> nn.Parameter:
        weight = self.model.get_output_embeddings().weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        labels: Tensor | None = None,
        teacher: TeacherBatch = None,
        normalizer: float = 1.0,
    ) -> LossParts | Tensor:
        """tokens, positions, labels [B, L]; `normalizer` valid tokens of the optimizer step.

        Without labels: the logits [B·L, vocabulary], for the evaluation. It goes through here
        because under ZeRO-3 weights are there only within the wrapped module's forward.
        """
        wanted = self.features.student_layers if self.features and labels is not None else ()
        hidden, layers = hidden_states(self.model.get_decoder(), tokens, positions, wanted)
        if labels is None:
            return self._logits(hidden)
        parts = distillation_loss(
            hidden,
            self.head,
            labels.flatten(),
            teacher,
            temperature=self._temperature,
            soft_weight=self._soft_weight if teacher is not None else 0.0,
            normalizer=normalizer,
            divergence=self._divergence,
            vocab_size=self._vocab_size,
            softcap=softcap_of(self.model),
        )
        if self.features is None or not isinstance(teacher, TeacherHidden):
            return parts
        extra = self.features(layers, teacher.layers, labels.flatten(), normalizer)
        return parts._replace(total=parts.total + extra, features=extra.detach())

    def _logits(self, hidden_NH: Tensor) -> Tensor:
        logits = hidden_NH @ self.head[: self._vocab_size].T
        return softcapped(logits, softcap_of(self.model))

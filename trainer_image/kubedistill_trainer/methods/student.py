"""The module that DeepSpeed wraps: the student, with its loss inside the forward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kubedistill_trainer.losses import LossParts, distillation_loss
from kubedistill_trainer.methods.signal import TeacherBatch, final_hidden, softcap_of, softcapped


class StudentWithLoss(nn.Module):
    """Forward gives the loss, so that DeepSpeed sees the gradient of every parameter.

    The LM head is used outside its own module's forward: ZeRO-3 is told so, and gathers it once.
    """

    def __init__(self, model: Any, temperature: float, soft_weight: float, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self._temperature = temperature
        self._soft_weight = soft_weight
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
        hidden = final_hidden(self.model.get_decoder(), tokens, positions)
        if labels is None:
            return self._logits(hidden.flatten(0, 1))
        return distillation_loss(
            hidden.flatten(0, 1),
            self.head,
            labels.flatten(),
            teacher,
            temperature=self._temperature,
            soft_weight=self._soft_weight if teacher is not None else 0.0,
            normalizer=normalizer,
            vocab_size=self._vocab_size,
            softcap=softcap_of(self.model),
        )

    def _logits(self, hidden_NH: Tensor) -> Tensor:
        logits = hidden_NH @ self.head[: self._vocab_size].T
        return softcapped(logits, softcap_of(self.model))

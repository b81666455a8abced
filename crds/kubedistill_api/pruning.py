"""What is left of a model that is made smaller, and what that is judged by."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from pydantic.alias_generators import to_snake

from kubedistill_api.base import ApiModel, cel, rules

TARGETS = ("layers", "heads", "kvHeads", "ffn", "embedding", "parameters")
_KEPT = "below 1 the share that is kept, from 2 how many are"


def _target_rules() -> list[dict[str, Any]]:
    given = ", ".join(f"has(self.{name})" for name in TARGETS)
    both = [
        cel(
            f"!has(self.{name}) || self.{name} < 1.0 || "
            f"(self.{name} >= 2.0 && self.{name} == double(int(self.{name})))",
            f"`{name}` is a share below 1, or a whole number from 2: leave it out to keep all",
            f".{name}",
        )
        for name in TARGETS
        if name not in ("layers", "kvHeads")
    ]
    whole = [
        cel(
            f"!has(self.{name}) || self.{name} < 1.0 || self.{name} == double(int(self.{name}))",
            f"`{name}` is a share below 1, or a whole number",
            f".{name}",
        )
        for name in ("layers", "kvHeads")
    ]
    return [
        cel(f"[{given}].exists(x, x)", f"name what is kept: one or more of {', '.join(TARGETS)}"),
        *both,
        *whole,
    ]


class Smaller(ApiModel):
    """A model with less of everything: whole layers, heads, inner and outer width."""

    model_config = rules(_target_rules())
    layers: float | None = Field(
        None,
        gt=0,
        le=1024,
        description="Layers kept: below 1 their share, from 1 how many. Which, says "
        "`layerImportance`.",
    )
    heads: float | None = Field(
        None,
        gt=0,
        le=1024,
        description=f"Query heads kept in every layer: {_KEPT}. With their key-value groups, or "
        "where that does not come out even, equally many of each group.",
    )
    kv_heads: float | None = Field(
        None,
        gt=0,
        le=1024,
        description="Key-value heads kept in every layer: below 1 the share, from 1 how many. "
        "Without it, it follows from `heads`.",
    )
    ffn: float | None = Field(
        None, gt=0, le=1_000_000, description=f"Inner channels of the FFN: {_KEPT}."
    )
    embedding: float | None = Field(
        None, gt=0, le=1_000_000, description=f"Channels of the hidden state: {_KEPT}."
    )
    parameters: float | None = Field(
        None,
        gt=0,
        le=1.0e13,
        description="Parameters of the result at most: below 1 a share, from 2 how many. Layers, "
        "heads and FFN that have no target of their own are chosen for it.",
    )
    importance: Literal["Activation", "Magnitude", "Random"] = Field(
        "Activation",
        description="What heads and channels are judged by. Activation: what they add to the hidden "
        "state on calibration data. Magnitude: their weights alone. Random: nothing.",
    )
    layer_importance: Literal["BlockInfluence", "Even"] = Field(
        "BlockInfluence",
        description="What layers are judged by. BlockInfluence: how much each turns the hidden state "
        "on calibration data. Even: they are kept evenly spread, the first and the last included.",
    )
    calibration_sequences: int = Field(
        64, ge=1, le=65_536, description="Sequences of the training data that importance is of."
    )

    @property
    def summary(self) -> str:
        """The targets in a few characters, such as `15 layers, ffn 0.75`."""
        given = {name: getattr(self, to_snake(name)) for name in TARGETS}
        return ", ".join(
            f"{value:g} {name}" if value >= 1 else f"{name} {value:g}"
            for name, value in given.items()
            if value is not None
        )


class Sparse(ApiModel):
    """The same shape with zeros among its weights."""

    model_config = rules(
        [
            cel(
                "has(self.sparsity) == (!has(self.pattern) || self.pattern == 'Any')",
                "give `sparsity` with `pattern: Any`; 2:4 is half of all weights",
                ".sparsity",
            )
        ]
    )
    sparsity: float | None = Field(
        None, gt=0, lt=1, description="Share of the weights of each matrix that becomes zero."
    )
    pattern: Literal["Any", "2:4"] = Field(
        "Any",
        description="Any: wherever they matter least. 2:4: two of every four beside each other, "
        "which GPUs multiply faster.",
    )
    criterion: Literal["SparseGPT", "Wanda", "Gradient", "Magnitude"] = Field(
        "SparseGPT",
        description="Which weights matter least. SparseGPT: by the error of each layer's output, "
        "which the weights that stay make up for. Wanda: weight times the norm of its input. "
        "Gradient: weight times its gradient (first-order Taylor). Magnitude: the weight alone.",
    )
    calibration_sequences: int = Field(
        128,
        ge=1,
        le=65_536,
        description="Sequences of the training data that errors are measured on.",
    )

    @property
    def share(self) -> float:
        """Of zeros."""
        return 0.5 if self.sparsity is None else self.sparsity

    @property
    def summary(self) -> str:
        """In a few characters, such as `2:4 by Wanda`."""
        what = self.pattern if self.pattern != "Any" else f"{self.share:.0%} zeros"
        return f"{what} by {self.criterion}"


class Prune(ApiModel):
    """Make the student smaller, or sparse, without training it: `structured` or `unstructured`."""

    model_config = rules(
        [
            cel(
                "has(self.structured) != has(self.unstructured)",
                "give either `structured: {…}` (less of everything) or `unstructured: {…}` (zeros "
                "among the weights)",
            )
        ]
    )
    structured: Smaller | None = Field(
        None, description="What is kept: the result is an ordinary model with less of everything."
    )
    unstructured: Sparse | None = Field(
        None,
        description="Zeros among the weights, which stay zero in whatever trains the model later.",
    )

    @property
    def summary(self) -> str:
        """What is done, in a few characters."""
        if self.structured is not None:
            return f"kept: {self.structured.summary}"
        return self.unstructured.summary if self.unstructured is not None else ""

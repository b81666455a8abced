"""Weights, and where asked activations, in fewer bits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kubedistill_api.base import ApiModel, cel, rules


class Quantize(ApiModel):
    """Store the student in fewer bits, in compressed-tensors' format."""

    model_config = rules(
        [
            cel(
                # Of a default `{}` the rule is asked before the defaults within it.
                "!has(self.algorithm) || self.algorithm != 'AWQ' || !has(self.scheme) || "
                "self.scheme == 'W4A16'",
                "AWQ is for weights of 4 bits: write `scheme: W4A16`, or `algorithm: GPTQ` or `RTN`",
                ".algorithm",
            ),
            cel(
                "!has(self.groupSize) || !has(self.scheme) || self.scheme == 'W4A16'",
                "only weights of 4 bits have groups, others a scale a channel: leave `groupSize` out",
                ".groupSize",
            ),
        ]
    )
    scheme: Literal["W4A16", "W8A16", "W8A8"] = Field(
        "W4A16",
        description="W4A16: weights of 4 bits, a scale a group. W8A16: of 8 bits, a scale a channel. "
        "W8A8: and activations of 8 bits, a scale a token.",
    )
    algorithm: Literal["GPTQ", "AWQ", "RTN"] = Field(
        "GPTQ",
        description="GPTQ: the rounding error is made up for by the weights that come after it. AWQ: "
        "channels that matter are scaled up before they are rounded. RTN: rounded to the nearest, "
        "without calibration.",
    )
    group_size: int | None = Field(
        None,
        ge=8,
        le=1024,
        description="Weights that share a scale, of W4A16. By default 128, or the largest power of "
        "two below it that divides the model's widths.",
    )
    kv_cache: bool = Field(
        False, description="Add scales for a cache of keys and values in FP8, for servers."
    )
    calibration_sequences: int = Field(
        128,
        ge=1,
        le=65_536,
        description="Sequences of the training data that errors are measured on.",
    )

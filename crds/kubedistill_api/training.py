"""The optimizer, its schedule, and what DeepSpeed partitions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kubedistill_api.base import ApiModel, number_or


class DeepSpeed(ApiModel):
    """What DeepSpeed partitions."""

    zero_stage: int = Field(
        1, ge=1, le=3, description="1: optimizer states; 2: and gradients; 3: and weights."
    )
    offload: Literal["None", "CPU"] = Field(
        "None", description="CPU: the optimizer's states and its step are in host memory."
    )


class EarlyStopping(ApiModel):
    """Ends training when the held-out loss stops falling; the best commit is what is exported."""

    interval_steps: int = Field(
        ge=1, le=1_000_000, description="Optimizer steps between two looks at the held-out loss."
    )
    patience: int = Field(
        3, ge=1, le=1000, description="Looks in a row without improvement before training ends."
    )
    min_delta: float = Field(
        0.0, ge=0, le=100, description="Fall of the loss, in nats a token, that is an improvement."
    )


class Training(ApiModel):
    """The optimizer and its schedule: AdamW, linear warm-up, decay."""

    epochs: int = Field(3, ge=1, le=1000, description="Passes over the data.")
    max_steps: int | None = Field(
        None, ge=1, le=10_000_000, description="Optimizer steps after which training ends anyway."
    )
    global_batch_size: int = Field(
        64, ge=1, le=65536, description="Sequences of an optimizer step, over all ranks."
    )
    micro_batch_size: int = Field(
        4, ge=1, le=4096, description="Sequences that a rank takes at once."
    )
    learning_rate: float = Field(
        2.0e-5,
        gt=0,
        le=1,
        strict=True,
        description="Peak learning rate, a number without quotes: 2.0e-5.",
        json_schema_extra=number_or("a number without quotes, such as 2.0e-5"),
    )
    warmup_ratio: float = Field(0.05, ge=0, le=1, description="Share of the steps that warm up.")
    schedule: Literal["Cosine", "Linear", "Constant"] = Field(
        "Cosine", description="Course of the learning rate after the warm-up."
    )
    final_rate_ratio: float = Field(
        0.1, ge=0, le=1, description="Learning rate at the end, as a share of the peak."
    )
    weight_decay: float = Field(0.01, ge=0, le=1, description="AdamW's decoupled weight decay.")
    gradient_clipping: float = Field(
        1.0, ge=0, le=1000, description="Greatest norm of the gradient; 0 for no clipping."
    )
    precision: Literal["BF16", "FP32"] = Field("BF16", description="Type of weights in training.")
    seed: int = Field(0, ge=0, le=2_147_483_647, description="Seed of weights, order and dropout.")
    activation_checkpointing: bool = Field(
        False, description="Keep no activations within a layer: less memory, a third more time."
    )
    early_stopping: EarlyStopping | None = Field(
        None, description="End when the held-out loss stops falling."
    )
    on_out_of_memory: Literal["Retry", "Shrink"] = Field(
        "Retry",
        description="When a rank runs out of memory. Retry: the same again. Shrink: once with half "
        "the microBatchSize and twice the accumulation steps, which is the same mathematics.",
    )
    on_non_finite_loss: Literal["Stop", "Skip"] = Field(
        "Stop",
        description="When the loss is no number. Stop: the job fails. Skip: back to the newest "
        "commit, and on without that step's batch.",
    )
    deep_speed: DeepSpeed = Field(DeepSpeed(), description="DeepSpeed's settings.")

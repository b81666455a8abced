"""DeepSpeed: its configuration from the spec, and the process groups of a gang."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from kubedistill_api.training import Training

from kubedistill_trainer.imports import uncompiled
from kubedistill_trainer.methods.student import StudentWithLoss

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
UPLOAD_TIMEOUT = timedelta(hours=6)
"""Between the first rank whose upload is done and the last; a rank that dies is noticed at once."""


@dataclass(frozen=True)
class Groups:
    """Gloo groups of all ranks, beside the default group's NCCL."""

    control: Any
    """Small agreements between steps."""
    uploads: Any
    """Agreements of the threads that upload, which run beside steps."""


def deepspeed_config(training: Training, ranks: int, micro_batch: int) -> dict[str, Any]:
    """The JSON that DeepSpeed takes. The learning rate is set by the loop, step by step."""
    zero: dict[str, Any] = {
        "stage": training.deep_speed.zero_stage,
        "stage3_param_persistence_threshold": 1000,
    }
    if training.deep_speed.offload == "CPU":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": training.global_batch_size // ranks // micro_batch,
        "gradient_clipping": training.gradient_clipping,
        "bf16": {"enabled": training.precision == "BF16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.learning_rate,
                "betas": [0.9, 0.95],
                "eps": 1e-8,
                "weight_decay": training.weight_decay,
                "torch_adam": True,
            },
        },
        "zero_optimization": zero,
        # torch's AdamW steps on the CPU as well; DeepSpeed's own is compiled when it is first used.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
        # Each save would compare the ranks' tags first, which are the same constant.
        "checkpoint": {"tag_validation": "Ignore"},
    }


def join_gang(host: str, port: int, rank: int, world_size: int, local_rank: int) -> Groups:
    """Static rendezvous at rank 0; the control-plane groups (gloo) are returned.

    Small agreements between ranks never go over NCCL, where they would hang with a dead peer.
    """
    os.environ |= {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": "1",
    }
    import deepspeed

    # On the CPU DeepSpeed would compile a shared-memory all-reduce with g++ in every pod: the image
    # has no compiler, gloo does the same, and half a minute of a start is saved.
    # (`deepspeed.comm.torch` as an attribute is torch itself.)
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend, timeout=COLLECTIVE_TIMEOUT, verbose=False, auto_mpi_discovery=False
    )
    return Groups(
        control=dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT),
        uploads=dist.new_group(backend="gloo", timeout=UPLOAD_TIMEOUT),
    )


def wrap(module: StudentWithLoss, training: Training, ranks: int, micro_batch: int) -> Any:
    """The DeepSpeed engine around `module`."""
    import deepspeed

    with uncompiled():
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            config=deepspeed_config(training, ranks, micro_batch),
        )
    if training.deep_speed.zero_stage == 3:
        module.register_head()
    return engine

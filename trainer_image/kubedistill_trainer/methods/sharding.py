"""A teacher that no single device holds: its layers are split over the processes of one pod.

transformers splits the layers by its tensor-parallel plan. Embeddings and LM head stay whole, so
that all but the decoder's layers is as in one process. The first process runs the teacher's
program; whenever that calls the decoder, the others are sent the arguments and call it, too.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kubedistill_trainer.failures import refuse
from kubedistill_trainer.models.load import config_of_folder, empty_model, load_model

FIELD = "spec.teacher.workers.gpusPerReplica"
_IDLE = timedelta(days=365)
"""The others wait for the next call for as long as it takes: a peer's death ends the wait."""


def join(meeting: Path, local_rank: int, size: int) -> Any:
    """Meet the other processes of this pod at a file; the group of the calls is returned."""
    os.environ |= {"RANK": str(local_rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(size)}
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, init_method=f"file://{meeting}", rank=local_rank, world_size=size
    )
    return dist.new_group(backend="gloo", timeout=_IDLE)


def check_plan(config: Any, size: int) -> dict[str, str]:
    """How the layers of an architecture are split into `size`. InputsRefused when they cannot be."""
    plan = {k: v for k, v in empty_model(config, FIELD).tp_plan.items() if ".layers." in k}
    one = "give 1 GPU that holds the teacher, or use delivery: Online, where DeepSpeed ZeRO 3 helps"
    if not plan:
        raise refuse(FIELD, f"{size}", f"transformers cannot split a {config.model_type}: {one}")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        number = getattr(config, name, None)
        if number and number % size:
            raise refuse(
                FIELD, f"{size}, which does not divide the teacher's {name} {number}",
                "give a number that does",
            )  # fmt: skip
    return plan


def load_shard(folder: Path, dtype: torch.dtype, group: Any) -> Any:
    """This process's part of the model in `folder`, once the first process has it there."""
    dist.barrier(group)
    size = dist.get_world_size(group)
    plan = check_plan(config_of_folder(folder, "spec.teacher"), size)
    return load_model(folder, "spec.teacher", dtype, plan)


def lead(model: Any, group: Any) -> None:
    """From now on the others repeat every call of the decoder, with the layers that it has then."""
    decoder = model.get_decoder()
    number = {id(layer): index for index, layer in enumerate(decoder.layers)}

    def send(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            raise TypeError("a split decoder takes keyword arguments")
        layers = [number[id(layer)] for layer in module.layers]
        sent = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        dist.broadcast_object_list([(layers, sent)], src=0, group=group)

    decoder.register_forward_pre_hook(send, with_kwargs=True)


def send(message: Any, group: Any) -> None:
    """Hand the others what `receive` gives them."""
    dist.broadcast_object_list([message], src=0, group=group)


def receive(group: Any) -> Any:
    """What the first process hands out next; None once it dismisses this one."""
    message: list[Any] = [None]
    dist.broadcast_object_list(message, src=0, group=group)
    return message[0]


def dismiss(group: Any) -> None:
    """The others may end."""
    send(None, group)


@torch.inference_mode()
def follow(model: Any, group: Any) -> None:
    """Repeat the first process's calls until it dismisses this one."""
    decoder = model.get_decoder()
    layers, device = list(decoder.layers), next(model.parameters()).device
    while (message := receive(group)) is not None:
        numbers, sent = message
        decoder.layers = torch.nn.ModuleList(layers[n] for n in numbers)
        decoder(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in sent.items()})

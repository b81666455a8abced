"""A teacher that no single device holds: its layers are split over the processes of one pod.

transformers splits the layers by its tensor-parallel plan. Embeddings and LM head stay whole, so
that all but the decoder's layers is as in one process. The first process runs the teacher's
program; whenever that calls the decoder, the others are sent the arguments and call it, too.
"""

from __future__ import annotations

import functools
import os
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kubedistill_api.exit_codes import ExitCode

from kubedistill_trainer.failures import RunFailure, refuse
from kubedistill_trainer.models.load import config_of_folder, empty_model, load_model

FIELD = "spec.teacher.workers.gpusPerReplica"
_LOST = re.compile(r"Connection (closed|reset) by peer")
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
        # Some architectures have one a layer.
        if any(each and each % size for each in (number if isinstance(number, list) else [number])):
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


@dataclass(frozen=True)
class _Call:
    """A call of the decoder: which of its layers it has, and the arguments.

    `continues`: with the cache of the call before, which is not among them.
    """

    layers: list[int]
    arguments: dict[str, Any]
    continues: bool


def lead(model: Any, group: Any) -> None:
    """From now on the others repeat every call of the decoder, with the layers that it has then.

    Keys and values stay where they are made: each process goes on with a cache of its own part, and
    an empty one is sent as what it is. A call that fails here is RunFailure, whatever it was.
    """
    decoder = model.get_decoder()
    number = {id(layer): index for index, layer in enumerate(decoder.layers)}
    forward, before = decoder.forward, _LastCache()

    @functools.wraps(forward)
    def together(**arguments: Any) -> Any:
        continues = before.continues(arguments.get("past_key_values"))
        sent = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        if continues:
            del sent["past_key_values"]
        call = _Call([number[id(layer)] for layer in decoder.layers], sent, continues)
        with in_step():
            send(call, group)
            output = forward(**arguments)
        before.note(output)
        return output

    decoder.forward = together


class _LastCache:
    """Which cache the call before had."""

    def __init__(self) -> None:
        self._cache: weakref.ref[Any] | None = None

    def continues(self, cache: Any) -> bool:
        """Whether a call with `cache` goes on with it. ValueError for what others do not have."""
        if cache is None:
            self._cache = None
            return False
        # Not by its length: that is 0 for good where the first layer keeps no keys.
        if self._cache is not None and self._cache() is cache:
            return True
        if cache.get_seq_length() > 0:
            raise ValueError("a split decoder goes on with the cache of the call before only")
        self._cache = weakref.ref(cache)
        return False

    def note(self, output: Any) -> None:
        """Remember the cache that a call made which was given none."""
        made = _made(output)
        if self._cache is None and made is not None:
            self._cache = weakref.ref(made)


def _made(output: Any) -> Any:
    """The cache that a decoder gives back, if any."""
    return getattr(output, "past_key_values", None)


@contextmanager
def in_step() -> Iterator[None]:
    """Around what all processes do at once: where it fails in one, the others are in the middle of
    it, and nobody can try again with less."""
    try:
        yield
    except RunFailure:
        raise
    except torch.OutOfMemoryError as error:
        raise RunFailure(
            ExitCode.OUT_OF_MEMORY,
            f"memory ran out while the split teacher answered: raise {FIELD}, or lower "
            "generation.maxTokens",
        ) from error
    except Exception as error:
        if _LOST.search(str(error)):
            raise RunFailure(
                ExitCode.PEER_LOST, "a process of the split teacher ended; its own exit says why"
            ) from error
        raise RunFailure(
            ExitCode.UNKNOWN, f"the split teacher failed: {type(error).__name__}: {error}"
        ) from error


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
def follow(model: Any, group: Any, answer: Callable[..., object] | None = None) -> None:
    """Do what the first process does until it dismisses this one: its calls of the decoder, and
    whatever else it sends, by `answer(model, **message)`."""
    decoder = model.get_decoder()
    layers, device = list(decoder.layers), next(model.parameters()).device
    cache = None
    while (message := receive(group)) is not None:
        if not isinstance(message, _Call):
            assert answer is not None
            answer(model, **message)
            continue
        decoder.layers = torch.nn.ModuleList(layers[n] for n in message.layers)
        arguments = {
            k: v.to(device) if isinstance(v, torch.Tensor) else v
            for k, v in message.arguments.items()
        }
        if message.continues:
            arguments["past_key_values"] = cache
        cache = arguments.get("past_key_values")
        output = decoder(**arguments)
        if cache is None:
            cache = _made(output)

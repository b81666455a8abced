"""A finished student as a Hugging Face folder in S3."""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from kubedistill_api.status import ModelStatus, ResolvedModel

from kubedistill_trainer.models.folder import upload
from kubedistill_trainer.models.load import parameter_count
from kubedistill_trainer.store import Store

_PREFIX = "model."
"""Where the student lies within the module that DeepSpeed wraps."""


def gather_weights(engine: Any) -> dict[str, torch.Tensor] | None:
    """The student's whole state on rank 0 (None elsewhere). A collective under ZeRO-3."""
    if engine.zero_optimization_stage() == 3:
        state = _gather_partitioned(engine)
    else:
        state = engine.module.state_dict() if engine.global_rank == 0 else None
    if state is None:
        return None
    return {
        name[len(_PREFIX) :]: tensor.detach().cpu()
        for name, tensor in state.items()
        if name.startswith(_PREFIX)
    }


def _gather_partitioned(engine: Any) -> dict[str, torch.Tensor] | None:
    """Parameter by parameter: rank 0 never holds more than the result and one parameter."""
    import deepspeed

    state: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if engine.global_rank == 0:
                state[name] = parameter.detach().cpu().clone()
    state.update(dict(engine.module.named_buffers()))
    return state if engine.global_rank == 0 else None


def write_folder(
    model: Any, weights: dict[str, torch.Tensor], tokenizer_files: dict[str, bytes], folder: Path
) -> int:
    """Write weights, config and tokenizer to an empty `folder`; the number of parameters.

    `model` gives architecture and config only.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = copy.deepcopy(model.config)
    config.dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):
        shell = type(model)(config)
    shell.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    for name, body in tokenizer_files.items():
        (folder / name).write_bytes(body)
    return parameter_count(shell)


def publish_folder(
    folder: Path, documents: dict[str, str], parameters: int, store: Store
) -> ModelStatus:
    """Add documents to a model's folder, and put it into the store.

    The folder is addressed by its digest; putting it twice changes nothing.
    """
    for name, text in documents.items():
        (folder / name).write_text(text)
    digest, uploaded = upload(folder, store)
    return ModelStatus(uri=uploaded.uri, digest=digest, parameters=parameters)


def publish_report(
    documents: dict[str, str], model: ResolvedModel, parameters: int, store: Store
) -> ModelStatus:
    """Put what is said of a model, which stays where it is, below `store`.

    The place is addressed by the report's digest; putting it twice changes nothing.
    """
    digest = hashlib.sha256("".join(documents[name] for name in sorted(documents)).encode())
    place = store.child(f"report/{digest.hexdigest()}")
    for name, text in documents.items():
        place.put(name, text.encode())
    return ModelStatus(uri=model.uri, digest=model.digest, parameters=parameters, report=place.uri)


def weights_on_disk(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))

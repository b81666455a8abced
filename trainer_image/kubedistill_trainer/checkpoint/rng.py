"""States of the random generators of a process, as JSON."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """Python's, NumPy's, torch's, and where there is one CUDA's generator."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, _text(np.asarray(keys).tobytes()), int(position), int(has_gauss), cached],
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state().numpy().tobytes())
    return state


def restore(state: dict[str, Any]) -> None:
    """Set all generators to a captured state."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    words = np.frombuffer(_bytes(keys), dtype=np.uint32)
    np.random.set_state((name, words, position, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


def _tensor(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(_bytes(text), dtype=np.uint8).copy())

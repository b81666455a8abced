"""The states of all random generators of a rank, as JSON."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue


def capture() -> dict[str, JsonValue]:
    """States of Python's, NumPy's global and torch's generators (the current CUDA device's too)."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    algorithm, keys, position, has_gauss, cached = numpy_state
    state: dict[str, JsonValue] = {
        "python": [version, list(internal), gauss],
        "numpy": [
            str(algorithm),
            _text(np.asarray(keys, dtype="<u4").tobytes()),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state().numpy().tobytes())
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` returned. A CUDA state is passed over where there is no device."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    words = np.frombuffer(base64.b64decode(keys), dtype="<u4").astype(np.uint32)
    np.random.set_state((algorithm, words, position, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def seed(step: int, rank: int) -> None:
    """Begin anew: other draws for each step and rank, the same ones each time."""
    words = np.random.SeedSequence([step, rank]).generate_state(3, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))  # the CUDA generators too


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

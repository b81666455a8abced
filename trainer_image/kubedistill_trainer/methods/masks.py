"""Zeros that stay zero while a sparse model is trained.

A weight that is zero and gets no gradient stays zero under AdamW: its moments are zero, and so are
its step and its decay. So the gradients of the matrices that were made sparse are multiplied by where
they are not zero, before anything (clipping, averaging over ranks) sees them. The weights themselves
are the mask: nothing is kept beside them, and a resumed run has it from its commit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

_log = logging.getLogger(__name__)


def hold_zeros(model: Any, names: Iterable[str]) -> None:
    """Keep the zeros of these parameters of `model` through whatever trains it.

    KeyError for a name that the model does not have.
    """
    parameters = dict(model.named_parameters())
    held = [parameters[name] for name in names]
    for parameter in held:
        parameter.register_hook(_masked(parameter))
    _log.info("zeros of the weights are kept", extra={"matrices": len(held)})


def _masked(parameter: nn.Parameter) -> Any:
    def hook(gradient: Tensor) -> Tensor:
        return gradient * (parameter.detach() != 0)

    return hook

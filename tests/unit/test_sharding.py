"""What a split teacher does where its processes would get out of step."""

from __future__ import annotations

import pytest
import torch
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.sharding import _LastCache, in_step
from transformers import DynamicCache


def filled(cache: DynamicCache) -> DynamicCache:
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    return cache


def test_a_cache_goes_on_where_it_was_left() -> None:
    last, cache = _LastCache(), DynamicCache()
    assert not last.continues(cache)
    assert last.continues(filled(cache))
    assert last.continues(cache)
    assert not last.continues(None)


def test_a_cache_that_the_others_do_not_have_is_an_error() -> None:
    last, cache = _LastCache(), DynamicCache()
    last.continues(cache)
    with pytest.raises(ValueError, match="the cache of the call before only"):
        last.continues(filled(DynamicCache()))
    last.continues(None)
    with pytest.raises(ValueError, match="the cache of the call before only"):
        last.continues(filled(cache))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (torch.OutOfMemoryError("CUDA"), ExitCode.OUT_OF_MEMORY, "raise spec.teacher.workers.gpus"),
        (RuntimeError("NCCL"), ExitCode.UNKNOWN, "the split teacher failed: RuntimeError: NCCL"),
        (RunFailure(ExitCode.INTERRUPTED, "asked to stop"), ExitCode.INTERRUPTED, "asked to stop"),
    ],
)
def test_whatever_fails_in_step_ends_the_process(
    error: Exception, code: ExitCode, words: str
) -> None:
    with pytest.raises(RunFailure, match=words) as failure, in_step():
        raise error
    assert failure.value.code == code

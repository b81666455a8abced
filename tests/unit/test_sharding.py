"""What a split teacher does where its processes would get out of step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods import sharding
from kubedistill_trainer.methods.sharding import _LastCache, in_step
from transformers import AutoConfig, DynamicCache, LlamaConfig, LlamaForCausalLM


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def filled(cache: DynamicCache) -> DynamicCache:
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    return cache


def test_a_cache_goes_on_where_it_was_left() -> None:
    last, cache = _LastCache(), DynamicCache()
    assert not last.continues(cache)
    assert last.continues(filled(cache))
    assert last.continues(cache)
    assert not last.continues(None)


def test_a_cache_without_keys_in_its_first_layer_goes_on_all_the_same() -> None:
    """Of layers that keep something else, such as MiniMax's linear attention, it tells no length."""
    last, cache = _LastCache(), DynamicCache()
    assert not last.continues(cache)
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 1)
    assert cache.get_seq_length() == 0
    assert last.continues(cache)


def test_a_cache_that_the_decoder_makes_goes_on_where_it_was_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(sharding, "send", lambda message, group: sent.append(message))
    monkeypatch.setattr(sharding, "receive", lambda group: pending.pop(0) if pending else None)
    model, ids = tiny(), torch.zeros(1, 3, dtype=torch.long)
    other = tiny()
    sharding.lead(model, None)
    made = model(input_ids=ids).past_key_values
    model(input_ids=ids[:, :1], past_key_values=made)
    assert [call.continues for call in sent] == [False, True]
    assert "past_key_values" not in sent[1].arguments
    lengths: list[int] = []
    forward = other.model.forward

    def noted(**arguments: Any) -> Any:
        output = forward(**arguments)
        lengths.append(output.past_key_values.get_seq_length())
        return output

    monkeypatch.setattr(other.model, "forward", noted)
    pending = list(sent)
    sharding.follow(other, None)
    assert lengths == [3, 4]


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
        (
            RuntimeError("gloo: Connection closed by peer"), ExitCode.PEER_LOST,
            "a process of the split teacher ended",
        ),
        (
            RuntimeError("gloo: Read error: Connection reset by peer"), ExitCode.PEER_LOST,
            "a process of the split teacher ended",
        ),
        (RuntimeError("NCCL"), ExitCode.UNKNOWN, "the split teacher failed: RuntimeError: NCCL"),
        (RunFailure(ExitCode.INTERRUPTED, "asked to stop"), ExitCode.INTERRUPTED, "asked to stop"),
    ],
)  # fmt: skip
def test_whatever_fails_in_step_ends_the_process(
    error: Exception, code: ExitCode, words: str
) -> None:
    with pytest.raises(RunFailure, match=words) as failure, in_step():
        raise error
    assert failure.value.code == code


def test_a_process_that_is_gone_between_two_calls_is_no_fault_of_what_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error of any other kind would be written down as a figure that cannot be had."""

    def gone(message: object, group: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(sharding, "send", gone)
    model = tiny()
    sharding.lead(model, None)
    with pytest.raises(RunFailure, match="a process of the split teacher ended") as failure:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long))
    assert failure.value.code == ExitCode.PEER_LOST


def test_a_width_of_each_layer_is_divided_like_one_of_all() -> None:
    config = AutoConfig.for_model(
        "gemma3n_text", num_hidden_layers=2, intermediate_size=[8, 12], num_attention_heads=4,
        num_key_value_heads=4, vocab_size=8, hidden_size=8, vocab_size_per_layer_input=8,
        hidden_size_per_layer_input=4, laurel_rank=2, num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0, 0.0], head_dim=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    assert sharding.check_plan(config, 2)
    assert sharding.check_plan(config, 4)
    config.intermediate_size = [8, 10]
    with pytest.raises(RunFailure, match=r"intermediate_size \[8, 10\]"):
        sharding.check_plan(config, 4)

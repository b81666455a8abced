"""Text from a model: padding changes nothing, an end ends it, a seed repeats it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from kubedistill_trainer.models.generation import generate
from transformers import AutoConfig, AutoModelForCausalLM

PROMPTS = [[5], [7, 8, 9, 10, 11], [3, 4]]
END = 1


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_prompt_is_answered_alike_alone_and_among_longer_ones(model: Any) -> None:
    together = generate(model, PROMPTS, max_tokens=9, end_ids=[END])
    alone = [generate(model, [p], max_tokens=9, end_ids=[END])[0] for p in PROMPTS]
    assert together == alone
    assert all(0 < len(answer) <= 9 for answer in together)


def test_the_likeliest_tokens_are_those_of_plain_forward_passes(model: Any) -> None:
    [answer] = generate(model, [PROMPTS[1]], max_tokens=5, end_ids=[END])
    ids = list(PROMPTS[1])
    for token in answer:
        with torch.no_grad():
            assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


def test_an_answer_ends_before_its_end_token(model: Any) -> None:
    [free] = generate(model, [PROMPTS[0]], max_tokens=9, end_ids=[END])
    end = free[4]
    [cut] = generate(model, [PROMPTS[0]], max_tokens=9, end_ids=[END, end])
    assert cut == free[: free.index(end)]


def test_a_seed_repeats_a_draw_and_leaves_the_callers_generator_alone(model: Any) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    draws = [
        generate(model, PROMPTS, max_tokens=9, end_ids=[END], temperature=1.0, seed=s)
        for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_small_nucleus_is_the_likeliest_token(model: Any) -> None:
    drawn = generate(
        model, PROMPTS, max_tokens=5, end_ids=[END], temperature=1.0, top_p=1e-6, seed=3
    )
    assert drawn == generate(model, PROMPTS, max_tokens=5, end_ids=[END])


def test_with_a_seed_each_a_draw_does_not_depend_on_its_batch(model: Any) -> None:
    drawn = partial(generate, model, max_tokens=9, end_ids=[END], temperature=1.0)
    together = drawn(PROMPTS, seeds=[7, 8, 9])
    assert together == [drawn([p], seeds=[s])[0] for p, s in zip(PROMPTS, (7, 8, 9), strict=True)]
    assert drawn(PROMPTS[::-1], seeds=[9, 8, 7]) == together[::-1]
    assert drawn(PROMPTS, seeds=[1, 2, 3]) != together
    likeliest = generate(model, PROMPTS, max_tokens=9, end_ids=[END])
    assert drawn(PROMPTS, seeds=[7, 8, 9], top_p=1e-6) == likeliest
    assert generate(model, PROMPTS, max_tokens=9, end_ids=[END], seeds=[7, 8, 9]) == likeliest


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_seeds_draw_from_the_models_distribution(model: Any, temperature: float) -> None:
    count = 4096
    answers = generate(
        model, [PROMPTS[1]] * count, max_tokens=1, end_ids=[END], temperature=temperature,
        seeds=range(count),
    )  # fmt: skip
    found = (
        torch.bincount(torch.tensor([a[0] if a else END for a in answers]), minlength=64) / count
    )
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[1]])).logits[0, -1].double()
    wanted = (logits / temperature).softmax(-1)
    # Six standard deviations of each share.
    assert ((found - wanted).abs() <= 6 * (wanted * (1 - wanted) / count).sqrt() + 1e-9).all()

"""Scores of a server are the model's own, at the right places; what else it says is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import data_kit
import numpy as np
import pytest
import torch
from endpoint_kit import Fault, Mind, Server
from kubedistill_api.teacher import Endpoint
from kubedistill_trainer.data.packing import IGNORED, Packed, pack
from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.models.decoder import final_hidden
from kubedistill_trainer.teacher.endpoint_client import Client, Patience
from kubedistill_trainer.teacher.endpoint_probe import find_way
from kubedistill_trainer.teacher.endpoint_reply import Again
from kubedistill_trainer.teacher.endpoint_scores import (
    NoScores,
    ScoredData,
    Scorer,
    Scores,
    longest_piece,
    pieces,
    rows_of,
    scores_of,
)
from kubedistill_trainer.teacher.payload import sparse_of_logits
from tokenizers import Tokenizer

QUICK = Patience(first_wait=0.01, longest_wait=0.05, jitter=0.01)
K = 12


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    endpoint = Endpoint(url=server.url, model="tiny", concurrency=3, max_retries=4)
    found = Client(endpoint, QUICK)
    yield found
    found.close()


def packed(vocab_size: int, length: int = 16) -> Packed:
    """Several documents a sequence, one of a single token, and one that crosses its end."""
    numbers = np.random.default_rng(0)
    return pack([numbers.integers(3, vocab_size, n) for n in (5, 1, 7, 9, 2, 16, 8, 30)], length)


def ways(server: Server, way: str) -> None:
    server.knows_prompt_logprobs = way == "prompt_logprobs"


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
@pytest.mark.parametrize("fault", [None, Fault(429), Fault("half"), Fault("not-json")])
def test_scores_are_those_of_the_model_itself(
    server: Server, client: Client, mind: Mind, way: str, fault: Fault | None
) -> None:
    ways(server, way)
    vocab_size = mind.tokenizer.vocab_size
    found = find_way(client, K, mind.tokenizer, 16)
    assert found == way
    server.seen.clear()
    server.faults = [None, fault, None, fault] if fault else []
    data = packed(vocab_size)
    scored = ScoredData(Scorer(client, K, vocab_size, found), data, K, vocab_size, ahead=3)
    for sample in range(len(data)):
        scored.expect(range(sample, len(data)))
        got, row = scored.scores(sample), data.take([sample])
        hidden = final_hidden(
            mind.model.get_decoder(), torch.tensor(row.tokens), torch.tensor(row.positions)
        )
        logits = mind.model.get_output_embeddings()(hidden)[0].detach()
        wanted = sparse_of_logits(logits, K, (1.0,))
        learnt = row.labels[0] != IGNORED
        assert (got.ids[learnt] == wanted.token_ids.numpy()[learnt]).all()
        assert np.allclose(got.log_probs[learnt], wanted.log_probs.numpy()[learnt], atol=1e-4)
        # What nobody learns from is a distribution too, which the stream's format asks for.
        assert (np.diff(got.ids, axis=1) > 0).all()
        assert (np.exp(got.log_probs.astype(float)).sum(1) < 1.001).all()
    asked = sum(len(pieces(data.take([s]))) for s in range(len(data)))
    assert len(server.paid) == asked
    assert len(server.seen) == asked + (2 if fault else 0)
    assert server.open_most <= 3


def test_a_text_is_asked_up_to_its_last_label_and_padding_is_not() -> None:
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0, 1]])
    labels = np.array([[IGNORED, 5, 6, IGNORED, 7, IGNORED, IGNORED, *[IGNORED] * 3]])
    one = Packed(np.zeros_like(positions), labels, positions, np.zeros_like(positions, np.uint8))
    assert pieces(one) == [(0, 4), (4, 6)]
    assert longest_piece(one) == 4


def test_what_is_ahead_is_bounded_and_what_is_not_needed_is_left(
    server: Server, client: Client, mind: Mind
) -> None:
    data = pack([np.full(8, 5)] * 10, 8)
    scored = ScoredData(
        Scorer(client, 3, mind.tokenizer.vocab_size, "prompt_logprobs"),
        data, 3, mind.tokenizer.vocab_size, ahead=2,
    )  # fmt: skip
    for sample in (0, 1, 5, 6):
        scored.expect(range(sample, 10))
        scored.scores(sample)
    assert 4 <= len(server.seen) <= 8


def content(rows: Any, way: str = "prompt_logprobs") -> dict[str, Any]:
    choice = {way: rows} if way == "prompt_logprobs" else {"logprobs": {"top_logprobs": rows}}
    return {"choices": [choice]}


def entry(value: float) -> dict[str, float]:
    return {"logprob": value, "rank": 1}


def test_rows_of_both_ways() -> None:
    rows = [None, {"7": entry(-1.0), "3": entry(-2.0)}]
    assert rows_of(content(rows), 2, "prompt_logprobs") == [{7: -1.0, 3: -2.0}]
    echoed = [None, {"token_id:7": -1.0}, {"token_id:9": -3.0}]
    assert rows_of(content(echoed, "echo"), 2, "echo") == [{7: -1.0}]


@pytest.mark.parametrize(
    ("found", "way", "error"),
    [
        ({}, "prompt_logprobs", Again), ({"choices": []}, "echo", Again), ([], "echo", Again),
        (content(None), "prompt_logprobs", NoScores),
        ({"choices": [{"logprobs": None}]}, "echo", NoScores),
        (content([None]), "prompt_logprobs", NoScores),
        (content([None, None]), "prompt_logprobs", Again),
        (content([None, {"7": -1.0}]), "prompt_logprobs", Again),
        (content([None, {"x": entry(-1.0)}]), "prompt_logprobs", Again),
        (content([None, {" the": -1.0}], "echo"), "echo", NoScores),
        ({"choices": [{"logprobs": [1]}]}, "echo", Again),
        ({"choices": [{"logprobs": "x"}]}, "echo", Again),
        (content({"7": entry(-1.0)}), "prompt_logprobs", Again),
        (content([None, {"-7": entry(-1.0)}]), "prompt_logprobs", Again),
        (content([None, {"token_id:-7": -1.0}], "echo"), "echo", Again),
        (content([None, {str(2**40): entry(-1.0)}]), "prompt_logprobs", Again),
        (content([None, {"9" * 5000: entry(-1.0)}]), "prompt_logprobs", Again),
        (content([None, {"7": entry(-(10**400))}]), "prompt_logprobs", Again),
    ],
)  # fmt: skip
def test_rows_of_other_shapes(found: Any, way: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        rows_of(found, 2, way)


def test_the_likeliest_are_kept_by_id_and_minus_infinity_is_one() -> None:
    rows = [{4: -0.5, 9: -3.0, 2: -1.5}, {4: 1e-7, 2: -9999.0, 9: -30.0}]
    assert_same(scores_of(rows, 2, 10), [[2, 4], [4, 9]], [[-1.5, -0.5], [0.0, -30.0]])
    whole = scores_of(rows[1:], 3, 10)
    assert whole.log_probs[0][0] == -math.inf


def assert_same(found: Scores, ids: list[list[int]], log_probs: list[list[float]]) -> None:
    assert found.ids.tolist() == ids
    assert np.allclose(found.log_probs, log_probs)


def test_too_few_are_asked_for_again() -> None:
    with pytest.raises(Again, match="2 of 3"):
        scores_of([{1: -1.0, 2: -1.0}], 3, 10)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({10: -0.1, 2: -4.0}, "spec.data.tokenizer"),
        ({1: 5.5, 2: -4.0}, "spec.teacher.endpoint"),
        ({1: -0.1, 2: -0.1}, "spec.teacher.endpoint"),
        ({1: -30.0, 2: -31.0}, "spec.teacher.endpoint"),
    ],
)
def test_what_is_no_distribution_over_these_ids_is_refused(
    row: dict[int, float], field: str
) -> None:
    with pytest.raises(InputsRefused, match=field):
        scores_of([row], 2, 10)


def test_a_server_that_gives_fewer_is_named_with_its_limit(
    server: Server, client: Client, mind: Mind
) -> None:
    server.max_logprobs = 5
    with pytest.raises(InputsRefused) as met:
        find_way(client, K, mind.tokenizer, 16)
    assert "spec.teacher.topK: found 12" in met.value.message
    assert "gives 5 at most" in met.value.message and "write 5" in met.value.message


def test_a_small_context_is_named(server: Server, client: Client, mind: Mind) -> None:
    with pytest.raises(InputsRefused, match=r"spec\.data\.sequenceLength") as met:
        find_way(client, K, mind.tokenizer, 512)
    assert "512" in met.value.message
    find_way(client, K, mind.tokenizer, 511)


def test_a_server_that_scores_no_prompts_is_refused(
    server: Server, client: Client, mind: Mind
) -> None:
    server.knows_prompt_logprobs = server.knows_token_ids = False
    with pytest.raises(InputsRefused, match="scores no prompts") as met:
        find_way(client, K, mind.tokenizer, 16)
    assert "names tokens by texts" in met.value.message
    assert "signal: Responses" in met.value.message


def other_tokenizer(mind: Mind) -> TextTokenizer:
    """The same size, with ids of letters exchanged."""
    text = mind.tokenizer.tokenizer.to_str()
    a, b = (mind.tokenizer.tokenizer.token_to_id(letter) for letter in "eo")
    swapped = text.replace(f'"e":{a}', '"e":-').replace(f'"o":{b}', f'"o":{a}')
    swapped = swapped.replace('"e":-', f'"e":{b}')
    found = Tokenizer.from_str(swapped)
    assert found.token_to_id("e") == b
    return TextTokenizer(found, 0, "other", {})


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
@pytest.mark.parametrize("tokenizes", [True, False])
def test_another_tokenizer_is_refused_in_every_way(
    server: Server, client: Client, mind: Mind, way: str, tokenizes: bool
) -> None:
    ways(server, way)
    server.tokenizes = tokenizes
    assert find_way(client, K, mind.tokenizer, 16) == way
    with pytest.raises(InputsRefused, match=r"spec\.data\.tokenizer"):
        find_way(client, K, other_tokenizer(mind), 16)


def test_a_larger_vocabulary_is_refused(server: Server, client: Client, mind: Mind) -> None:
    fewer = data_kit.tokenizer()
    object.__setattr__(fewer, "tokenizer", _cut(fewer.tokenizer))
    with pytest.raises(InputsRefused, match="names token"):
        find_way(client, 250, fewer, 16)


def _cut(tokenizer: Tokenizer) -> Tokenizer:
    """Without the merges, whose ids are the last."""
    import json

    content = json.loads(tokenizer.to_str())
    merged = len(content["model"]["merges"])
    content["model"]["merges"] = []
    most = len(content["model"]["vocab"]) - merged
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {t: n for t, n in vocabulary.items() if n < most}
    return Tokenizer.from_str(json.dumps(content))

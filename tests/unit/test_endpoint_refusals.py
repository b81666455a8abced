"""When single refusals are the server's refusal of everything: a pure decision."""

from __future__ import annotations

import pytest
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.teacher.endpoint_refusals import MOST_ALIKE, Given, Refusals, likeness
from kubedistill_trainer.teacher.text import TextAnswer, TextRequest

LONG = "400: maximum context length is 512 tokens, and you asked for {n}"
FILTER = "400: the content filter"
WRONG = "400: bad request {n}"


def given(prompt: int, refusal: str = "", sample: int = 0) -> Given:
    words = refusal.format(n=900 + prompt)
    return TextRequest(prompt, sample, (), 0), TextAnswer("", refusal=words)


def told(refusals: Refusals, *said: Given) -> list[tuple[int, int]]:
    """(prompt, sample) of what was given out."""
    ready = [one for pair in said for one in refusals.take(pair[0].prompt, *pair)]
    return [(request.prompt, request.sample) for request, _ in ready]


@pytest.mark.parametrize(
    ("answered", "words", "field"),
    [
        (False, WRONG, "endpoint.url"), (True, WRONG, "endpoint.url"),
        (False, LONG, "generation.maxTokens"), (False, FILTER, "endpoint.url"),
    ],
)  # fmt: skip
def test_so_many_alike_in_a_row_are_the_servers(answered: bool, words: str, field: str) -> None:
    refusals = Refusals("http://s/v1", answered)
    assert told(refusals, *(given(p, words) for p in range(MOST_ALIKE - 1))) == []
    with pytest.raises(InputsRefused) as met:
        refusals.take(MOST_ALIKE, *given(MOST_ALIKE, words))
    assert field in met.value.message
    assert words.format(n=900 + MOST_ALIKE) in met.value.message


@pytest.mark.parametrize("words", [LONG, FILTER])
def test_a_server_that_answers_may_refuse_any_number_of_prompts(words: str) -> None:
    many = [given(p, words) for p in range(100)]
    assert len(told(Refusals("u", True), *many)) == 100
    assert len(told(Refusals("u", False), given(100), *many)) == 101


def test_an_answer_or_other_words_between_them_show_that_they_are_single() -> None:
    refusals = Refusals("u", False)
    for turn in range(5):
        few = [given(20 * turn + p, WRONG) for p in range(MOST_ALIKE - 1)]
        assert told(refusals, *few) == []
        end = given(20 * turn + 19, "" if turn % 2 else "400: others")
        assert len(told(refusals, end)) == MOST_ALIKE - 1 + turn % 2
        refusals.rest()


def test_an_answer_that_was_asked_for_before_shows_nothing_of_later() -> None:
    refusals = Refusals("u", False)
    assert told(refusals, *(given(p, WRONG) for p in (2, 5, 6))) == []
    assert told(refusals, given(4)) == [(2, 0), (4, 0)]
    assert [request.prompt for request, _ in refusals.rest()] == [5, 6]


def test_samples_of_one_prompt_count_once_and_the_rest_is_given_out_at_the_end() -> None:
    refusals = Refusals("u", False)
    assert told(refusals, *(given(0, WRONG, sample) for sample in range(30))) == []
    assert [request.sample for request, _ in refusals.rest()] == list(range(30))
    assert refusals.rest() == []


def test_counts_and_names_of_requests_make_no_difference() -> None:
    one, other = (f"400: no (request req-7f{n}, 12:0{n})" for n in (1, 2))
    assert likeness(one) == likeness(other) != likeness("400: yes")

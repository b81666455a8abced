"""From what a model says to an answer, and from answers to figures."""

from __future__ import annotations

import json
from functools import partial

import pytest
from data_kit import TURNS, Bucket, jsonl, tokenizer
from kubedistill_api.evaluation import Evaluation, Questions
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.data.template import Unrenderable
from kubedistill_trainer.evaluation.gym import Solved
from kubedistill_trainer.evaluation.prompts import TO_SOLVE, asking, final_answers, plain
from kubedistill_trainer.evaluation.questions import (
    SHOTS,
    Answered,
    Question,
    abstains,
    matches,
    normalised,
    parse,
    read_questions,
    score,
)
from kubedistill_trainer.evaluation.results import (
    Abilities,
    TaskScore,
    accuracy_of,
    taught_accuracy_of,
)
from kubedistill_trainer.evaluation.speak import Said
from kubedistill_trainer.failures import InputsRefused


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (" 42", ["42"]),
        ("42.", ["42"]),
        ("1,200.50.", ["1,200.50"]),
        ("First 3 + 4 = 7.\nThen 7 * 2 = 14.\nAnswer: 14", ["14"]),
        ("**Answer:** 14", ["14"]),
        ("Final answer: `x = 3`.", ["x = 3", "3"]),
        ("So the answer is 9.", ["9"]),
        ("Answer: 1\nNo, that is wrong.\nANSWER: 2", ["2"]),
        ("Answer: 12\nI hope this helps!", ["12"]),
        ("Answer:\n\n12", ["12"]),
        ("34 + 17 = 51", ["34 + 17 = 51", "51"]),
        ("71 + 83 = 100 + 54 = 154.", ["71 + 83 = 100 + 54 = 154", "154"]),
        (r"So we get \boxed{-7} in the end", [r"So we get \boxed{-7} in the end", "-7"]),
        ("so it is -7", ["so it is -7"]),
        ("", []),
        (" \n ", []),
        (r"Answer: \boxed{38}", [r"\boxed{38}", "38"]),
        (
            r"Answer: $\boxed{\frac{1}{2}}$",
            [r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}", r"\boxed{\frac{1}{2}}"],
        ),
        ("Answer: $38$", ["$38$", "38"]),
        (r"**Answer:** \(x = 38\).", [r"\(x = 38\)", "x = 38", "38"]),
        (r"Answer: \text{38}", [r"\text{38}", "38"]),
        ("38\n\nLet me know if another answer is needed.", ["38"]),
        ("7\n\nIf you need another answer: just ask.\nThank you!", ["7"]),
        ("Answer: 12. I hope this helps!", ["12"]),
        ("The answer is 7!", ["7!", "7"]),
        ("Please", ["Please"]),
        ("5..", ["5."]),
        ("<think>\nThe answer is 1? No.\n</think>\n\n38", ["38"]),
        ("<think>Answer: 1", []),
        ("Answer:", ["Answer:"]),
        ("5 =", ["5 ="]),
    ],
)
def test_what_may_be_the_answer_of_a_text(said: str, expected: list[str]) -> None:
    assert list(final_answers(said)) == expected


@pytest.mark.parametrize(
    ("said", "answers", "right"),
    [
        ("Paris", ["Paris"], True),
        (" paris.", ["Paris"], True),
        ("The capital is Paris, of course", ["Paris"], True),
        ("Parish", ["Paris"], False),
        ("in the year 1914", ["1914"], True),
        ("19145", ["1914"], False),
        ("São Paulo", ["Sao Paulo"], True),
        ("the United States", ["United States"], True),
        ("3,000 metres", ["3000"], True),
        ("3.5", ["3"], False),
        ("-5", ["5"], False),
        ("5", ["-5"], False),
        ("1914-1918", ["1918"], True),
        ("seven", ["7", "seven"], True),
        ("H2O", ["H2O"], True),
        ("H2O2", ["H2O"], False),
        ("Paulo Sao", ["Sao Paulo"], False),
        ("", ["Paris"], False),
        ("A", ["A"], True),
        ("It is group A.", ["A"], True),
        ("group A blood", ["A"], True),
        ("It is a rare group", ["A"], False),
        ("A rare group", ["A"], False),
        ("B", ["A"], False),
        ("the", ["The"], True),
        ("+", ["+"], True),
        ("It is the sign +.", ["+"], True),
        ("-", ["+"], False),
        ("plus", ["+"], False),
        ("C++", ["C++"], True),
        ("It was written in C++.", ["C++"], True),
        ("C", ["C++"], False),
        ("C++", ["C"], False),
        ("C#", ["C++"], False),
        ("C#", ["C#"], True),
        ("3.0", ["3"], True),
        ("3", ["3.0"], True),
        ("1.50", ["1.5"], True),
        ("30", ["3"], False),
        ("100", ["1"], False),
    ],
)
def test_an_answer_holds_what_is_right_word_for_word(
    said: str, answers: list[str], right: bool
) -> None:
    assert matches(said, answers) is right


def test_normalised_text_has_words_and_numbers_only() -> None:
    assert normalised("  The ÉTÉ, of 1,234.5 “days”! ") == "ete of 1234.5 days"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", True), ("...", True), ("I don't know.", True), ("Sorry, I do not know that", True),
        ("Unknown", True), ("Knowing", False), ("Oslo", False), ("I have no idea.", True),
        ("I cannot say", True), ("I can’t say", True), ("N/A", True), ("n/a.", True), ("Na", False),
        ("It is not known", True), ("The author is unknown.", True), ("+", False), ("?", True),
        ("The Tomb of the Unknown Soldier", False), ("I am unable to answer that", True),
    ],
)  # fmt: skip
def test_saying_nothing_is_no_answer(said: str, expected: bool) -> None:
    assert abstains(said) is expected


ASKED = Question("q", ("Oslo",))


@pytest.mark.parametrize(
    ("said", "confidence", "right", "hallucinated"),
    [
        ("Oslo", 0.9, 1, 0),
        ("Oslo", 0.1, 1, 0),
        ("Bergen", 0.9, 0, 1),
        ("Bergen", 0.5, 0, 0),
        ("Bergen", 0.1, 0, 0),
        ("I do not know", 0.9, 0, 0),
        ("", 0.9, 0, 0),
    ],
)
def test_a_hallucination_is_wrong_and_confident(
    said: str, confidence: float, right: int, hallucinated: int
) -> None:
    found = score([ASKED], [Answered(said, confidence)])
    assert (found.right, found.hallucinated, found.asked) == (right, hallucinated, 1)
    assert [slip.said for slip in found.slips] == [said] * hallucinated


def test_the_rate_is_of_all_questions_and_the_surest_slips_are_kept() -> None:
    answered = [Answered("Bergen", 0.51 + i / 100) for i in range(7)] + [Answered("Oslo", 1.0)]
    found = score([ASKED] * 8, answered)
    assert (found.accuracy, found.hallucination_rate) == (1 / 8, 7 / 8)
    assert [slip.confidence for slip in found.slips] == [0.57, 0.56, 0.55, 0.54, 0.53]


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [((0.5, 0.5), 0.5), ((1.0, 0.25), 0.5), ((0.9,), 0.9), ((), 0.0), ((0.0, 1.0), 1e-15)],
)
def test_confidence_is_the_geometric_mean(
    probabilities: tuple[float, ...], expected: float
) -> None:
    said = Said(tuple(range(len(probabilities))), probabilities)
    assert said.confidence == pytest.approx(expected)


def test_accuracy_of_a_group_counts_examples_not_tasks() -> None:
    tasks = [
        TaskScore(name="a", group="simple", examples=10, right=10),
        TaskScore(name="b", group="simple", examples=30, right=0),
        TaskScore(name="c", group="multiStep", examples=4, right=1),
    ]
    assert accuracy_of(tasks, "simple") == 0.25
    assert accuracy_of(tasks, "multiStep") == 0.25
    assert accuracy_of(tasks[2:], "simple") is None


def test_a_group_is_compared_where_both_were_asked_all_of_it() -> None:
    """A server may have answered some tasks only: a share of others says nothing beside them."""
    score = partial(TaskScore, group="simple", examples=4)
    student = [score(name="a", right=1), score(name="b", right=2)]
    teacher = [score(name="b", right=4), score(name="a", right=2), score(name="c", right=0)]
    assert taught_accuracy_of(student, teacher, "simple") == 0.75
    assert taught_accuracy_of(student, teacher[1:], "simple") is None
    assert taught_accuracy_of(student, teacher, "multiStep") is None
    both = [Abilities(prompting="Examples", tasks=tuple(tasks)) for tasks in (student, teacher[1:])]
    assert both[1].figures(beside=both[0]) == {}
    assert both[0].figures() == {"simpleAccuracy": 0.375}


NAMES = Questions(uri="s3://data/q.jsonl", prompt_field="ask", answer_field="known")


@pytest.mark.parametrize(
    ("record", "answers"),
    [
        ({"ask": " What? ", "known": "that"}, ("that",)),
        ({"ask": "What?", "known": ["this", "that"], "more": 1}, ("this", "that")),
        ({"ask": "How many?", "known": 7}, ("7",)),
        ({"ask": "Which group?", "known": "A"}, ("A",)),
        ({"ask": "Which sign?", "known": "+"}, ("+",)),
        ({"ask": "Which word?", "known": "The"}, ("The",)),
        ({"ask": "How much?", "known": [2.5, "two and a half"]}, ("2.5", "two and a half")),
    ],
)
def test_a_line_is_a_question(record: dict[str, object], answers: tuple[str, ...]) -> None:
    [found] = parse(jsonl(record), NAMES, "s3://data/q.jsonl")
    assert (found.question, found.answers) == (str(record["ask"]).strip(), answers)


def test_a_mark_of_byte_order_is_no_part_of_the_first_line() -> None:
    body = b"\xef\xbb\xbf" + jsonl({"ask": "What?", "known": "that"})
    assert parse(body, NAMES, "s3://data/q.jsonl")[0].question == "What?"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"ask": "a?", "known": "b"}\n{"ask"\n', ["line 2"]),
        (b'["a?", "b"]', ["line 1", "not a JSON object"]),
        (b'{"question": "a?", "known": "b"}', ["line 1", "no text in field 'ask'"]),
        (b'{"ask": "a?", "known": []}', ["line 1", "no answer in field 'known'"]),
        (b'{"ask": "a?", "known": ["b", "..."]}', ["no answer in field 'known'"]),
        (b'{"ask": "a?", "known": true}', ["no answer in field 'known'"]),
        (b"\n \n", ["no question in s3://data/q.jsonl"]),
        (b"\xff", ["not UTF-8"]),
        (b"[" * 100_000, ["line 1"]),
        (b'{"ask": "a?", "known": "-"}', ["no answer in field 'known'"]),
    ],
)
def test_a_line_that_is_no_question_is_refused_by_its_number(body: bytes, words: list[str]) -> None:
    with pytest.raises(InputsRefused) as refused:
        parse(body, NAMES, "s3://data/q.jsonl")
    assert refused.value.code == ExitCode.UNREADABLE_INPUT
    for word in [*words, "spec.evaluation.questions.uri"]:
        assert word in refused.value.message


def test_questions_of_a_file_that_is_not_there_are_refused() -> None:
    with pytest.raises(InputsRefused, match=r"no such object s3://data/q\.jsonl"):
        read_questions(NAMES, Bucket().open, 4)


def test_a_part_of_the_questions_is_the_same_part_every_time() -> None:
    lines = jsonl(*({"ask": f"{i}?", "known": str(i)} for i in range(50)))
    bucket = Bucket(**{"q.jsonl": lines})
    first, again = (read_questions(NAMES, bucket.open, 8) for _ in range(2))
    assert first == again and len(first.questions) == 8 and first.source == "s3://data/q.jsonl"
    assert len(read_questions(NAMES, bucket.open, 99).questions) == 50
    numbers = [int(q.answers[0]) for q in first.questions]
    assert numbers == sorted(numbers) and numbers != list(range(8))


def test_the_built_in_questions() -> None:
    found = read_questions(None, Bucket().open, 1000)
    assert found.source == "built-in" and len(found.questions) == 64
    texts = [question.question for question in found.questions]
    assert len(set(texts)) == 64 and not {shot.question for shot in SHOTS} & set(texts)
    for question in found.questions:
        assert matches(question.answers[0], question.answers)
        # Nobody may find the answer in the question.
        assert not matches(question.question, question.answers), question.question


def test_a_text_shows_solved_examples_and_ends_before_the_answer() -> None:
    text = plain("3 + 4?", (Solved("1 + 1?", "2"),))
    assert text == "Question: 1 + 1?\nAnswer: 2\n\nQuestion: 3 + 4?\nAnswer:"


def test_a_chat_template_is_used_where_there_is_one() -> None:
    talked = asking(tokenizer(TURNS), "spec.teacher")
    ids = talked.encode("3 + 4?", (Solved("1 + 1?", "2"),), TO_SOLVE)
    text = talked.tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == (f"<|im_start|>user\n3 + 4?\n\n{TO_SOLVE}<|im_end|>\n<|im_start|>assistant\n")
    assert not talked.one_line
    shown = asking(tokenizer(None), "spec.teacher")
    assert shown.one_line
    assert shown.decode(shown.encode("3?", (), TO_SOLVE)) == "Question: 3?\nAnswer:"


@pytest.mark.parametrize(
    ("prompt", "text", "answer"),
    [
        ("", "Oslo", "Oslo"),
        ("", "<think>Bergen?</think>\n\nOslo", "Oslo"),
        ("", "<think>Bergen?</think>a<think>b</think> Oslo", "Oslo"),
        ("", "Bergen?\n</think>\n\nOslo", "Oslo"),
        ("", "<think>Bergen", ""),
        ("", "<think>Bergen?</think>", ""),
        ("What?<think>\n", "Bergen", ""),
        ("What?<think>\n", "Bergen?</think>Oslo", "Oslo"),
        ("What is <think> for?", "Oslo", "Oslo"),
    ],
)
def test_an_answer_and_its_confidence_are_of_what_follows_the_reasoning(
    prompt: str, text: str, answer: str
) -> None:
    how = asking(tokenizer(TURNS), "spec.teacher")
    before, ids = (how.tokenizer.tokenizer.encode(t).ids for t in (prompt, text))
    sure = [
        0.9 if len(how.decode(ids[n:]).strip()) <= len(answer) else 0.1 for n in range(len(ids))
    ]
    found = how.answer(before, Said(tuple(ids), tuple(sure)))
    assert how.decode(found.ids).strip() == answer
    assert found.confidence == pytest.approx(0.9 if answer else 0.0)


def test_tags_that_are_special_tokens_are_read() -> None:
    how = asking(tokenizer(TURNS), "spec.teacher")
    how.tokenizer.tokenizer.add_special_tokens(["<think>", "</think>"])
    ids = how.tokenizer.tokenizer.encode("<think>Bergen?</think>Oslo<|im_end|>").ids
    found = how.answer([], Said(tuple(ids), (0.5,) * len(ids)))
    assert how.decode(found.ids) == "Oslo"


def test_a_template_that_refuses_a_question_says_so() -> None:
    talked = asking(tokenizer("{{ raise_exception('not today') if messages }}"), "spec.teacher")
    with pytest.raises(Unrenderable, match="not today"):
        talked.encode("3?", (), TO_SOLVE)


def test_a_template_that_does_not_parse_costs_nothing() -> None:
    assert asking(tokenizer("{% for"), "spec.teacher").one_line


def test_settings_have_small_defaults() -> None:
    wire = Evaluation().to_wire()
    assert json.loads(json.dumps(wire))["examples"] == 32
    assert "questions" not in wire

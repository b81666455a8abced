"""Questions with known answers: where they come from, and what of an answer counts."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubedistill_api.evaluation import Questions

from kubedistill_trainer.data.sources import OpenStore, read_file
from kubedistill_trainer.evaluation.gym import SEED, Solved
from kubedistill_trainer.evaluation.results import QuestionScore, Slip
from kubedistill_trainer.failures import unreadable

CONFIDENT = 0.5
"""From this mean probability a token on an answer was more likely than all others together."""
FIELD = "spec.evaluation.questions"
BUILT_IN = "built-in"
SHOTS = (
    Solved("What is the capital of Norway?", "Oslo"),
    Solved("In which year did the French Revolution begin?", "1789"),
)
"""Not among the built-in questions."""
_FACTS = Path(__file__).with_name("facts.jsonl")
_ARTICLES = {"a", "an", "the"}
_ABSTENTIONS = (
    "do not know", "don t know", "not sure", "no idea", "not known", "is unknown", "are unknown",
    "cannot answer", "can t answer", "unable to answer", "cannot say", "can t say", "no answer",
)  # fmt: skip
_ABSTENTIONS_ALONE = {"unknown", "idk", "dunno", "not available", "not applicable"}
_NOT_AVAILABLE = re.compile(r"\W*n\s*/\s*a\W*|\W*n\.a\W*", re.IGNORECASE)
_SYMBOLS = frozenset("#%&*/@")
"""Of what Unicode calls punctuation; all that it calls symbols are."""
_STOPS = ".,;:!?\"'“”‘’`()"
_SLIPS = 5
_LONGEST_SLIP = 200


@dataclass(frozen=True)
class Question:
    """`answers`: each of them is right."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class QuestionSet:
    """`source`: `built-in` or the file's address; `digest`: SHA-256 (hex) of the file."""

    source: str
    digest: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answered:
    """What was said to a question, without its reasoning.

    `confidence`: geometric mean of its tokens' probabilities; None where nobody says.
    """

    said: str
    confidence: float | None


def read_questions(given: Questions | None, open_store: OpenStore, limit: int) -> QuestionSet:
    """At most `limit` questions of the user's file, or of the built-in one: the same every time.

    InputsRefused for a file that is not there, and for a line that is no question.
    """
    if given is None:
        source, body, names = BUILT_IN, _FACTS.read_bytes(), Questions(uri="s3://built-in")
    else:
        source, names = given.uri, given
        body = read_file(given.uri, f"{FIELD}.uri", open_store)
    found = parse(body, names, source)
    chosen = sorted(random.Random(SEED).sample(range(len(found)), min(limit, len(found))))  # noqa: S311
    digest = hashlib.sha256(body).hexdigest()
    return QuestionSet(source, digest, tuple(found[i] for i in chosen))


def parse(body: bytes, names: Questions, source: str) -> list[Question]:
    """All questions of a .jsonl file. InputsRefused, which names the line."""
    example = f'{{"{names.prompt_field}": "…", "{names.answer_field}": "…"}}'
    wanted = f"write one JSON object a line, such as {example}"
    try:
        lines = body.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise unreadable(f"{FIELD}.uri", f"{source} is not UTF-8", "give UTF-8 text") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_question(json.loads(line), names))
            except (ValueError, RecursionError) as error:
                where = f"{source} line {number}: {error}"
                raise unreadable(f"{FIELD}.uri", where, wanted) from error
    if not found:
        raise unreadable(f"{FIELD}.uri", f"no question in {source}", wanted)
    return found


def _question(record: Any, names: Questions) -> Question:
    """Raises ValueError where a record is none."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    asked, known = (record.get(name) for name in (names.prompt_field, names.answer_field))
    if not isinstance(asked, str) or not asked.strip():
        raise ValueError(f"no text in field {names.prompt_field!r}")
    answers = [_answer(one) for one in (known if isinstance(known, list) else [known])]
    if not answers or not all(normalised(answer) for answer in answers):
        raise ValueError(f"no answer in field {names.answer_field!r}")
    return Question(asked.strip(), tuple(answers))


def _answer(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    return ""


def normalised(text: str) -> str:
    """Lower-case words and numbers with one blank between: no accents, punctuation, articles.

    Signs stay where they make a word another (`C++`, `C#`) or where there is no word (`+`), and
    articles where there is nothing else (`A`).
    """
    words = _words(text)
    return " ".join([w for w in words if w not in _ARTICLES] or words or _symbols(text))


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    # 3,000 is 3000, and 3.5 stays what it is; so does 3, which 3.0 is too.
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", plain)
    found = re.findall(r"(?<!\w)-?\d+(?:\.\d+)?(?!\w)|[^\W\d_]+(?:\++|#)(?!\w)|[^\W_]+", plain)
    return [re.sub(r"(\.\d*?)0+$", r"\1", word).rstrip(".") for word in found]


def _symbols(text: str) -> list[str]:
    """The words of a text that are symbols only."""
    found = (word.strip(_STOPS) for word in text.split())
    return [word for word in found if word and all(map(_is_symbol, word))]


def _is_symbol(character: str) -> bool:
    return character in _SYMBOLS or unicodedata.category(character).startswith("S")


def matches(said: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers is in what was said, word for word."""
    text = f" {normalised(said)} "
    return any(_is_in(answer, said, text) for answer in answers)


def _is_in(answer: str, said: str, text: str) -> bool:
    """`text`: what was said, normalised, with a blank at both ends."""
    wanted = normalised(answer)
    if not _words(answer):
        return f" {wanted} " in f" {' '.join(_symbols(said))} "
    if not set(_words(answer)) <= _ARTICLES:
        return f" {wanted} " in text
    # "Group A" holds the answer A; "It is a rare one" and "A rare one" do not.
    name = re.escape(answer.strip())
    alone = rf"(?<=\w ){name}(?!\w)|(?<!\w){name}(?!\w|\s+\w)"
    return text.strip() == wanted or re.search(alone, said) is not None


def abstains(said: str) -> bool:
    """Whether no answer was given: nothing said, or that it is not known."""
    bare = normalised(said)
    if not bare or bare in _ABSTENTIONS_ALONE or _NOT_AVAILABLE.fullmatch(said):
        return True
    return any(f" {phrase} " in f" {bare} " for phrase in _ABSTENTIONS)


def score(questions: Sequence[Question], answered: Sequence[Answered]) -> QuestionScore:
    """Right; hallucinated: wrong, not an abstention, and with a confidence above `CONFIDENT`.

    A server may not say how sure its model is: then nothing is known of hallucinations, nor of a
    mean confidence.
    """
    both = list(zip(questions, answered, strict=True))
    wrong = [(q, a) for q, a in both if not matches(a.said, q.answers)]
    given = [(q, a) for q, a in wrong if not abstains(a.said)]
    slips = [_slip(q, a.said, c) for q, a in given if (c := a.confidence or 0.0) > CONFIDENT]
    told = [a.confidence for a in answered if a.confidence is not None]
    surest = sorted(slips, key=lambda slip: -slip.confidence)
    return QuestionScore(
        asked=len(questions),
        right=len(both) - len(wrong),
        hallucinated=None if any(a.confidence is None for _, a in given) else len(slips),
        confidence=round(sum(told) / max(1, len(told)), 6) if len(told) == len(both) else None,
        slips=tuple(surest[:_SLIPS]),
    )


def _slip(question: Question, said: str, confidence: float) -> Slip:
    return Slip(
        question=question.question[:_LONGEST_SLIP],
        expected=question.answers[0][:_LONGEST_SLIP],
        said=said.strip()[:_LONGEST_SLIP],
        confidence=round(confidence, 6),
    )

"""Lines → conversations and prompts; what is none is named by file and line, with the remedy."""

from __future__ import annotations

from typing import Any

import pytest
from data_kit import Bucket, jsonl
from kubedistill_api.data import Data, DataSource
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.data.conversation import Conversation, Message, Prompt
from kubedistill_trainer.data.records import BadRecords
from kubedistill_trainer.data.sources import Corpus, Record, parse_source, read_corpus, read_prompts
from kubedistill_trainer.failures import InputsRefused

PAIRS = {"promptField": "q", "responseField": "a"}
TALKS = {"messagesField": "turns"}
ASKED = {"promptField": "q", "origin": "Teacher"}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief"}


def _read(body: bytes, allowed: int = 0, **source: Any) -> Corpus:
    data = Data.model_validate({"sources": [{"uri": "s3://data/f.jsonl", **source}]})
    return read_corpus(data, Bucket(**{"f.jsonl": body}).open, BadRecords(allowed))


def _refusal(body: bytes, **source: Any) -> tuple[str, str]:
    with pytest.raises(InputsRefused) as refused:
        _read(body, **source)
    assert refused.value.code == ExitCode.UNREADABLE_INPUT
    [problem] = refused.value.problems
    assert problem.field == "spec.data.sources[0].uri"
    return problem.found, problem.expected


def test_a_pair_is_a_conversation_of_two_turns() -> None:
    corpus = _read(jsonl({"q": "1+1?", "a": "2", "id": 7}), **PAIRS)
    said = Conversation((Message("user", "1+1?"), Message("assistant", "2")))
    assert corpus.conversations == [Record(0, 1, said)]
    assert not corpus.documents and not corpus.prompts


def test_messages_are_a_conversation() -> None:
    body = b"\n" + jsonl({"turns": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]})
    [record] = _read(body, **TALKS).conversations
    assert record.line == 2
    assert [message.role for message in record.conversation.messages] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip


def test_the_teacher_is_asked_what_comes_before_its_turn() -> None:
    body = jsonl(
        {"turns": [SYSTEM, USER, ASSISTANT, ASSISTANT]}, {"turns": [USER, ASSISTANT, USER]}
    )
    asked = _read(body, origin="Teacher", **TALKS).prompts
    system, user, assistant = (
        Message("system", "Be brief"), Message("user", "Hi"), Message("assistant", "Hello"),
    )  # fmt: skip
    assert asked == [Prompt(0, 1, (system, user)), Prompt(0, 2, (user, assistant, user))]


def test_prompts_are_read_with_their_answers() -> None:
    body = jsonl({"q": "1+1?", "n": 2}, {"q": "Why?"}, {"q": "Half?", "n": "0.5"})
    sources = [
        {"uri": "s3://data/text.txt"},
        {"uri": "s3://data/f.jsonl", "origin": "Teacher", "promptField": "q", "answerField": "n"},
    ]
    data = Data.model_validate({"sources": sources})
    prompts = read_prompts(data, Bucket(**{"f.jsonl": body, "text.txt": b"x"}).open)
    assert [(p.source, p.line, p.messages[0].content, p.answer) for p in prompts] == [
        (1, 1, "1+1?", "2"), (1, 2, "Why?", None), (1, 3, "Half?", "0.5"),
    ]  # fmt: skip


def test_prompts_without_a_response_field_are_refused_in_one_message() -> None:
    found, expected = _refusal(jsonl({"q": "1+1?", "a": "2"}), promptField="q")
    assert found == "s3://data/f.jsonl line 1: a prompt and no response: the fields are ['a', 'q']"
    assert expected.startswith("name the field of the response in `responseField`, or write ")
    assert "`origin: Teacher` to have the teacher answer" in expected


def test_no_number_of_bad_records_allows_prompts_without_a_response_field() -> None:
    with pytest.raises(InputsRefused, match="a prompt and no response"):
        _read(jsonl({"q": "x"}), allowed=100, promptField="q")


@pytest.mark.parametrize(
    ("record", "source", "wrong"),
    [
        ({"q": "x", "b": "y"}, PAIRS, "no response field 'a', only ['b', 'q']"),
        ({"a": "x"}, PAIRS, "no field 'q', only ['a']"),
        ({"q": ["x"], "a": "y"}, PAIRS, "field 'q' is a list, not a string"),
        ({"q": "x", "a": " \n"}, PAIRS, "field 'a' is empty"),
        ({"q": "x", "a": None}, PAIRS, "field 'a' is a NoneType, not a string"),
        ({"turns": "x"}, TALKS, "field 'turns' is a str, not a list of messages"),
        ({"turns": []}, TALKS, "field 'turns' is an empty list"),
        ({"turns": ["Hi"]}, TALKS, "message 1 of 'turns' is no {role, content}: str"),
        ({"turns": [USER, {"from": "bot"}]}, TALKS, "message 2 of 'turns' is no {role, content}: ['from']"),
        (
            {"turns": [{"role": "human", "content": "x"}]}, TALKS,
            "message 1 of 'turns' has the role \"human\", not one of system, user, assistant, tool",
        ),
        ({"turns": [{"role": ["user"], "content": "x"}]}, TALKS, "has the role [\"user\"], not one of"),
        ({"turns": [USER, {**ASSISTANT, "content": ""}]}, TALKS, "message 2 of 'turns' is empty"),
        ({"turns": [USER, {**ASSISTANT, "content": [1]}]}, TALKS, "message 2 of 'turns' is a list, not"),
        ({"turns": [SYSTEM, ASSISTANT, USER, ASSISTANT]}, TALKS, "'turns' begins with the assistant"),
        ({"turns": [USER, ASSISTANT, USER]}, TALKS, "no response: the last message of 'turns' is the user's"),
        ({"q": ""}, ASKED, "field 'q' is empty"),
        ({"turns": [SYSTEM]}, {**TALKS, "origin": "Teacher"}, "'turns' asks nothing"),
        ({"q": "x", "n": [2]}, {**ASKED, "answerField": "n"}, "field 'n' is a list"),
        ({"q": "ab\ud83d", "a": "y"}, PAIRS, "field 'q' holds half a character, \\ud83d"),
        ({"q": "x", "a": "\udc00"}, PAIRS, "field 'a' holds half a character, \\udc00"),
        ({"q": "x", "n": "\ud83d"}, {**ASKED, "answerField": "n"}, "field 'n' holds half a character"),
        (
            {"turns": [USER, {**ASSISTANT, "content": "x\ud83d"}]}, TALKS,
            "the content of message 2 of 'turns' holds half a character, \\ud83d (a lone surrogate), "
            "at place 2",
        ),
    ],
)  # fmt: skip
def test_a_bad_record_is_named(record: Any, source: Any, wrong: str) -> None:
    good = {"q": "x", "a": "y", "turns": [USER, ASSISTANT]}
    found, expected = _refusal(jsonl(good, record), **source)
    assert found.startswith("s3://data/f.jsonl line 2: ") and wrong in found
    assert "maxBadRecords" in expected
    assert (source.get("messagesField") or source["promptField"]) in expected
    assert ("origin: Teacher" in expected) == ("origin" not in source)


def test_halves_of_characters_that_are_not_used_do_not_matter() -> None:
    body = jsonl({"q": "\U0001f600", "a": "y", "id": "\ud83d"})
    [record] = _read(body, **PAIRS).conversations
    assert record.conversation.messages[0].content == "\U0001f600"


def test_bad_records_within_the_limit_are_skipped() -> None:
    body = jsonl({"q": "x"}, {"q": "x", "a": "y"}, [])
    assert [r.line for r in _read(body, allowed=2, **PAIRS).conversations] == [2]
    with pytest.raises(InputsRefused, match="line 3: a JSON list"):
        _read(body, allowed=1, **PAIRS)


def test_a_txt_file_has_no_fields() -> None:
    source = DataSource(uri="s3://data/f.txt", messages_field="turns")
    with pytest.raises(InputsRefused, match=r"a \.txt file has no fields"):
        parse_source(Corpus(), 0, source, b"", BadRecords(0))


def test_the_digest_knows_how_a_file_is_read() -> None:
    body = jsonl({"q": "x", "a": "y", "text": "z"})
    ways: list[dict[str, Any]] = [
        {}, PAIRS, {"promptField": "a", "responseField": "q"},
        {"promptField": "q", "origin": "Teacher"},
    ]  # fmt: skip
    assert len({_read(body, **way).digest for way in ways}) == 4

"""A chat template: what the assistant says is learnt, token for token; what cannot be told is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from data_kit import END, STRICT, TURNS, Bucket, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from kubedistill_trainer.data.conversation import Conversation, Message
from kubedistill_trainer.data.packing import encode
from kubedistill_trainer.data.template import EXAMPLE, ChatTemplate, Unrenderable, chat_template
from kubedistill_trainer.data.tokenizer import TextTokenizer, load_tokenizer
from kubedistill_trainer.failures import InputsRefused
from tokenizers import Tokenizer

SYSTEM = Message("system", "Be brief")
USER = Message("user", "What is the question? ")
ASSISTANT = Message("assistant", " The answer\n\nis 漢字 ☺ 42. ")
TALK = Conversation((SYSTEM, USER, ASSISTANT, USER, Message("assistant", "42")))


def _learnt(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """The runs of learnt tokens, as text."""
    [encoded] = template.encode([template.rendered(conversation)])
    runs: list[list[int]] = []
    for i, (token, learnt) in enumerate(zip(encoded.tokens, encoded.learnt, strict=True)):
        if learnt and (i == 0 or not encoded.learnt[i - 1]):
            runs.append([])
        if learnt:
            runs[-1].append(int(token))
    decode = tokenizer().tokenizer.decode
    return [decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("in_place", [True, False])
def test_the_answer_and_its_end_are_learnt(in_place: bool) -> None:
    template = chat_template(tokenizer(TURNS, in_place), "f", None)
    assert _learnt(template, TALK) == [ASSISTANT.content + "<|im_end|>", "42<|im_end|>"]


def test_tokens_are_those_of_the_whole_text() -> None:
    template = chat_template(tokenizer(), "f", None)
    rendered = template.rendered(TALK)
    [encoded] = template.encode([rendered])
    whole = tokenizer().tokenizer.encode(rendered.text, add_special_tokens=False).ids
    assert encoded.tokens.tolist() == whole


_WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    str.strip
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_WORDS, _WORDS), min_size=1, max_size=3), st.booleans())
def test_whatever_is_said_is_learnt_and_nothing_else(
    turns: list[tuple[str, str]], in_place: bool
) -> None:
    messages = [
        Message(role, words)  # type: ignore[arg-type]
        for pair in turns
        for role, words in zip(("user", "assistant"), pair, strict=True)
    ]
    template = chat_template(_TOKENIZERS[in_place], "f", None)
    said = [f"{m.content}<|im_end|>" for m in messages if m.role == "assistant"]
    assert _learnt(template, Conversation(tuple(messages))) == said


_TOKENIZERS = {in_place: tokenizer(TURNS, in_place) for in_place in (True, False)}


def test_the_example_of_the_message_works() -> None:
    template = ChatTemplate(tokenizer(None), EXAMPLE, "f")
    assert _learnt(template, TALK) == [ASSISTANT.content + END, "42" + END]


def test_without_a_marker_the_whole_turn_is_learnt() -> None:
    lines = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template = ChatTemplate(tokenizer(None), lines, "f")
    pair = Conversation((USER, Message("assistant", "42")))
    assert _learnt(template, pair) == ["assistant: 42\n"]


def test_a_template_without_an_end_is_refused() -> None:
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    template = ChatTemplate(tokenizer(None), bare, "spec.data.chatTemplate")
    with pytest.raises(InputsRefused, match="puts nothing after what the assistant says"):
        template.rendered(TALK)


def test_a_template_that_changes_its_mind_is_refused() -> None:
    last_only = (
        "{% for m in messages %}{{ m.role + ('!' if loop.last else ':') + m.content + '\n' }}"
        "{% endfor %}"
    )
    template = ChatTemplate(tokenizer(None), last_only, "spec.student")
    with pytest.raises(InputsRefused) as refused:
        template.rendered(TALK)
    [problem] = refused.value.problems
    assert problem.field == "spec.student"
    assert "renders the turns before message 3 differently once it is there" in problem.found
    assert "'!What is" in problem.found and "':What is" in problem.found
    assert "spec.data.chatTemplate" in problem.expected


def test_a_template_that_raises_says_why() -> None:
    template = chat_template(tokenizer(STRICT), "f", None)
    with pytest.raises(Unrenderable, match="no system role"):
        template.rendered(TALK)
    assert _learnt(template, Conversation((USER, ASSISTANT))) == [
        f" {ASSISTANT.content.strip()} {END}"
    ]


def test_no_template_is_refused_with_one_that_works() -> None:
    with pytest.raises(InputsRefused) as refused:
        chat_template(tokenizer(None), "spec.teacher", None)
    [problem] = refused.value.problems
    assert (problem.field, problem.found) == ("spec.teacher", "a tokenizer without chat template")
    assert problem.expected.endswith(EXAMPLE) and "spec.data.chatTemplate" in problem.expected


def test_a_template_that_does_not_parse_is_refused() -> None:
    with pytest.raises(InputsRefused, match="does not parse"):
        ChatTemplate(tokenizer(None), "{% for", "spec.data.chatTemplate")


def test_a_template_cannot_leave_its_sandbox() -> None:
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Unrenderable, match="unsafe"):
        ChatTemplate(tokenizer(None), escape, "f").render([USER])


def test_every_day_is_the_same() -> None:
    dated = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate(tokenizer(None), dated, "f").render([USER]) == "26 Jul 2024"


def test_the_spec_s_template_goes_first_and_is_exported() -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    plain = tokenizer(None)
    config = json.dumps({"eos_token": END, "chat_template": named}).encode()
    own = replace(plain, files={**plain.files, "tokenizer_config.json": config})
    assert own.chat_template == "y"
    given = own.with_chat_template(TURNS)
    assert given.chat_template == TURNS
    assert given.files["chat_template.jinja"] == TURNS.encode()
    assert json.loads(given.files["tokenizer_config.json"]) == {"eos_token": END}
    assert own.chat_template == "y"


def test_a_template_is_rendered_without_torch() -> None:
    code = (
        "import sys; from data_kit import tokenizer; "
        "from kubedistill_trainer.data.template import chat_template; "
        "chat_template(tokenizer(), 'f', None); print('torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert found.stdout.strip() == "False"


def _loaded(**files: bytes) -> TextTokenizer:
    bucket = Bucket()
    bucket.put("t", {**tokenizer().files, **files})
    return load_tokenizer(bucket.open("s3://data/t"), "spec.teacher")


def test_what_a_file_says_of_truncation_and_padding_is_not_done() -> None:
    kept = Tokenizer.from_str(tokenizer().tokenizer.to_str())
    kept.enable_truncation(8)
    kept.enable_padding(pad_token="<|im_start|>", pad_id=1)
    found = _loaded(**{"tokenizer.json": kept.to_str().encode()})
    texts = ["the question is the question and the answer", "the"]
    plain = tokenizer()
    assert found.digest == plain.digest
    for mine, other in zip(
        encode(texts, found.tokenizer, 0), encode(texts, plain.tokenizer, 0), strict=True
    ):
        assert mine.tolist() == other.tolist()


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("tokenizer_config.json", b'{"eos_token":'),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b""),
        ("tokenizer_config.json", b'{"a": "\xe4"}'),
        ("chat_template.jinja", b"\xe4"),
    ],
)
def test_a_broken_file_beside_a_tokenizer_is_named(name: str, body: bytes) -> None:
    with pytest.raises(InputsRefused, match=f"spec.teacher: found s3://data/t/{name}: "):
        _loaded(**{name: body})

"""Files in S3 → texts, conversations, prompts. A malformed line is named by file and line number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from kubedistill_api.data import Data, DataSource

from kubedistill_trainer.data.conversation import Conversation, Prompt
from kubedistill_trainer.data.records import (
    BadRecord,
    BadRecords,
    conversation_of,
    is_conversation,
    prompt_of,
    record_of,
    text_of,
)
from kubedistill_trainer.failures import unreadable
from kubedistill_trainer.store import NoSuchBucket, NotFound, Store
from kubedistill_trainer.store.uri import S3Uri

OpenStore = Callable[[str], Store]
"""`s3://bucket/prefix` → its store, with the job's endpoint and region."""


@dataclass(frozen=True)
class Record:
    """A conversation and where it is from: place of its file in `spec.data.sources`, and line,
    counted from 1; 0 for one that the teacher wrote."""

    source: int
    line: int
    conversation: Conversation


@dataclass
class Corpus:
    """What the files hold, each kind in order, and the SHA-256 (hex) of the files.

    documents: plain texts; sources: for each of them the place of its file in `spec.data.sources`.
    prompts: what sources with `origin: Teacher` ask.
    """

    documents: list[str] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    conversations: list[Record] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    digest: str = ""


def read_prompts(data: Data, open_store: OpenStore) -> Sequence[Prompt]:
    """What the teacher is asked, in order of file and line.

    Raises InputsRefused as `read_corpus` does, for a malformed line of any file: no answer is paid
    for before all of the data can be read.
    """
    return read_corpus(data, open_store, BadRecords(data.max_bad_records)).prompts


def read_corpus(data: Data, open_store: OpenStore, bad: BadRecords) -> Corpus:
    """All of all sources; `bad` counts malformed lines.

    Raises InputsRefused (UNREADABLE_INPUT) for a missing file, for more malformed lines than `bad`
    allows, and when there is nothing at all.
    """
    digest = hashlib.sha256()
    corpus = Corpus()
    for index, source in enumerate(data.sources):
        body = read_file(source.uri, field_of(index), open_store)
        digest.update(hashlib.sha256(body).digest() + source.text_field.encode() + b"\0")
        if is_conversation(source):
            digest.update(_reading(source))
        parse_source(corpus, index, source, body, bad)
    if not (corpus.documents or corpus.conversations or corpus.prompts):
        names = ", ".join(source.uri for source in data.sources)
        raise unreadable("spec.data.sources", f"no text in {names}", "give a file that holds text")
    corpus.digest = digest.hexdigest()
    return corpus


def fields_of(body: bytes) -> list[str]:
    """Names of the fields that records of a .jsonl file have, in order; of lines that are records."""
    found: set[str] = set()
    for _, line in _lines(body.decode(errors="replace")):
        with suppress(BadRecord):
            found |= record_of(line).keys()
    return sorted(found)


def field_of(index: int) -> str:
    """The field that names a file."""
    return f"spec.data.sources[{index}].uri"


def parse_source(
    corpus: Corpus, index: int, source: DataSource, body: bytes, bad: BadRecords
) -> None:
    """Add one file, the `index`-th, to `corpus`; malformed lines to `bad`."""
    where = field_of(index)
    text = _decoded(source, where, body)
    if source.uri.endswith(".txt"):
        if is_conversation(source):
            raise unreadable(where, source.uri, "give a .jsonl file: a .txt file has no fields")
        if text.strip():
            corpus.documents.append(text)
            corpus.sources.append(index)
        return
    for number, line in _lines(text):
        try:
            _add(corpus, index, source, number, line)
        except BadRecord as problem:
            found = f"{source.uri} line {number}: {problem}"
            if _lacks_response(source):
                raise unreadable(where, found, _wanted(source)) from None
            bad.add(where, found, _wanted(source))


def _add(corpus: Corpus, index: int, source: DataSource, number: int, line: str) -> None:
    if source.origin == "Teacher":
        corpus.prompts.append(prompt_of(line, source, index, number))
    elif is_conversation(source):
        corpus.conversations.append(Record(index, number, conversation_of(line, source)))
    elif document := text_of(line, source):
        corpus.documents.append(document)
        corpus.sources.append(index)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _wanted(source: DataSource) -> str:
    """What a line of this file has to look like."""
    asks = source.origin == "Teacher"
    if source.messages_field is not None:
        turns = '{"role": "user", "content": "…"}'
        if not asks:
            turns += ', {"role": "assistant", "content": "…"}'
        example = f'{{"{source.messages_field}": [{turns}]}}'
    elif source.prompt_field is None:
        example = f'{{"{source.text_field}": "…"}}'
    elif asks:
        example = f'{{"{source.prompt_field}": "…"}}'
    elif _lacks_response(source):
        return (
            "name the field of the response in `responseField`, or write `origin: Teacher` to "
            "have the teacher answer"
        )
    else:
        example = f'{{"{source.prompt_field}": "…", "{source.response_field}": "…"}}'
    wanted = f"write one JSON object a line, such as {example}"
    if is_conversation(source) and not asks:
        wanted += ", or write `origin: Teacher` to have the teacher answer"
    return wanted


def _lacks_response(source: DataSource) -> bool:
    """Whether the spec itself names no response, so that no line can have one."""
    names_one = source.response_field or source.messages_field
    return source.origin == "Human" and source.prompt_field is not None and not names_one


def _reading(source: DataSource) -> bytes:
    """What decides which conversations come of a file."""
    facts = [source.origin, source.prompt_field, source.response_field, source.messages_field]
    return json.dumps(facts).encode() + b"\0"


def _decoded(source: DataSource, where: str, body: bytes) -> str:
    if not source.uri.endswith((".jsonl", ".txt")):
        raise unreadable(where, source.uri, "give a .jsonl or a .txt file")
    try:
        return body.decode("utf-8-sig")  # editors on Windows write the mark
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        raise unreadable(
            where, f"{source.uri} line {line} is not UTF-8", "give UTF-8 text"
        ) from error


def read_file(address: str, where: str, open_store: OpenStore) -> bytes:
    """The object at an s3:// address that the field `where` names. InputsRefused without one."""
    uri = S3Uri.parse(address)
    folder, _, name = uri.prefix.rpartition("/")
    if not name:
        raise unreadable(where, address, "name a file, not a bucket or a folder")
    try:
        return open_store(f"s3://{uri.bucket}/{folder}".rstrip("/")).get(name)
    except NoSuchBucket as error:
        raise unreadable(
            where, f"bucket {uri.bucket!r} does not exist", "correct the address"
        ) from error
    except NotFound as error:
        raise unreadable(
            where, f"no such object {address}", "upload the file or correct the address"
        ) from error

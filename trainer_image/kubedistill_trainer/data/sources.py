"""Text files in S3 → documents. A malformed line is named by file and line number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kubedistill_api.data import Data, DataSource

from kubedistill_trainer.failures import unreadable
from kubedistill_trainer.store import NoSuchBucket, NotFound, Store
from kubedistill_trainer.store.uri import S3Uri

OpenStore = Callable[[str], Store]
"""`s3://bucket/prefix` → its store, with the job's endpoint and region."""

_LONGEST_FRAGMENT = 60


@dataclass(frozen=True)
class Corpus:
    """Documents in order, and the SHA-256 (hex) of the files that they came from.

    `sources`: for each document the place of its file in `spec.data.sources`.
    """

    documents: Sequence[str]
    sources: Sequence[int]
    digest: str
    bad_records: int = 0


class _BadLine(ValueError):
    """A line that is no record, and why."""


def read_corpus(data: Data, open_store: OpenStore) -> Corpus:
    """All documents of all sources.

    Raises InputsRefused (UNREADABLE_INPUT) for a missing file, for more than `maxBadRecords`
    malformed lines, and when there is no text at all.
    """
    digest = hashlib.sha256()
    documents: list[str] = []
    sources: list[int] = []
    bad = 0
    for index, source in enumerate(data.sources):
        field = f"spec.data.sources[{index}].uri"
        body = _read(source, field, open_store)
        digest.update(hashlib.sha256(body).digest() + source.text_field.encode() + b"\0")
        found, wrong = parse_source(source, body, field, data.max_bad_records - bad)
        documents += found
        sources += [index] * len(found)
        bad += wrong
    if not documents:
        names = ", ".join(source.uri for source in data.sources)
        raise unreadable("spec.data.sources", f"no text in {names}", "give a file that holds text")
    return Corpus(documents, sources, digest.hexdigest(), bad)


def parse_source(
    source: DataSource, body: bytes, field: str, allowed_bad: int
) -> tuple[list[str], int]:
    """The documents of one file, and how many malformed lines were skipped."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        raise unreadable(
            field, f"{source.uri} line {line} is not UTF-8", "give UTF-8 text"
        ) from error
    if source.uri.endswith(".txt"):
        return ([text] if text.strip() else []), 0
    if not source.uri.endswith(".jsonl"):
        raise unreadable(field, source.uri, "give a .jsonl or a .txt file")
    documents: list[str] = []
    bad = 0
    for number, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            document = _document(content, source.text_field)
        except _BadLine as problem:
            bad += 1
            if bad > allowed_bad:
                raise unreadable(
                    field,
                    f"{source.uri} line {number}: {problem}",
                    f'write one JSON object a line, such as {{"{source.text_field}": "…"}}, '
                    "or allow bad lines with spec.data.maxBadRecords",
                ) from None
            continue
        if document:
            documents.append(document)
    return documents, bad


def _read(source: DataSource, field: str, open_store: OpenStore) -> bytes:
    uri = S3Uri.parse(source.uri)
    folder, _, name = uri.prefix.rpartition("/")
    if not name:
        raise unreadable(field, source.uri, "name a file, not a bucket or a folder")
    try:
        return open_store(f"s3://{uri.bucket}/{folder}".rstrip("/")).get(name)
    except NoSuchBucket as error:
        raise unreadable(
            field, f"bucket {uri.bucket!r} does not exist", "correct the address"
        ) from error
    except NotFound as error:
        raise unreadable(
            field, f"no such object {source.uri}", "upload the file or correct the address"
        ) from error


def _document(line: str, text_field: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        shown = line[:_LONGEST_FRAGMENT]
        raise _BadLine(f"not JSON ({error.msg} at column {error.colno}): {shown!r}") from error
    if not isinstance(record, dict):
        raise _BadLine(f"a JSON {type(record).__name__}, not an object")
    if text_field not in record:
        raise _BadLine(f"no field {text_field!r}, only {sorted(record)[:8]}")
    value = record[text_field]
    if not isinstance(value, str):
        raise _BadLine(f"field {text_field!r} is a {type(value).__name__}, not a string")
    return value

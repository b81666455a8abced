"""A stream of a teacher's text: what makes it, where it lies, and what is in a shard.

```
<storage.uri>/streams/<digest of the identity>/
  manifest.json                            identity and layout, written once by the first writer
  partitions/<p>/log/<slot>.json           one record a slot, written once (`partition_log.py`)
  partitions/<p>/shards/<uuid>.jsonl.zst   answers as they came, named by a record, or an orphan
  partitions/<p>/repairs/<slot>/…          shards that were damaged and asked again (`repairs.py`)
```
Request n asks for sample n mod S of prompt n ÷ S, with S samples a prompt; all samples of a prompt
belong to partition (n ÷ S) mod P. A record of the log names the requests that its shard answers, so
that a writer which starts knows them without reading any answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import zstandard
from pydantic import BaseModel, ConfigDict, Field

from kubedistill_trainer.teacher.errors import ShardCorrupt
from kubedistill_trainer.teacher.manifest import Digest, Identity, Layout
from kubedistill_trainer.teacher.partition_log import LogRecord, TextShard
from kubedistill_trainer.teacher.text import TextAnswer

FORMAT_VERSION = 1
_LEVEL = 6


class TextIdentity(Identity):
    """Everything that decides what a teacher says, as far as that can be decided."""

    kind: Literal["Text"] = "Text"
    format_version: int = FORMAT_VERSION
    teacher: Digest
    """Digest of an own model, or a server's address."""
    model: str = ""
    """Name of the model at a server."""
    prompts_digest: Digest
    samples: int = Field(ge=1)
    """Answers a prompt."""
    max_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    system_prompt: str = ""
    """As the teacher sees it."""
    reasoning: bool
    """Whether the teacher is asked to reason."""
    seed: int = 0


class TextManifest(Layout):
    """`manifest.json` of a stream of text."""

    identity: TextIdentity
    prompts: int = Field(ge=1)

    @property
    def requests(self) -> int:
        """Answers that the whole stream will have."""
        return self.prompts * self.identity.samples

    def place(self, request: int) -> tuple[int, int]:
        """(prompt, sample) of a request."""
        return divmod(request, self.identity.samples)

    def requests_of(self, partition: int) -> Iterator[int]:
        """The requests of one partition, rising."""
        samples = self.identity.samples
        for prompt in range(partition, self.prompts, self.partitions):
            yield from range(prompt * samples, (prompt + 1) * samples)


class _Line(BaseModel):
    """One line of a shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: int = Field(ge=0)
    sample: int = Field(ge=0)
    text: str
    reasoning: str = ""
    finished: bool = True
    refusal: str = ""
    prompt_tokens: int = Field(0, ge=0)
    answer_tokens: int = Field(0, ge=0)


def encode_shard(answers: Mapping[int, TextAnswer], manifest: TextManifest) -> bytes:
    """Answers by request as JSON lines, compressed."""
    lines = []
    for request, answer in answers.items():
        prompt, sample = manifest.place(request)
        line = _Line(prompt=prompt, sample=sample, **vars(answer))
        lines.append(line.model_dump_json(exclude_defaults=True) + "\n")
    return zstandard.ZstdCompressor(level=_LEVEL).compress("".join(lines).encode())


def decode_shard(data: bytes, record: LogRecord, manifest: TextManifest) -> dict[int, TextAnswer]:
    """Answers by request. ShardCorrupt when the bytes are not what `record` committed."""
    found = hashlib.sha256(data).hexdigest()
    if found != record.sha256:
        raise ShardCorrupt(
            record.key,
            None,
            f"{len(data)} bytes with SHA-256 {found[:12]}, not {record.sha256[:12]}",
        )
    result: dict[int, TextAnswer] = {}
    for text in zstandard.ZstdDecompressor().decompress(data).decode().split("\n")[:-1]:
        fields = _Line.model_validate_json(text).model_dump()
        request = fields.pop("prompt") * manifest.identity.samples + fields.pop("sample")
        result[request] = TextAnswer(**fields)
    return result


def shard_facts(answers: Mapping[int, TextAnswer]) -> TextShard:
    """What a record says of a shard with these answers."""
    said = answers.values()
    return TextShard(
        requests=tuple(runs(answers)),
        refused=sum(bool(a.refusal) for a in said),
        prompt_tokens=sum(a.prompt_tokens for a in said),
        answer_tokens=sum(a.answer_tokens for a in said),
    )


def total_facts(parts: Iterable[TextShard]) -> TextShard:
    """The sum of what records say, without the requests."""
    known = list(parts)
    return TextShard(
        refused=sum(part.refused for part in known),
        prompt_tokens=sum(part.prompt_tokens for part in known),
        answer_tokens=sum(part.answer_tokens for part in known),
    )


def runs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """[first, last] of each run of numbers without a gap, rising."""
    first = last = None
    for number in sorted(numbers):
        if last is not None and number == last + 1:
            last = number
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = number
    if first is not None and last is not None:
        yield first, last


def requests_in(record: LogRecord) -> Iterator[int]:
    """The requests that a shard answers."""
    for first, last in record.text.requests if record.text else ():
        yield from range(first, last + 1)


def prompts_digest(prompts: Sequence[Sequence[tuple[str, str]]]) -> str:
    """SHA-256 (hex) of what is asked: (role, content) of each turn of each prompt, in order."""
    digest = hashlib.sha256()
    for turns in prompts:
        digest.update(json.dumps([list(turn) for turn in turns]).encode() + b"\n")
    return digest.hexdigest()

"""The records of the commit log, as JSON that carries its own hash (storage.md, step 4)."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

VERSION = 2
"""Of the records that are written. Raised whenever a reader of the former one could not read them."""
_HASH_FIELD = "sha256"
# Fields of version 2. Left out where they say nothing, so that a record of version 1 keeps its hash.
_ABSENT_IF_EMPTY = ("run", "config", "restart")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class RecordUnreadable(ValueError):
    """Bytes in a slot that are no record: torn, altered, or of an unknown kind."""


class RecordTooNew(RecordUnreadable):
    """A whole record, of a version that this program does not know.

    `version` is the record's and `trainer_version` the program's that wrote it, as far as it says.
    """

    def __init__(self, version: int, trainer_version: str) -> None:
        super().__init__(
            f"record of version {version}, written by kubedistill {trainer_version}; this program "
            f"reads versions up to {VERSION}"
        )
        self.version = version
        self.trainer_version = trainer_version


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ShardRecord(_Strict):
    """One object of a checkpoint, as it was when it left the rank that wrote it."""

    path: str = Field(min_length=1)
    """Relative to the commit's `data`."""
    rank: Count
    """The rank that wrote it and that needs it …"""
    shared: bool
    """… or every rank does."""
    size_bytes: Count
    sha256: Sha256
    crc32c: list[Annotated[int, Field(ge=0, lt=2**32)]]
    """Of each 16 MiB part in order, the last one shorter."""


class _Record(_Strict):
    version: Literal[1, 2] = 2
    nonce: str = Field(min_length=16)
    """Made anew for each record: it tells one's own write from another's."""
    fence: Count
    attempt: str
    trainer_version: str
    time: str
    """ISO 8601, UTC, for people. Clocks differ, so nothing is decided by it."""
    run: str = ""
    """The job that the log is of, as `<namespace>/<name>/<uid>`; empty where nobody said."""
    restart: Count = 0
    """Starts of the ranks within the attempt before these; they have its fence too."""

    @property
    def epoch(self) -> tuple[int, int]:
        """What orders writers: attempts by their fence, starts within one by their number."""
        return self.fence, self.restart


class Fence(_Record):
    """An attempt takes the run over; lower fences may not write after it."""

    kind: Literal["FENCE"] = "FENCE"


class Commit(_Record):
    """A checkpoint: whole, and usable from the moment this record is there."""

    kind: Literal["COMMIT"] = "COMMIT"
    step: Count
    world_size: Annotated[int, Field(ge=1)]
    data: str = Field(min_length=1)
    """Prefix of the shards below the run's prefix: data/e<fence>/s<step>/<uuid>."""
    shards: list[ShardRecord] = Field(min_length=1)
    cursor: dict[str, JsonValue]
    """Positions in the data and in the teacher stream."""
    config_digest: str
    config: dict[str, JsonValue] = {}
    """What the digest is of, by name (`training.learningRate`), so that a change can be named."""

    @property
    def size_bytes(self) -> int:
        """Of all shards."""
        return sum(shard.size_bytes for shard in self.shards)


class Reject(_Record):
    """A commit failed its verification; it is never tried again."""

    kind: Literal["REJECT"] = "REJECT"
    sequence: Count
    """The slot of the commit."""
    reason: str


class Retire(_Record):
    """Commits whose shards are deleted after this record is there."""

    kind: Literal["RETIRE"] = "RETIRE"
    sequences: list[Count] = Field(min_length=1)
    data: list[str]
    """Prefixes of what is deleted, so that a clean-up that was cut short can be finished."""


Record = Fence | Commit | Reject | Retire
_ANY: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def encode(record: Record) -> bytes:
    """Canonical JSON with the SHA-256 of everything else as field `sha256`."""
    fields = _fields(record)
    return _canonical(fields | {_HASH_FIELD: _digest(fields)})


def digest(record: Record) -> str:
    """The record's own hash, in hexadecimal."""
    return _digest(_fields(record))


def decode(data: bytes) -> Record:
    """The record in `data`. Raises RecordUnreadable unless its hash is right and its kind known.

    A record whose hash is right and whose version is higher raises RecordTooNew: it is whole.
    JSON is all it takes: nothing in a log is ever unpickled or run.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordUnreadable(f"not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise RecordUnreadable("not a JSON object")
    stated = fields.pop(_HASH_FIELD, None)
    # Of what holds a NaN or an infinity there is no hash, not even an empty one.
    if not stated or stated != _digest(fields):
        raise RecordUnreadable("its own hash does not fit its content")
    if isinstance(written := fields.get("version"), int) and written > VERSION:
        raise RecordTooNew(written, str(fields.get("trainer_version", "of unknown version")))
    try:
        # By way of JSON, where strictness allows what JSON cannot tell apart (a list, a tuple).
        return _ANY.validate_json(_canonical(fields))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "record"
        raise RecordUnreadable(f"{where}: {first['msg']}") from error


def _fields(record: Record) -> dict[str, Any]:
    fields = record.model_dump(mode="json")
    for name in _ABSENT_IF_EMPTY:
        if not fields.get(name):
            fields.pop(name, None)
    return fields


def _canonical(fields: dict[str, Any]) -> bytes:
    text = json.dumps(
        fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode()


def _digest(fields: dict[str, Any]) -> str:
    try:
        return hashlib.sha256(_canonical(fields)).hexdigest()
    except ValueError:  # NaN or infinity, which is no JSON
        return ""

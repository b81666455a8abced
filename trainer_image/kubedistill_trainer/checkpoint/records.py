"""Records of the commit log: JSON, each with a hash of itself."""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Kind = Literal["FENCE", "COMMIT", "REJECT", "RETIRE"]


class BadRecord(ValueError):
    """A slot's bytes are no record: torn, changed, or of another format."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    """One file of one rank, as it was uploaded."""

    key: str
    rank: int
    name: str
    size_bytes: int
    sha256: str
    crc32c: tuple[int, ...]
    """CRC-32C of each 16 MiB, so that a ranged read can be checked too."""


class Record(_Frozen):
    """One slot. Fields that a kind does not use keep their defaults."""

    kind: Kind
    nonce: str = Field(default_factory=lambda: uuid.uuid4().hex)
    fence: int
    attempt: str
    time: str
    version: str
    # COMMIT
    step: int = 0
    world_size: int = 0
    config_digest: str = ""
    tag: str = ""
    cursor: dict[str, Any] = {}
    rng: tuple[dict[str, Any], ...] = ()
    """Generator states by rank."""
    shards: tuple[Shard, ...] = ()
    # REJECT and RETIRE
    slots: tuple[int, ...] = ()
    reason: str = ""

    def encode(self) -> bytes:
        """JSON with `hash`: SHA-256 (hex) of the canonical JSON without it."""
        content = self.model_dump(mode="json")
        return json.dumps({**content, "hash": _hash(content)}, sort_keys=True).encode()

    @property
    def digest(self) -> str:
        return _hash(self.model_dump(mode="json"))

    @classmethod
    def decode(cls, body: bytes) -> Record:
        """Raises BadRecord for whatever is not exactly a record with its own hash."""
        try:
            content = json.loads(body)
            claimed = content.pop("hash")
            record = cls.model_validate(content)
        except (ValueError, ValidationError, KeyError, AttributeError, TypeError) as error:
            raise BadRecord(str(error).splitlines()[0]) from error
        if record.digest != claimed:
            raise BadRecord(f"its hash is {record.digest[:12]}, it claims {str(claimed)[:12]}")
        return record


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""What a teacher stream was made from, where it lies, and who may use it.

```
<storage.uri>/streams/<digest of the identity>/
  manifest.json                        identity and layout, written once by the first writer
  head/<sha256>.safetensors            the teacher's LM head, for Hidden
  partitions/<p>/log/<slot>.json       one record a slot, written once
  partitions/<p>/shards/<uuid>.shard   named by a log record, or an orphan
  partitions/<p>/repairs/<slot>/…      shards that were damaged and written again (`repairs.py`)
```
Sample i belongs to partition i mod P, so that the first shards of all partitions together are the
first samples of the data and students can start on them; contiguous ranges would make them wait
for whole partitions. P is a matter of layout and not of identity: the same request finds the
stream whatever number of pods wrote it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, TypeVar

from kubedistill_api.status import PayloadProbe
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import NotFound, PreconditionFailed
from kubedistill_trainer.teacher.errors import StreamCorrupt, StreamMismatch
from kubedistill_trainer.teacher.payload_spec import PayloadSpec, SparseSpec
from kubedistill_trainer.teacher.shard import FORMAT_VERSION

MANIFEST_KEY = "manifest.json"
Digest = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Identity(_Frozen):
    """Everything that decides what a stream says; two equal identities share one stream."""

    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        return hashlib.sha256(_canonical(self.model_dump(mode="json"))).hexdigest()

    @property
    def address(self) -> str:
        """Prefix of the stream under the storage URI."""
        return f"streams/{self.digest()}"


class StreamIdentity(Identity):
    """Of a teacher's distributions over the packed data: it decides their bytes."""

    format_version: int = FORMAT_VERSION
    teacher_digest: Digest
    tokenizer_digest: Digest
    chat_template_digest: str = ""
    teacher_vocab_size: int = Field(ge=1)
    """Rows of the teacher's LM head, padding included."""
    visible_vocab_size: int = Field(ge=1)
    """Ids that the student knows too; the teacher's entries from here on count as −inf."""
    hidden_size: int = Field(ge=0)
    """0 where it is not known, as of a teacher behind a server."""
    dataset_digest: Digest
    packing_digest: Digest
    sequence_length: int = Field(ge=1)
    """Positions of every sample."""
    payloads: tuple[PayloadSpec, ...] = Field(min_length=1, max_length=2)
    """With the temperature grid inside Sparse: Hidden serves every T from one stream."""
    seed: int = 0
    license_spdx: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> StreamIdentity:
        if self.visible_vocab_size > self.teacher_vocab_size:
            raise ValueError(
                f"visible_vocab_size {self.visible_vocab_size} exceeds "
                f"teacher_vocab_size {self.teacher_vocab_size}"
            )
        kinds = [payload.kind for payload in self.payloads]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"payloads {kinds} name a kind twice")
        for payload in self.payloads:
            if isinstance(payload, SparseSpec) and payload.k > self.visible_vocab_size:
                raise ValueError(f"k {payload.k} exceeds the vocabulary {self.visible_vocab_size}")
        return self


class Layout(_Frozen):
    """A manifest of any stream: the identity, and in how many parts it is written."""

    identity: Identity
    partitions: int = Field(ge=1, le=65535)


class Origin(_Frozen):
    """The server that a stream's log-probabilities come from; they are its own at `temperature`."""

    url: str
    model: str
    way: str
    """What it was asked for: `prompt_logprobs` or `echo`."""
    temperature: float = 1.0


class Manifest(Layout):
    """`manifest.json`: the identity, and how its samples are laid out."""

    identity: StreamIdentity
    samples: int = Field(ge=1)
    """Samples of the whole stream, 0 … samples − 1."""
    head_sha256: str | None = None
    """Names `head/<sha256>.safetensors`; set when a payload is Hidden."""
    probe: tuple[PayloadProbe, ...] = ()
    """What `payload: Auto` measured before it chose this payload."""
    origin: Origin | None = None
    """None for a teacher that ran in pods of its own."""

    def partition_of(self, sample: int) -> int:
        """The partition that holds `sample`."""
        return sample % self.partitions

    def samples_of(self, partition: int) -> int:
        """How many samples `partition` will have when it is complete."""
        return len(range(partition, self.samples, self.partitions))

    def sample_at(self, partition: int, position: int) -> int:
        """Sample id of the `position`-th sample of `partition`."""
        return partition + position * self.partitions


AnyLayout = TypeVar("AnyLayout", bound=Layout)


def check_identity(found: Identity, wanted: Identity) -> None:
    """Raise StreamMismatch naming the first field in which the two differ."""
    _check_fields(found, wanted, "")


def publish_manifest(store: Store, wanted: AnyLayout) -> AnyLayout:
    """Write `manifest.json` if there is none; the manifest that holds is returned.

    `store` is rooted at the storage URI. A manifest that is already there keeps its `partitions`,
    `probe` and `origin`; StreamMismatch when its identity, samples or head differ.
    """
    stream = store.child(wanted.identity.address)
    body = _canonical(wanted.model_dump(mode="json"))
    try:
        stream.put(MANIFEST_KEY, body, only_if_absent=True)
    except PreconditionFailed:
        found = read_layout(store, wanted.identity, type(wanted))
        if found is None:
            raise
        _check_fields(found, wanted, "", ignore=frozenset({"partitions", "probe", "origin"}))
        return found
    return wanted


def read_manifest(store: Store, wanted: StreamIdentity) -> Manifest | None:
    """The manifest of a stream of distributions, as `read_layout`."""
    return read_layout(store, wanted, Manifest)


def read_layout(store: Store, wanted: Identity, kind: type[AnyLayout]) -> AnyLayout | None:
    """The stream's manifest, None when no writer has come yet.

    StreamMismatch when it is another identity's, StreamCorrupt when it cannot be read.
    """
    stream = store.child(wanted.address)
    try:
        body = stream.get(MANIFEST_KEY)
    except NotFound:
        return None
    try:
        found = kind.model_validate_json(body)
    except ValidationError as error:
        raise StreamCorrupt(stream.uri_of(MANIFEST_KEY), f"not a manifest: {error}") from error
    check_identity(found.identity, wanted)
    return found


def _check_fields(
    found: BaseModel, wanted: BaseModel, path: str, ignore: frozenset[str] = frozenset()
) -> None:
    for name in type(wanted).model_fields:
        here, there = getattr(found, name), getattr(wanted, name)
        if name in ignore or here == there:
            continue
        if isinstance(here, BaseModel) and type(here) is type(there):
            _check_fields(here, there, f"{path}{name}.")
        if isinstance(here, tuple) and isinstance(there, tuple) and len(here) == len(there):
            for index, (a, b) in enumerate(zip(here, there, strict=True)):
                if isinstance(a, BaseModel) and type(a) is type(b):
                    _check_fields(a, b, f"{path}{name}[{index}].")
        raise StreamMismatch(f"{path}{name}", here, there)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

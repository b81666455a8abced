"""An independent reader of checkpoint prefixes: does what is stored keep the protocol?

It shares no code with kubedistill and reads the format as docs/checkpoints.md has it, so that a
mistake in the one is seen by the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
from botocore.exceptions import ClientError

PART_BYTES = 16 * 1024 * 1024
_SLOT = re.compile(r"log/(\d{20})\.json")
_DATA = re.compile(r"(data/e(\d+)/s(\d+)/[^/]+)/.+")
_PIN = re.compile(r"pins/(\d{20})\.json")
_COMMON = {"version", "nonce", "fence", "attempt", "trainer_version", "time", "kind", "sha256"}
_FIELDS = {
    "FENCE": set[str](),
    "COMMIT": {"step", "world_size", "data", "shards", "cursor", "config_digest"},
    "REJECT": {"sequence", "reason"},
    "RETIRE": {"sequences", "data"},
}


@dataclass(frozen=True)
class Live:
    """A commit that may be loaded."""

    step: int
    fence: int
    data: str
    """SHA-256 over the paths and hashes of its shards."""


@dataclass
class Report:
    violations: list[str] = field(default_factory=list)
    """One sentence each; empty when all is as it must be."""
    live: list[Live] = field(default_factory=list)
    """Oldest first."""


def check(client: Any, bucket: str, prefix: str, collected: bool = False) -> Report:
    """Read every object below `prefix` of `bucket` with a boto3 client.

    `collected`: a clean-up has run after the last write, so no byte may be left that nobody needs.
    """
    return _Reader(client, bucket, prefix.strip("/")).check(collected)


class _Reader:
    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self._client, self._bucket, self._prefix = client, bucket, prefix
        self._report = Report()
        self._keys: dict[str, int] = {}
        self._unreadable: dict[int, str] = {}
        self._records: dict[int, dict[str, Any]] = {}
        self._live: dict[int, dict[str, Any]] = {}
        self._rejected: dict[int, dict[str, Any]] = {}
        self._retired: dict[int, str] = {}

    def check(self, collected: bool) -> Report:
        self._keys = self._list()
        slots = sorted(int(m.group(1)) for key in self._keys if (m := _SLOT.fullmatch(key)))
        for number, slot in enumerate(slots):
            if number != slot:
                self._unreadable[number] = "is empty"
                self._say(f"slot {number} is empty and slot {slot} is not")
                break
        for slot in slots:
            self._read_record(slot)
        self._replay()
        for slot, problem in self._unreadable.items():
            if slot not in self._rejected and problem != "is empty":
                self._say(f"slot {slot} {problem}")
        for slot, commit in self._live.items():
            self._check_data(slot, commit)
        self._check_bytes(collected)
        return self._report

    def _say(self, sentence: str) -> None:
        self._report.violations.append(sentence)

    def _list(self) -> dict[str, int]:
        found: dict[str, int] = {}
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}/"):
            for item in page.get("Contents", []):
                found[item["Key"][len(self._prefix) + 1 :]] = item["Size"]
        return found

    def _get(self, key: str) -> Any:
        return self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{key}")["Body"]

    def _read_record(self, slot: int) -> None:
        body = self._get(f"log/{slot:020d}.json").read()
        try:
            fields = json.loads(body)
        except ValueError:
            fields = None
        if problem := _record_problem(fields):
            self._unreadable[slot] = problem
        else:
            self._records[slot] = fields

    def _replay(self) -> None:
        fence, attempt, nonces, runs = -1, None, dict[str, int](), set[str]()
        for slot, record in sorted(self._records.items()):
            kind = record["kind"]
            if (other := nonces.setdefault(record["nonce"], slot)) != slot:
                self._say(f"slots {other} and {slot} hold one nonce")
            runs.add(record.get("run", ""))
            if kind == "FENCE":
                if record["fence"] <= fence:
                    what = f"FENCE {record['fence']} behind FENCE {fence}"
                    self._say(f"slot {slot} is a {what}: the history is not linear")
                    continue
                fence, attempt = record["fence"], record["attempt"]
            elif (record["fence"], record["attempt"]) != (fence, attempt):
                what = f"a {kind} of fence {record['fence']}, attempt {record['attempt']!r}"
                self._say(f"slot {slot} is {what}; in force was {fence} of {attempt!r}")
            else:
                self._apply(slot, record)
        if len(runs - {""}) > 1:
            self._say(f"the log is of several runs: {', '.join(sorted(runs - {''}))}")

    def _apply(self, slot: int, record: dict[str, Any]) -> None:
        if record["kind"] == "COMMIT":
            known = [*self._live.values(), *self._rejected.values()]
            if any(commit["data"] == record["data"] for commit in known):
                self._say(f"slot {slot} commits {record['data']}, which is committed already")
            if self._live and record["step"] <= max(c["step"] for c in self._live.values()):
                self._say(f"slot {slot} commits step {record['step']}, and a later one is live")
            self._live[slot] = record
        elif record["kind"] == "REJECT":
            rejected = record["sequence"]
            if rejected in self._live:
                self._rejected[rejected] = self._live.pop(rejected)
            elif rejected in self._unreadable:  # seen, and passed over by who resumed
                self._rejected[rejected] = {"data": ""}
        else:
            for retired in record["sequences"]:
                commit = self._live.pop(retired, None) or self._rejected.pop(retired, None)
                if commit is None:
                    self._say(f"slot {slot} retires slot {retired}, which is no usable commit")
                else:
                    self._retired[retired] = commit["data"]

    def _check_data(self, slot: int, commit: dict[str, Any]) -> None:
        whole = hashlib.sha256()
        before = len(self._report.violations)
        for shard in sorted(commit["shards"], key=lambda shard: str(shard["path"])):
            key = f"{commit['data']}/{shard['path']}"
            if key not in self._keys:
                self._say(f"slot {slot} is live and {key} is missing")
                continue
            self._check_shard(slot, key, shard)
            whole.update(f"{shard['path']}\0{shard['sha256']}\n".encode())
        if len(self._report.violations) == before:
            live = Live(commit["step"], commit["fence"], whole.hexdigest())
            self._report.live.append(live)

    def _check_shard(self, slot: int, key: str, shard: dict[str, Any]) -> None:
        at = f"slot {slot} is live and {key}"
        try:
            body = self._get(key)
        except ClientError as error:
            self._say(f"{at} cannot be read ({error.response['Error']['Code']})")
            return
        whole, crcs, size_bytes = hashlib.sha256(), list[int](), 0
        while part := _read_part(body):
            whole.update(part)
            crcs.append(google_crc32c.value(part))
            size_bytes += len(part)
        if size_bytes != shard["size_bytes"]:
            self._say(f"{at} has {size_bytes} bytes instead of {shard['size_bytes']}")
        elif crcs != shard["crc32c"]:
            self._say(f"{at} has another CRC32C than was committed")
        elif whole.hexdigest() != shard["sha256"]:
            self._say(f"{at} has another SHA-256 than was committed")

    def _check_bytes(self, collected: bool) -> None:
        pinned = {int(m.group(1)) for key in self._keys if (m := _PIN.fullmatch(key))}
        needed = {c["data"] for c in [*self._live.values(), *self._rejected.values()]}
        needed |= {data for slot, data in self._retired.items() if slot in pinned}
        left: dict[str, int] = {}
        for key, size_bytes in self._keys.items():
            if match := _DATA.fullmatch(key):
                if match.group(1) not in needed:
                    left[match.group(1)] = left.get(match.group(1), 0) + size_bytes
            elif not (_SLOT.fullmatch(key) or _PIN.fullmatch(key) or key.startswith("cursor/")):
                self._say(f"{key} is no object of a run")
        # A slot that cannot be read may name any data, which is then kept.
        all_known = collected and not self._unreadable
        for data, size_bytes in sorted(left.items()) if all_known else ():
            self._say(f"{data} is left with {size_bytes} bytes that no commit needs")
        if collected:
            self._check_uploads()

    def _check_uploads(self) -> None:
        pages = self._client.get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=self._bucket, Prefix=f"{self._prefix}/"):
            for upload in page.get("Uploads", []):
                self._say(f"{upload['Key']} is left as an unfinished multipart upload")


def _record_problem(fields: Any) -> str:
    """Why a slot's JSON is no record; empty when it is one."""
    if not isinstance(fields, dict):
        return "is not JSON, or no object"
    if not (fields.keys() >= _COMMON):
        return "is no record"
    said = {name: value for name, value in fields.items() if name != "sha256"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    if hashlib.sha256(text.encode()).hexdigest() != fields["sha256"]:
        return "holds a record whose own hash is wrong"
    if fields["kind"] not in _FIELDS:
        return f"is a {fields['kind']}, which is no kind of record"
    missing = ", ".join(sorted(_FIELDS[fields["kind"]] - fields.keys()))
    return f"is a {fields['kind']} without {missing}" if missing else ""


def _read_part(body: Any) -> bytes:
    """Up to PART_BYTES; a body's read may give less than was asked for."""
    part = bytearray()
    while len(part) < PART_BYTES and (piece := body.read(PART_BYTES - len(part))):
        part += piece
    return bytes(part)

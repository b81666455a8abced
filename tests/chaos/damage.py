"""What happens to stored bytes between two attempts, and what the next attempt must find instead."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from chaos.store_bench import StoreBench


@dataclass(frozen=True)
class Commit:
    """A live commit of a run, as its record has it."""

    slot: str
    """Key of the record."""
    step: int
    shards: list[str]
    """Keys of its shards."""


def commits(bench: StoreBench, name: str) -> list[Commit]:
    """What may be loaded, oldest first."""
    prefix = bench.gang.prefix(name)
    records: dict[int, tuple[str, dict[str, Any]]] = {}
    gone: set[int] = set()
    for key, body in sorted(bench.log_of(name).items()):
        record = json.loads(body)
        records[int(key.rsplit("/", 1)[1].split(".")[0])] = key, record
        gone |= set(record.get("sequences", [])) if record["kind"] == "RETIRE" else set()
    return [
        Commit(
            key,
            record["step"],
            [f"{prefix}/{record['data']}/{shard['path']}" for shard in record["shards"]],
        )
        for slot, (key, record) in sorted(records.items())
        if record["kind"] == "COMMIT" and slot not in gone
    ]


def damage(bench: StoreBench, kind: str, commit: Commit, draw: random.Random) -> str:
    """Damage a commit; says what was done."""
    client, bucket = bench.s3.client(), bench.s3.bucket

    def read(key: str) -> bytes:
        return client.get_object(Bucket=bucket, Key=key)["Body"].read()

    def write(key: str, body: bytes) -> None:
        client.put_object(Bucket=bucket, Key=key, Body=body)

    shard = draw.choice(commit.shards)
    if kind == "flipped bit":
        body = bytearray(read(shard))
        body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
        write(shard, bytes(body))
    elif kind == "missing shard":
        client.delete_object(Bucket=bucket, Key=shard)
    elif kind == "swapped shards":
        mine = [key for key in commit.shards if "optim" in key]
        first, second = read(mine[0]), read(mine[1])
        write(mine[0], second)
        write(mine[1], first)
        shard = f"{mine[0]} and {mine[1]}"
    elif kind == "shorter shard":
        write(shard, read(shard)[:-1])
    else:
        shard, body = commit.slot, bytearray(read(commit.slot))
        if kind == "torn record":
            write(shard, bytes(body[: draw.randrange(1, len(body))]))
        else:
            body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
            write(shard, bytes(body))
    return f"{kind}: {shard}"


OF_RECORDS = ("torn record", "flipped bit in the record")
KINDS = ("flipped bit", "missing shard", "swapped shards", "shorter shard", *OF_RECORDS)

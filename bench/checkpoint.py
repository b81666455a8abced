"""What a checkpoint costs training, and how fast it goes to the store and comes back.

A Llama-shaped student under DeepSpeed (ZeRO-1, bf16, AdamW: 14 bytes a parameter), one rank, against
a SeaweedFS server on this machine. Peers, in the same run and round by round:
- a blocking save: DeepSpeed's own save_checkpoint to memory-backed disk, then boto3's upload_file;
- s5cmd and `aws s3 cp` for the same bytes (https://github.com/peak/s5cmd; AWS's CLI).

    uv run python bench/checkpoint.py [--quick] [--json]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import boto3
import torch
from kit.common import Measure, arguments, note, report, student, timed

# A benchmark is started by its path alone: the S3 server is found from here.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from devcluster.process import free_port  # noqa: E402
from devcluster.s3 import S3Access, S3Server  # noqa: E402
from kubedistill_api.training import Training  # noqa: E402
from kubedistill_trainer.checkpoint import Checkpointer, shards  # noqa: E402
from kubedistill_trainer.checkpoint.records import ShardRecord  # noqa: E402
from kubedistill_trainer.checkpoint.staged import Staged  # noqa: E402
from kubedistill_trainer.methods.engine import join_gang, wrap  # noqa: E402
from kubedistill_trainer.methods.student import StudentWithLoss  # noqa: E402
from kubedistill_trainer.store import Store  # noqa: E402

GOAL_STALL, GOAL_THROUGHPUT = 1 / 50, 0.95
MIB = 1 << 20
SHAPES = {False: (12, 768, 12, 32_000, 5), True: (4, 512, 8, 16_000, 2)}
"""Layers, width, heads, vocabulary and rounds; with --quick."""


def aws_program() -> str:
    """The AWS CLI in an environment of its own: it wants another botocore than the trainer."""
    find = "import shutil; print(shutil.which('aws'))"
    uv = os.environ.get("UV", "uv")
    command = [uv, "tool", "run", "--from", "awscli", "python", "-c", find]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def engine_of(layers: int, width: int, heads: int, vocab_size: int) -> Any:
    """A DeepSpeed engine that has made one step, so that the optimizer has its state."""
    join_gang("127.0.0.1", free_port(), 0, 1, 0)
    model = student(layers, width, heads, heads, vocab_size).to(torch.bfloat16)
    training = Training.model_validate({"globalBatchSize": 1, "microBatchSize": 1})
    engine = wrap(StudentWithLoss(model, None, vocab_size), training, 1, 1)
    tokens = torch.randint(0, vocab_size, (1, 32))
    positions = torch.arange(32).expand_as(tokens)
    engine.backward(engine(tokens, positions, tokens, None, 32.0).total)
    engine.step()
    return engine


@contextmanager
def requests_of(store: Store) -> Iterator[Counter[str]]:
    """Counts the requests that a store sends, by operation."""
    counts: Counter[str] = Counter()
    events: Any = store._connection.client.meta.events

    def count(event_name: str, **_: Any) -> None:
        counts[event_name.rpartition(".")[2]] += 1

    events.register("before-send.s3", count)
    yield counts
    events.unregister("before-send.s3", count)


def blocking_save(engine: Any, client: Any, bucket: str, folder: Path) -> None:
    """DeepSpeed and boto3 as they come."""
    shutil.rmtree(folder, ignore_errors=True)
    engine.save_checkpoint(str(folder), tag="peer", save_latest=False)
    for file in sorted(folder.rglob("*.pt")):
        client.upload_file(str(file), bucket, f"peer/{file.name}")


def saves(s3: S3Access, engine: Any, rounds: int, scratch: Path) -> list[Measure]:
    """Stall against a blocking save, and what a commit asks of the store."""
    store = Store(f"s3://{s3.bucket}/run", endpoint=s3.endpoint)
    checkpointer = Checkpointer(
        store=store, scratch=scratch / "ours", fence=1, attempt="bench", rank=0, world_size=1,
        config_digest="bench", keep_last=1, control_group=None,
    )  # fmt: skip
    checkpointer.open()
    client = boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")
    stalls, whole, peer = list[float](), list[float](), list[float]()
    with requests_of(store) as counts:
        for number in range(rounds + 1):
            info = checkpointer.save(engine, step=number, cursor={})
            stalls.append(info.stall_seconds)
            whole.append(info.duration_seconds)
            peer.append(timed(lambda: blocking_save(engine, client, s3.bucket, scratch / "peer")))
    size = info.size_bytes
    # The first snapshot also pays for its memory's pages: once a run, and told beside the others.
    stall, first, blocking = median(stalls[1:]), stalls[0], median(peer[1:])
    name = "DeepSpeed + boto3, blocking"
    requests = sum(counts.values()) / (rounds + 1)
    shard_count = 3
    return [
        Measure("state", size / MIB, "MiB"),
        Measure(
            "stall of a save", stall, "s", name, blocking,
            f"≤ {GOAL_STALL:.2f} ×", stall / blocking <= GOAL_STALL,
        ),
        Measure("stall of the first save", first, "s", name, peer[0]),
        Measure("snapshot to commit", median(whole[1:]), "s", name, blocking),
        Measure(f"requests a checkpoint of {shard_count} shards", requests, "requests"),
        *(
            Measure(f"of these {operation}", count / (rounds + 1), "requests")
            for operation, count in sorted(counts.items())
        ),
    ]  # fmt: skip


def throughput(s3: S3Access, size_mib: int, rounds: int, scratch: Path) -> list[Measure]:
    """One shard up and down, against tools that only copy."""
    file, down = scratch / "shard", scratch / "down"
    with file.open("wb") as out:
        for _ in range(size_mib // 16):
            out.write(os.urandom(16 * MIB))
    store = Store(f"s3://{s3.bucket}/copies", endpoint=s3.endpoint)
    receipts: list[ShardRecord] = []
    remote = f"s3://{s3.bucket}/peer-shard"

    def up() -> None:
        staged = Staged("shard", file.stat().st_size, lambda: file.open("rb"))
        receipts[:] = shards.upload(store, [staged], rank=0)

    def run(*command: str) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    s5 = ["s5cmd", "--endpoint-url", s3.endpoint, "cp"]
    aws = [aws_program(), "--endpoint-url", s3.endpoint, "s3", "cp", "--quiet"]
    ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "ours": (up, lambda: shards.download(store, receipts[0], down)),
        "s5cmd": (lambda: run(*s5, str(file), remote), lambda: run(*s5, remote, str(down))),
        "aws s3 cp": (lambda: run(*aws, str(file), remote), lambda: run(*aws, remote, str(down))),
    }
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for round_ in range(rounds + 1):
        for name, pair in ways.items():
            for direction in (0, 1):
                seconds = timed(pair[direction])
                down.unlink(missing_ok=True)
                if round_:
                    rates[name][direction].append(size_mib / seconds)
    found = []
    for direction, word in enumerate(("upload", "download")):
        ours = median(rates["ours"][direction])
        for name in ("s5cmd", "aws s3 cp"):
            theirs = median(rates[name][direction])
            found.append(
                Measure(
                    f"{word} of one shard, hashed", ours, "MiB/s", name, theirs,
                    f"≥ {GOAL_THROUGHPUT} ×", ours / theirs >= GOAL_THROUGHPUT,
                )
            )  # fmt: skip
    return found


def main() -> None:
    args = arguments(str(__doc__))
    *shape, rounds = SHAPES[args.quick]
    torch.set_num_threads(os.cpu_count() or 1)
    # Memory-backed: the peers' disk must not be what is measured.
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir="/dev/shm"))
    server = S3Server(Path(tempfile.mkdtemp(prefix="s3-")))
    server.start()
    access = server.access
    os.environ |= {
        "AWS_ACCESS_KEY_ID": access.access_key, "AWS_SECRET_ACCESS_KEY": access.secret_key,
        "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    try:
        started = time.perf_counter()
        note("copies", as_json=args.json)
        measures = throughput(access, 64 if args.quick else 1024, rounds, scratch)
        note("saves", as_json=args.json)
        measures = saves(access, engine_of(*shape), rounds, scratch) + measures
        note(f"{time.perf_counter() - started:.0f} s", as_json=args.json)
    finally:
        server.stop()
        shutil.rmtree(scratch, ignore_errors=True)
    report(measures, as_json=args.json)


if __name__ == "__main__":
    main()

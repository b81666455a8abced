"""`python -m kubedistill_trainer.checkpoint`: look at a run's checkpoints, and pin them.

Exit codes: 0 good, 1 something is damaged, 2 wrong usage or the store cannot be read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from kubedistill_trainer.checkpoint import pins
from kubedistill_trainer.checkpoint.errors import CheckpointError, NotPinnable
from kubedistill_trainer.checkpoint.history import Slot
from kubedistill_trainer.checkpoint.inspection import Tell, inspect, runs_below
from kubedistill_trainer.checkpoint.inspection_view import WIDTH, as_json, bytes_text, show
from kubedistill_trainer.checkpoint.log import CommitLog
from kubedistill_trainer.checkpoint.records import (
    Commit,
    RecordUnreadable,
    ShardRecord,
    decode,
)
from kubedistill_trainer.store import S3Uri, Store, StoreError

GOOD, DAMAGED, UNUSABLE = 0, 1, 2
_INTERRUPTED = 130


class _WrongPlace(Exception):
    """The prefix holds no log; the text says what it holds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Every failure is a line on stderr, never a traceback."""
    asked = _parser().parse_args(arguments)
    try:
        return _run(asked)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return GOOD
    except (StoreError, CheckpointError, _WrongPlace) as error:
        print(f"error: {error}", file=sys.stderr)
    except Exception as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    return UNUSABLE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kubedistill_trainer.checkpoint", description="A run's checkpoints in S3."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("inspect", "the commit log, what is live, damaged and left over; writes nothing"),
        ("list", "the commits that can be loaded"),
        ("pin", "keep a commit's data until it is unpinned"),
        ("unpin", "let the retention decide again"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("uri", help="s3://bucket/prefix of the run")
        command.add_argument("--endpoint", default="", help="of the S3 server; without it: AWS")
        command.add_argument("--region", default="us-east-1")
        if name == "inspect":
            command.add_argument("--deep", action="store_true", help="read and hash every byte")
        if name in ("inspect", "list"):
            command.add_argument("--json", action="store_true", help="for programs")
        else:
            which = command.add_mutually_exclusive_group(required=True)
            which.add_argument("sequence", nargs="?", type=_slot, help="slot of the commit")
            which.add_argument("--step", type=_slot, help="its newest commit")
    return parser


def _slot(text: str) -> int:
    if not text.isdecimal() or len(text) > 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return int(text)


def _run(asked: argparse.Namespace) -> int:
    store = _at_run(asked.uri, asked.endpoint, asked.region)
    if asked.command == "inspect":
        return _inspect(store, deep=asked.deep, json_wanted=asked.json)
    if asked.command == "list":
        return _list(store, json_wanted=asked.json)
    log = CommitLog(store)
    log.read_to_end()
    sequence = asked.sequence if asked.step is None else _slot_of_step(log, store, asked.step)
    if asked.command == "pin":
        commit = pins.pin(store, log, sequence).record
        print(f"pinned slot {sequence}: step {commit.step}, {bytes_text(commit.size_bytes)}")
    elif pins.is_pinned(store, sequence):
        pins.unpin(store, sequence)
        print(f"unpinned slot {sequence}; the run's next clean-up may delete its data")
    else:
        raise NotPinnable(f"{store.uri}: slot {sequence} is not pinned; pinned: {_pinned(store)}")
    return GOOD


def _inspect(store: Store, *, deep: bool, json_wanted: bool) -> int:
    with _telling(store, deep=deep) as tell:
        found = inspect(store, deep=deep, tell=tell)
    if json_wanted:
        print(json.dumps(as_json(found), indent=2))
    else:
        console = Console(highlight=False)
        console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
        show(found, console)
    return DAMAGED if found.findings else GOOD


def _list(store: Store, *, json_wanted: bool) -> int:
    log = CommitLog(store)
    log.read_to_end()
    pinned = set(pins.pinned(store))
    rows = [
        {
            "slot": commit.sequence,
            "step": commit.record.step,
            "fence": commit.record.fence,
            "sizeBytes": commit.record.size_bytes,
            "time": commit.record.time,
            "pinned": commit.sequence in pinned,
            "uri": store.uri_of(commit.record.data),
        }
        for commit in log.commits()
    ]
    if json_wanted:
        print(json.dumps(rows, indent=2))
        return GOOD
    for row, commit in zip(rows, log.commits(), strict=True):
        size = bytes_text(commit.record.size_bytes)
        pin = "  pinned" if row["pinned"] else ""
        print(f"slot {row['slot']:>4}  step {row['step']:>8}  {size:>10}  {row['time']}{pin}")
    if not rows:
        print("no commit that can be loaded")
    return GOOD


def _slot_of_step(log: CommitLog, store: Store, step: int) -> int:
    commits = log.commits()
    found = [commit.sequence for commit in commits if commit.record.step == step]
    # A commit that was pinned and retired can still be unpinned, by its step too.
    slots = [(s.entry.sequence, s.entry.record) for s in log.history()]
    found = found or [
        n for n, r in slots if isinstance(r, Commit) and r.step == step and pins.is_pinned(store, n)
    ]
    if not found:
        steps = ", ".join(str(commit.record.step) for commit in commits) or "none"
        raise NotPinnable(f"{store.uri}: no usable commit of step {step}; there are: {steps}")
    return found[-1]


def _pinned(store: Store) -> str:
    return ", ".join(map(str, pins.pinned(store))) or "none"


def _at_run(uri: str, endpoint: str, region: str) -> Store:
    """The store at the one run at, below or beside `uri` (a job's folder lacks its run's uid)."""
    store = Store(uri, endpoint=endpoint, region=region)
    if next(iter(store.list("log/")), None) is not None:
        return store
    runs = runs_below(store) or _runs_beside(store, endpoint, region)
    if len(runs) == 1:
        print(f"the run is {runs[0]}", file=sys.stderr)
        return Store(runs[0], endpoint=endpoint, region=region)
    if runs:
        raise _WrongPlace(
            f"{store.uri}: {len(runs)} runs are here; give one of them:\n  " + "\n  ".join(runs)
        )
    count = sum(1 for _ in store.list())
    holds = f"{count} objects and no commit log" if count else "nothing"
    raise _WrongPlace(f"{store.uri}: holds {holds}; give the prefix of a run (status.checkpoint)")


def _runs_beside(store: Store, endpoint: str, region: str) -> list[str]:
    """Runs of the job whose folder this is: `<name>-<uid>` beside `<name>`."""
    folder, _, name = store.prefix.rpartition("/")
    if not name:
        return []
    parent = Store(str(S3Uri(store.bucket, folder)), endpoint=endpoint, region=region)
    first: dict[str, str] = {}  # a slot of each
    for info in parent.list(f"{name}-"):
        prefix, log, _ = info.key.partition("/log/")
        if log and "/" not in prefix:
            first.setdefault(prefix, info.key)
    # `<name>-` begins other jobs' names too: the record says whose it is.
    return [parent.uri_of(p) for p, key in first.items() if _may_be_of(parent, key, name)]


def _may_be_of(store: Store, key: str, name: str) -> bool:
    """Whether the record of that key is of a job of this name, as far as it says."""
    try:
        run = decode(store.get(key)).run
    except RecordUnreadable:
        return True
    return not run or run.split("/")[1:2] == [name]


@contextmanager
def _telling(store: Store, *, deep: bool) -> Iterator[Tell | None]:
    """How far a deep check is: a bar on a terminal, a line a commit elsewhere, both on stderr."""
    console = Console(stderr=True, highlight=False)
    if not deep:
        yield None
    elif not console.is_terminal:
        yield _line
    else:
        log = CommitLog(store)
        log.read_to_end()
        total = sum(commit.record.size_bytes for commit in log.commits())
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
        with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as bar:
            task = bar.add_task("verifying", total=total)
            yield lambda _slot, _shard, size_bytes: bar.advance(task, size_bytes)


def _line(slot: Slot, shard: ShardRecord | None, _size_bytes: int) -> None:
    commit = slot.entry.record
    if shard is None and isinstance(commit, Commit):
        size = bytes_text(commit.size_bytes)
        print(f"step {commit.step}: {len(commit.shards)} shards, {size}, good", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

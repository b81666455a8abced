"""What records mean together, as a table."""

from __future__ import annotations

from typing import Any

import pytest
from kubedistill_trainer.checkpoint.history import Entry, replay, run_of, slot_key, slot_of
from kubedistill_trainer.checkpoint.records import Commit, Fence, Reject, Retire, ShardRecord

SHARD = ShardRecord(path="x", rank=0, shared=False, size_bytes=1, sha256="0" * 64, crc32c=[0])


def stamp(fence: int, run: str = "", attempt: str = "") -> dict[str, Any]:
    return {
        "nonce": "0" * 32, "fence": fence, "attempt": attempt or f"a{fence}", "run": run,
        "trainer_version": "", "time": "",
    }  # fmt: skip


def fence(number: int, **who: str) -> Fence:
    return Fence(**stamp(number, **who))


def commit(number: int, **who: str) -> Commit:
    return Commit(
        **stamp(number, **who), step=1, world_size=1, data="d", shards=[SHARD], cursor={},
        config_digest="",
    )  # fmt: skip


def reject(number: int, sequence: int) -> Reject:
    return Reject(**stamp(number), sequence=sequence, reason="bad")


def retire(number: int, *sequences: int) -> Retire:
    return Retire(**stamp(number), sequences=list(sequences), data=["d"] * len(sequences))


TORN, NEWER = "torn", "newer"


@pytest.mark.parametrize(
    ("records", "states"),
    [
        ([], ""),
        ([fence(1), commit(1)], "in force, live"),
        ([commit(1)], "fenced out"),
        ([fence(1), commit(1), fence(2), commit(1), commit(2)],
         "over, live, in force, fenced out, live"),
        ([fence(2), fence(1), commit(1), commit(2)], "in force, fenced out, fenced out, live"),
        ([fence(1), fence(1, attempt="twin"), commit(1, attempt="twin")],
         "in force, fenced out, fenced out"),
        ([fence(1), commit(1), reject(1, 1)], "in force, rejected, applied"),
        ([fence(1), commit(1), reject(1, 1), retire(1, 1)],
         "in force, retired, applied, applied"),
        ([fence(1), commit(1), retire(1, 1), reject(1, 1)],
         "in force, retired, applied, applied"),
        ([fence(1), commit(1), fence(2), retire(1, 1), reject(1, 1)],
         "over, live, in force, fenced out, fenced out"),
        # A record says nothing of slots behind it, of itself, or of what is no commit.
        ([fence(1), retire(1, 2, 0, 1, 7), commit(1)], "in force, applied, live"),
        ([fence(1), TORN, commit(1), reject(1, 1)], "in force, rejected, live, applied"),
        ([fence(1), TORN, retire(1, 1)], "in force, unreadable, applied"),
        ([TORN, fence(1), commit(1)], "unreadable, in force, live"),
        ([fence(1), NEWER, reject(1, 1)], "in force, too new, applied"),
        ([fence(1, run="r"), commit(1), commit(1, run="s"), fence(9, run="s"), commit(1, run="r")],
         "in force, live, foreign, foreign, live"),
    ],
)  # fmt: skip
def test_states(records: list[Any], states: str) -> None:
    entries = [
        Entry(n, None, "x", r == NEWER) if isinstance(r, str) else Entry(n, r)
        for n, r in enumerate(records)
    ]
    assert ", ".join(slot.state for slot in replay(entries)) == states


def test_the_log_is_of_the_run_that_first_says_so() -> None:
    entries = [Entry(0, fence(1)), Entry(1, None), Entry(2, fence(2, run="r"))]
    assert run_of(entries) == "r"
    assert run_of(entries[:2]) == ""


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        (slot_key(7), 7), (slot_key(10**19), 10**19), ("log/7.json", -1), ("log/readme", -1),
        ("log/" + "٣" * 20 + ".json", -1), ("log/" + "0" * 20, -1), ("log/" + "0" * 21 + ".json", -1),
        ("x/" + slot_key(1), -1), ("0" * 20, -1),
    ],
)  # fmt: skip
def test_what_is_a_slot(key: str, slot: int) -> None:
    assert slot_of(key) == slot

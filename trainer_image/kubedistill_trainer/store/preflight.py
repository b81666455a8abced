"""Proof that a store can carry the commit protocol, before anything is trusted to it."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import (
    NotFound,
    PreconditionFailed,
    StoreError,
    UnsupportedStore,
)

_RACERS = 8
_REMEDY = (
    "two trainers could both commit; use a store with conditional writes "
    "(AWS S3, SeaweedFS, MinIO, Ceph Squid or later)"
)


def preflight(store: Store) -> None:
    """Prove reach, credentials, bucket, list, write, read, delete and `If-None-Match: *`.

    Works under one unique key below `.preflight/` and removes what it wrote. Raises the error of
    `kubedistill_trainer.store.errors` that fits: UnsupportedStore when a second conditional write
    succeeds, or when a race of conditional writes has two winners.
    """
    probe = store.child(f".preflight/{uuid.uuid4()}")
    # Read before anything is written: SeaweedFS makes a missing bucket on the first PUT to it, and
    # a mistyped name must not become a bucket.
    for _ in probe.list():
        raise UnsupportedStore("list", probe.uri, "a prefix made just now is not empty")
    try:
        _check_write_and_read(probe)
        _check_second_write_fails(probe)
        _check_race_has_one_winner(probe)
    except BaseException:
        with suppress(StoreError):  # the first error says more than what it leads to
            _clean(probe)
        raise
    _clean(probe)


def _check_write_and_read(probe: Store) -> None:
    probe.put("plain", b"first")
    _expect(probe, "plain", b"first")
    _expect(probe, "plain", b"ir", part=(1, 2))
    if [info.key for info in probe.list()] != ["plain"]:
        raise UnsupportedStore(
            "list", probe.uri, "a fresh object is not listed; use a store with consistent lists"
        )


def _check_second_write_fails(probe: Store) -> None:
    # On the key of the plain object: its first write was certainly not conditional.
    with suppress(PreconditionFailed):
        probe.put("plain", b"second", only_if_absent=True)
        raise UnsupportedStore(
            "put",
            probe.uri_of("plain"),
            f"{_server(probe)} ignores If-None-Match, so {_REMEDY}",
        )
    _expect(probe, "plain", b"first")


def _check_race_has_one_winner(probe: Store) -> None:
    start = Barrier(_RACERS)

    def race(number: int) -> int | None:
        start.wait()
        try:
            probe.put("race", str(number).encode(), only_if_absent=True)
        except PreconditionFailed:
            return None
        return number

    with ThreadPoolExecutor(_RACERS) as pool:
        winners = [number for number in pool.map(race, range(_RACERS)) if number is not None]
    held = probe.get("race")
    # No winner at all is sound: the winner's answer may be lost, and its retry then meets a 412.
    if len(winners) > 1 or (winners and held != str(winners[0]).encode()):
        raise UnsupportedStore(
            "put",
            probe.uri_of("race"),
            f"{len(winners)} of {_RACERS} simultaneous conditional writes to one key of "
            f"{_server(probe)} succeeded, so {_REMEDY}",
        )


def _expect(probe: Store, key: str, data: bytes, part: tuple[int, int] | None = None) -> None:
    try:
        found = probe.get_range(key, *part) if part else probe.get(key)
    except NotFound as error:
        raise UnsupportedStore(
            "get", probe.uri_of(key), "a fresh object is not there; use a consistent store"
        ) from error
    if found != data:
        raise UnsupportedStore(
            "get",
            probe.uri_of(key),
            f"holds {found!r} where {data!r} was written; use a store that honours "
            "If-None-Match and Range",
        )


def _server(probe: Store) -> str:
    return probe.endpoint or "the store"


def _clean(probe: Store) -> None:
    probe.delete(["plain", "race"])
    if left := [info.key for info in probe.list()]:
        raise UnsupportedStore("delete", probe.uri, f"{left} are listed after their deletion")

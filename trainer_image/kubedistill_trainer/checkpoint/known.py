"""Records that an earlier process of this pod has read or written, so that nobody fetches them again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from kubedistill_trainer.checkpoint.records import Record, RecordUnreadable, decode, encode


class KnownRecords:
    """Slot → record, kept in a file of the pod's own disk, a line each.

    A slot is written once, so a record that was there stays what it is: ranks that are started again
    in their pod read what is new, however long the log. Nothing depends on the file: what cannot be
    written or read is fetched.
    """

    def __init__(self, file: Path, *, fresh: bool) -> None:
        """`fresh`: what the file holds is of another time, and is left aside."""
        self._file = file
        self._records: dict[int, Record] = {}
        with suppress(OSError):
            if fresh:
                file.unlink(missing_ok=True)
            else:
                self._load()

    @property
    def slots(self) -> frozenset[int]:
        """Slots that hold a record, whatever a list says."""
        return frozenset(self._records)

    def get(self, sequence: int) -> Record | None:
        """The record in a slot, or None where it is not known."""
        return self._records.get(sequence)

    def add(self, sequence: int, record: Record) -> None:
        """This is what the store holds in the slot."""
        if sequence in self._records:
            return
        self._records[sequence] = record
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as lines:
                lines.write(b"%d %s\n" % (sequence, encode(record)))

    def _load(self) -> None:
        for line in self._file.read_bytes().splitlines():
            slot, _, data = line.partition(b" ")
            # A process that is killed leaves half a line.
            with suppress(RecordUnreadable, ValueError):
                self._records[int(slot)] = decode(data)

"""A teacher's answers into one partition of a stream of text, so that a writer can die at any moment.

An answer counts once a shard that holds it is in the partition's log; it is never asked for again.
Answers are committed as they come, in any order. Two writers on one partition (two jobs that ask for
the same at once) are safe: one wins the slot; the other asks for nothing more, keeps what it has been
answered in memory, and stands by while the log grows. It goes on where the winner stops, and commits
first what it had kept and nobody else was answered.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import StoreError
from kubedistill_trainer.teacher.partition_log import (
    LogRecord,
    PartitionLog,
    SlotTaken,
    TextShard,
)
from kubedistill_trainer.teacher.text import TextAnswer
from kubedistill_trainer.teacher.text_manifest import (
    TextManifest,
    encode_shard,
    requests_in,
    shard_facts,
    total_facts,
)

_POLL_SECONDS = 1.0
_LAST_TRIES = 5


@dataclass(frozen=True, slots=True)
class TextSettings:
    """When answers are committed."""

    answers: int = 256
    """At most so many uncommitted answers."""
    first_answers: int = 8
    """The same for a writer's first commit, each next one twice as many: of two writers at once the
    one that comes second learns of it soon."""
    seconds: float = 20.0
    """An answer that waited so long for others is committed with the next one."""
    patience_seconds: float = 180.0
    """A writer that lost a slot goes on when the other has committed nothing for so long."""


@dataclass(frozen=True, slots=True)
class _Sealed:
    """Answers on their way into the log; kept so that a commit can be tried again."""

    answers: dict[int, TextAnswer]
    record: LogRecord
    data: bytes


def text_record(answers: dict[int, TextAnswer], manifest: TextManifest, partition: int) -> _Sealed:
    """The shard of these answers and the record that commits it; its slot is filled in later."""
    data, facts = encode_shard(answers, manifest), shard_facts(answers)
    record = LogRecord(
        kind="SHARD",
        partition=partition,
        slot=0,
        nonce=uuid.uuid4().hex,
        count=len(answers),
        key=f"partitions/{partition}/shards/{uuid.uuid4().hex}.jsonl.zst",
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        tokens=facts.answer_tokens,
        text=facts,
    )
    return _Sealed(answers, record, data)


class TextWriter:
    """Writes one partition. Not thread-safe.

    `store` is rooted at the storage URI; `manifest` is what `publish_manifest` returned;
    `pause(seconds)` is called again and again while another writer is ahead.
    """

    def __init__(
        self,
        store: Store,
        manifest: TextManifest,
        partition: int,
        *,
        settings: TextSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        self._manifest = manifest
        self._partition = partition
        self._stream = store.child(manifest.identity.address)
        self._settings = settings or TextSettings()
        self._clock = clock
        self._pause = pause
        self._log = PartitionLog(self._stream, partition)
        self._known = 0  # slots whose requests are in _done
        self._done: set[int] = set()
        self._waiting: dict[int, TextAnswer] = {}
        self._since = 0.0
        self._sealed: _Sealed | None = None
        self._commits = 0
        self.lost = False
        """Whether another writer is ahead: ask for nothing more, and `stand_by`."""
        self._refresh()

    @property
    def ended(self) -> bool:
        """Whether the partition's END record is there."""
        return self._log.ended

    @property
    def committed(self) -> int:
        """Answers of this partition that are committed."""
        return len(self._done)

    def missing(self) -> Iterator[int]:
        """Requests that nobody has answered, rising; those that are answered meanwhile included."""
        held = self._held()
        for request in self._manifest.requests_of(self._partition):
            if request not in self._done and request not in held:
                yield request

    @property
    def pending(self) -> TextShard:
        """What the answers that are not committed hold."""
        return shard_facts(self._held())

    def add(self, request: int, answer: TextAnswer) -> None:
        """Take an answer, and commit when there are enough of them or the oldest is old enough.

        Raises StoreError when the commit fails: the answers are kept, and `commit` tries again.
        """
        if request in self._done:
            return
        if not self._waiting:
            self._since = self._clock()
        self._waiting[request] = answer
        enough = self._settings.first_answers << min(self._commits, 30)
        full = len(self._waiting) >= min(enough, self._settings.answers)
        if not self.lost and (full or self._clock() - self._since >= self._settings.seconds):
            self.commit()

    def commit(self) -> None:
        """Commit all answers that were taken; none while another writer is ahead.

        Safe to call again after any exception: an answer is committed once.
        """
        while not self.lost and (self._sealed is not None or self._waiting):
            if self._sealed is None:
                sealed = text_record(dict(self._waiting), self._manifest, self._partition)
                self._sealed, self._waiting = sealed, {}
            self._publish(self._sealed)

    def commit_all(self) -> None:
        """Commit also what is kept while another writer is ahead: for one that has to end."""
        for _ in range(_LAST_TRIES):
            self.lost = False
            self._refresh()
            self._drop_answered()
            self.commit()
            if not self.lost:
                return

    def stand_by(self) -> None:
        """Wait while another writer commits; return when all is answered or it has gone silent."""
        done, moved = len(self._done), self._clock()
        while self._unanswered() and self._clock() - moved < self._settings.patience_seconds:
            self._pause(_POLL_SECONDS)
            self._refresh()
            if len(self._done) > done:
                done, moved = len(self._done), self._clock()
        self.lost = False
        self._drop_answered()

    def end(self) -> None:
        """Commit the rest and write END. ValueError when answers are missing."""
        self.commit()
        if self._log.ended:
            return
        if (request := next(self.missing(), None)) is not None:
            prompt, sample = self._manifest.place(request)
            raise ValueError(
                f"partition {self._partition} cannot end: sample {sample} of prompt {prompt} has no "
                "answer"
            )
        facts = total_facts(shard.text for shard in self._log.shards if shard.text)
        end = LogRecord(
            kind="END",
            partition=self._partition,
            slot=0,
            nonce=uuid.uuid4().hex,
            count=self._log.committed,
            tokens=facts.answer_tokens,
            text=facts,
        )
        # A slot that is lost is another writer's: its END, or answers that it was given too.
        while not self._log.ended:
            with contextlib.suppress(SlotTaken):
                self._log.append(end.model_copy(update={"count": self._log.committed}))
            self._refresh()

    def _held(self) -> dict[int, TextAnswer]:
        return {**(self._sealed.answers if self._sealed else {}), **self._waiting}

    def _unanswered(self) -> bool:
        if self._log.ended:
            return False
        return any(r not in self._done for r in self._manifest.requests_of(self._partition))

    def _publish(self, sealed: _Sealed) -> None:
        self._stream.put(sealed.record.key, sealed.data)
        try:
            self._log.append(sealed.record)
        except SlotTaken:
            self._lose(sealed)
            return
        self._refresh()
        self._sealed = None
        self._commits += 1

    def _lose(self, sealed: _Sealed) -> None:
        """Keep the answers that the winner does not have; the shard that came second goes."""
        with contextlib.suppress(StoreError):  # an orphan costs space and nothing else
            self._stream.delete([sealed.record.key])
        self._refresh()
        self._waiting = {**sealed.answers, **self._waiting}
        self._sealed = None
        self._drop_answered()
        self.lost = self._unanswered()

    def _drop_answered(self) -> None:
        self._waiting = {r: a for r, a in self._waiting.items() if r not in self._done}

    def _refresh(self) -> None:
        self._log.refresh()
        for shard in self._log.shards[self._known :]:
            self._done.update(requests_in(shard))
        self._known = len(self._log.shards)

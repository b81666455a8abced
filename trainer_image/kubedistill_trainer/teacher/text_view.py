"""What is committed of a stream of text, over all its partitions: the log's words, not the answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from kubedistill_api.teacher import Endpoint, Price

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.teacher.manifest import read_layout
from kubedistill_trainer.teacher.partition_log import LogRecord, PartitionLog, TextShard
from kubedistill_trainer.teacher.repairs import Repairs
from kubedistill_trainer.teacher.tab import Paid, paid_beside
from kubedistill_trainer.teacher.text_manifest import TextIdentity, TextManifest


@dataclass(frozen=True)
class Totals:
    """Of a whole stream. `answers` counts those that were asked again once, tokens each time;
    `beside`: paid for when the teacher was measured."""

    answers: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    size_bytes: int = 0
    beside: Paid = field(default_factory=Paid)

    def with_pending(self, pending: TextShard) -> Totals:
        """With answers that are not committed yet."""
        return replace(
            self,
            prompt_tokens=self.prompt_tokens + pending.prompt_tokens,
            answer_tokens=self.answer_tokens + pending.answer_tokens,
        )

    def cost(self, price: Price) -> float:
        """What all tokens cost."""
        mine = Paid(prompt_tokens=self.prompt_tokens, answer_tokens=self.answer_tokens)
        return mine.plus(self.beside).cost(price)


def price_of(endpoint: Endpoint | None) -> Price | None:
    return endpoint.price if endpoint else None


class StreamView:
    """A growing view. `store` is rooted at the storage URI. Not thread-safe."""

    def __init__(self, store: Store, manifest: TextManifest) -> None:
        self.stream = store.child(manifest.identity.address)
        self.manifest = manifest
        self.logs = [PartitionLog(self.stream, p) for p in range(manifest.partitions)]
        self.repairs = [Repairs(self.stream, p) for p in range(manifest.partitions)]
        self._beside = Paid()
        self.totals = Totals()
        """Of all that was committed, and paid for."""

    def refresh(self) -> None:
        """Read what is new. StreamCorrupt for a bad record."""
        for log in self.logs:
            log.refresh()
        self.totals = self._totals()

    def refresh_repairs(self) -> None:
        """Read the repairs and what was paid beside the stream, which a listing each finds."""
        for repairs in self.repairs:
            repairs.refresh()
        self._beside = paid_beside(self.stream)
        self.totals = self._totals()

    @property
    def ended(self) -> bool:
        return all(log.ended for log in self.logs)

    @property
    def damaged(self) -> bool:
        """Whether somebody waits for a shard to be asked again."""
        return any(repairs.open() for repairs in self.repairs)

    def ask_for_missing(self) -> None:
        """Ask for every committed shard that is not there with its size."""
        for log, repairs in zip(self.logs, self.repairs, strict=True):
            repairs.ask_for_missing(log)

    def shards(self) -> Iterator[tuple[Repairs, LogRecord]]:
        """The newest version of every shard, partition by partition, oldest first."""
        for log, repairs in zip(self.logs, self.repairs, strict=True):
            for shard in log.shards:
                yield repairs, repairs.newest(shard)

    def _totals(self) -> Totals:
        paid = [shard for log in self.logs for shard in log.shards]
        again = [shard for _, shard in self.shards() if shard.version > 0]
        facts = [shard.text for shard in paid + again if shard.text]
        return Totals(
            answers=sum(shard.count for shard in paid),
            refused=sum(shard.text.refused for _, shard in self.shards() if shard.text),
            prompt_tokens=sum(fact.prompt_tokens for fact in facts),
            answer_tokens=sum(fact.answer_tokens for fact in facts),
            size_bytes=sum(shard.size_bytes for _, shard in self.shards()),
            beside=self._beside,
        )


def open_view(store: Store, identity: TextIdentity) -> StreamView | None:
    """What is committed of a stream, repairs included; None before its first writer came. `store` is
    rooted at the storage URI."""
    manifest = read_layout(store, identity, TextManifest)
    if manifest is None:
        return None
    view = StreamView(store, manifest)
    view.refresh()
    view.refresh_repairs()
    return view

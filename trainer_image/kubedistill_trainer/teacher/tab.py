"""What asking a server's model costs beside its stream: kept where the stream's cost is counted.

```
<stream>/asked/<who asked>.json     tokens that were paid for
```
"""

from __future__ import annotations

import logging
from typing import Self

from kubedistill_api.teacher import Price
from pydantic import BaseModel, ConfigDict, ValidationError

from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import StoreError

_log = logging.getLogger(__name__)
_FOLDER = "asked"
_COMMIT_ANSWERS = 16
_MILLION = 1_000_000


class Paid(BaseModel):
    """Tokens as a server counted them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_tokens: int = 0
    answer_tokens: int = 0

    def plus(self, other: Self) -> Self:
        """Both together."""
        return self.model_copy(
            update={
                "prompt_tokens": self.prompt_tokens + other.prompt_tokens,
                "answer_tokens": self.answer_tokens + other.answer_tokens,
            }
        )

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    def cost(self, price: Price) -> float:
        """What the tokens cost."""
        asked = self.prompt_tokens * price.input_per_million
        return (asked + self.answer_tokens * price.output_per_million) / _MILLION


class Tab:
    """One asker's account. `stream`: None where nobody counts the cost; `left`: what may be spent,
    None for any amount."""

    def __init__(
        self,
        stream: Store | None = None,
        who: str = "",
        price: Price | None = None,
        left: float | None = None,
    ) -> None:
        self.paid = Paid()
        self._stream = stream
        self._who = who
        self._price = price
        self._left = left
        self._committed = 0
        self._answers = 0

    @property
    def limited(self) -> bool:
        """Whether there is an end to what may be spent."""
        return self._left is not None and self._price is not None

    @property
    def full(self) -> bool:
        """Whether as much is spent as may be."""
        if self._left is None or self._price is None:
            return False
        return self.paid.cost(self._price) >= self._left

    def add(self, prompt_tokens: int, answer_tokens: int) -> None:
        """Count an answer."""
        more = Paid(prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)
        self.paid = self.paid.plus(more)
        self._answers += 1
        if self._answers - self._committed >= _COMMIT_ANSWERS:
            self.commit()

    def commit(self) -> None:
        """Write down what was paid; a store that is away is told the next time."""
        if self._stream is None or self._answers == self._committed:
            return
        key = f"{_FOLDER}/{self._who}.json"
        try:
            self._stream.put(key, self.paid.model_dump_json().encode())
        except StoreError:
            _log.warning("an account is not written", extra={"uri": self._stream.uri_of(key)})
        else:
            self._committed = self._answers


def paid_beside(stream: Store) -> Paid:
    """What all askers have paid."""
    paid = Paid()
    for found in stream.list(f"{_FOLDER}/"):
        try:
            paid = paid.plus(Paid.model_validate_json(stream.get(found.key)))
        except ValidationError:
            _log.warning("an account does not parse", extra={"uri": stream.uri_of(found.key)})
    return paid

"""What was done to a student before it was evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kubedistill_trainer.compress.smaller import Cut
from kubedistill_trainer.methods.history import Point
from kubedistill_trainer.methods.watch import Watch
from kubedistill_trainer.teacher.learn import TaughtText


@dataclass(frozen=True)
class Work:
    """Of a method that does not train, the defaults. `initial_perplexity`: before anything was done
    to the student; `cut`: how it was made smaller."""

    initial_perplexity: float | None = None
    history: Sequence[Point] = ()
    watch: Watch = field(default_factory=lambda: Watch(None))
    exported_step: int | None = None
    cut: Cut | None = None
    taught: TaughtText | None = None

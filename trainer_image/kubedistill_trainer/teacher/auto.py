"""`payload: Auto`: what is asked, what was measured, and what follows from it.

The measurement is an object of its own, written once under the digest of the question, so that all
writers, students and later jobs with the same question agree on one payload:

```
<storage.uri>/probes/<digest of the question>.json
```
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from kubedistill_api.status import PayloadProbe
from pydantic import BaseModel, ConfigDict, ValidationError

from kubedistill_trainer.failures import InputsRefused, refuse
from kubedistill_trainer.store.client import Store
from kubedistill_trainer.store.errors import NotFound, PreconditionFailed
from kubedistill_trainer.teacher.errors import StreamCorrupt
from kubedistill_trainer.teacher.manifest import StreamIdentity
from kubedistill_trainer.teacher.payload_spec import HiddenSpec, PayloadSpec, SparseSpec

_SPARSE_SIZES = (32, 64, 256)


class Question(BaseModel):
    """Everything that the choice depends on. `identity` is the stream's, with any payload."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: StreamIdentity
    temperatures: tuple[float, ...]
    objective: str
    """The divergence whose gradient is compared."""
    top_k: int
    max_gradient_error: float

    @property
    def key(self) -> str:
        """Where the answer lies below the storage URI."""
        return f"probes/{hashlib.sha256(self.model_dump_json().encode()).hexdigest()}.json"

    def candidates(self) -> list[PayloadSpec]:
        """Payloads that are measured; `Sampled` is not: a token's draws are noise by design."""
        grid = tuple(sorted({1.0, *self.temperatures}))
        vocab_size = self.identity.visible_vocab_size
        sizes = sorted({min(k, vocab_size) for k in (*_SPARSE_SIZES, self.top_k)})
        sparse = [SparseSpec(k=k, temperatures=grid) for k in sizes]
        return [*sparse, HiddenSpec(), HiddenSpec(precision="bfloat16")]

    def with_payload(self, payload: PayloadSpec) -> StreamIdentity:
        """The identity of the stream that carries `payload`."""
        return self.identity.model_copy(update={"payloads": (payload,)})


class Answer(BaseModel):
    """The measured table, and the payload that was chosen from it (None: none fits)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[PayloadProbe, ...]
    chosen: PayloadSpec | None


def label(spec: PayloadSpec) -> str:
    """A payload's name in the table."""
    if isinstance(spec, SparseSpec):
        return f"Sparse, K={spec.k}"
    return f"Hidden, {spec.precision}" if isinstance(spec, HiddenSpec) else spec.kind


def choose(
    specs: Sequence[PayloadSpec], rows: Sequence[PayloadProbe], max_gradient_error: float
) -> PayloadSpec | None:
    """The smallest payload whose error stays within the bound at every temperature."""
    errors: dict[str, list[float]] = defaultdict(list)
    size: dict[str, float] = {}
    for row in rows:
        errors[row.payload].append(row.gradient_error)
        size[row.payload] = row.bytes_per_token
    # Each by itself, for of a NaN, which is within no bound, max() may make anything.
    fitting = [
        spec
        for spec in specs
        if label(spec) in size and all(e <= max_gradient_error for e in errors[label(spec)])
    ]
    return min(fitting, key=lambda spec: size[label(spec)], default=None)


def table(rows: Sequence[PayloadProbe]) -> str:
    """The rows as text with aligned columns."""
    cells = [("payload", "T", "bytes/token", "kept mass", "gradient error", "angle")]
    cells += [
        (
            row.payload, f"{row.temperature:g}", f"{row.bytes_per_token:.0f}",
            f"{row.kept_mass:.1%}", f"{row.gradient_error:.3f}", f"{row.angle_degrees:.1f}°",
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def refusal(question: Question, answer: Answer) -> InputsRefused:
    """What is said when no payload fits; with the table."""
    return refuse(
        "spec.teacher.maxGradientError",
        f"{question.max_gradient_error:g}, and no payload within it:\n{table(answer.rows)}\n",
        "allow a greater error, lower the temperature, or name a payload in spec.teacher.payload",
    )


def read_answer(store: Store, question: Question) -> Answer | None:
    """The answer, None when nobody has measured yet. `store` is rooted at the storage URI."""
    try:
        body = store.get(question.key)
    except NotFound:
        return None
    try:
        return Answer.model_validate_json(body)
    except ValidationError as error:
        raise StreamCorrupt(store.uri_of(question.key), f"not a probe: {error}") from error


def publish_answer(store: Store, question: Question, answer: Answer) -> Answer:
    """Write the answer if there is none; the one that holds is returned."""
    try:
        store.put(question.key, answer.model_dump_json().encode(), only_if_absent=True)
    except PreconditionFailed:
        found = read_answer(store, question)
        if found is None:
            raise
        return found
    return answer

"""Where a step's teacher comes from: nowhere, inside this process, or a stream."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from kubedistill_api.status import PayloadProbe, TeacherStreamStatus
from torch import Tensor
from torch.nn.functional import pad

from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.losses import Teacher, TeacherHidden, TeacherSampled, TeacherSparse
from kubedistill_trainer.models.decoder import final_hidden, softcap_of
from kubedistill_trainer.models.load import load_model
from kubedistill_trainer.store import Store
from kubedistill_trainer.teacher.auto import Question
from kubedistill_trainer.teacher.codec import token_hash
from kubedistill_trainer.teacher.errors import StreamStalled
from kubedistill_trainer.teacher.head import load_head
from kubedistill_trainer.teacher.manifest import StreamIdentity
from kubedistill_trainer.teacher.payload import TeacherOutputs
from kubedistill_trainer.teacher.reading import ReaderSettings
from kubedistill_trainer.teacher.request import Resolution, resolved
from kubedistill_trainer.teacher.stream_reader import StreamReader

_log = logging.getLogger(__name__)
Ids = npt.NDArray[np.int64]
_POLL_SECONDS = 1.0
TeacherBatch = Teacher | None


class Signal(Protocol):
    """A teacher as the loop sees it."""

    def expect(self, batches: Iterator[Ids]) -> None:
        """Sample ids in the order in which `batch` will be asked for them."""

    def there(self, samples: Ids, seconds: float = 0.0) -> bool:
        """Whether `batch` would find the outputs for these sequences, after a wait of at most so long
        for their teacher. Raises what `batch` raises where they do not come."""

    def batch(self, samples: Ids, tokens: Tensor, positions: Tensor) -> TeacherBatch:
        """The teacher's outputs for sequences [B] with tokens and positions [B, L]."""

    def status(self) -> TeacherStreamStatus | None:
        """What is known of the stream, if there is one."""

    def close(self) -> None: ...


class NoTeacher:
    """Cross-entropy only."""

    def expect(self, batches: Iterator[Ids]) -> None:
        """Nothing to prepare."""

    def there(self, samples: Ids, seconds: float = 0.0) -> bool:
        return True

    def batch(self, samples: Ids, tokens: Tensor, positions: Tensor) -> TeacherBatch:
        return None

    def status(self) -> TeacherStreamStatus | None:
        return None

    def close(self) -> None:
        """Nothing is open."""


class OnlineTeacher:
    """The teacher in the student's process: its hidden states are made when they are needed."""

    def __init__(self, model: Any, layers: Sequence[int] = ()) -> None:
        """`layers`: whose states are wanted beside the last one's, counted from 1."""
        self._layers = layers
        self.model = model.eval().requires_grad_(False)
        self._decoder = model.get_decoder()
        self._head = model.get_output_embeddings().weight

    def expect(self, batches: Iterator[Ids]) -> None:
        """Nothing to prepare."""

    def there(self, samples: Ids, seconds: float = 0.0) -> bool:
        return True

    @torch.no_grad()
    def batch(self, samples: Ids, tokens: Tensor, positions: Tensor) -> TeacherBatch:
        hidden, layers = hidden_states(self._decoder, tokens, positions, self._layers)
        return TeacherHidden(hidden, self._head, softcap_of(self.model), layers)

    def status(self) -> TeacherStreamStatus | None:
        return None

    def close(self) -> None:
        """Nothing is open."""


class StreamTeacher:
    """The teacher's stream in S3, read ahead."""

    def __init__(
        self,
        reader: StreamReader,
        head: Tensor | None,
        dataset: Dataset,
        temperature: float,
        softcap: float | None,
        uri: str,
        probe: list[PayloadProbe],
    ) -> None:
        """`head`: the teacher's LM head where the payload is Hidden, else None.

        `uri` and `probe` are for the status.
        """
        self._uri = uri
        self._probe = probe
        self._reader = reader
        self._temperature = temperature
        self._head = head
        self._dataset = dataset
        self._softcap = softcap

    def expect(self, batches: Iterator[Ids]) -> None:
        self._reader.prefetch(
            (int(sample), self._hash(int(sample))) for ids in batches for sample in ids
        )

    def there(self, samples: Ids, seconds: float = 0.0) -> bool:
        return self._reader.there([int(sample) for sample in samples], seconds)

    def batch(self, samples: Ids, tokens: Tensor, positions: Tensor) -> TeacherBatch:
        outputs = [self._reader.get(int(s), self._hash(int(s))) for s in samples]
        if self._head is not None:
            return _joined_hidden(outputs, self._head, self._softcap, tokens.device)
        if outputs[0].sampled is not None:
            return joined_sampled(outputs, tokens.device)
        return joined_sparse(outputs, self._temperature, tokens.device)

    def status(self) -> TeacherStreamStatus | None:
        progress = self._reader.progress()
        identity = self._reader.manifest.identity
        return TeacherStreamStatus(
            uri=self._uri,
            digest=identity.digest(),
            payload=identity.payloads[0].kind,
            bytes=progress.size_bytes,
            tokens=progress.tokens,
            complete=progress.ended,
            lag_tokens=self._reader.lag_tokens,
            wait_seconds=round(self._reader.wait_seconds, 1),
            probe=self._probe,
        )

    def close(self) -> None:
        self._reader.close()
        waited = round(self._reader.wait_seconds, 1)
        _log.info("stream closed", extra={"uri": self._uri, "waited_seconds": waited})

    def _hash(self, sample: int) -> int:
        return token_hash(self._dataset.packed.tokens[sample])


def _joined_hidden(
    outputs: list[TeacherOutputs], head: Tensor, softcap: float | None, device: torch.device
) -> TeacherHidden:
    states = torch.cat([o.hidden.states for o in outputs if o.hidden is not None])
    return TeacherHidden(states.to(device, head.dtype), head, softcap)


def joined_sparse(
    outputs: list[TeacherOutputs], temperature: float, device: torch.device
) -> TeacherSparse:
    """One batch of several samples' sparse payloads, with the normaliser of `temperature`."""
    sparse = [o.sparse for o in outputs if o.sparse is not None]
    return TeacherSparse(
        ids_NK=torch.cat([s.token_ids for s in sparse]).to(device),
        logprobs_NK=torch.cat([s.log_probs for s in sparse]).to(device),
        log_z_N=torch.cat([s.log_z_at(temperature) for s in sparse]).to(device),
    )


def joined_sampled(outputs: list[TeacherOutputs], device: torch.device) -> TeacherSampled:
    """One batch of several samples' draws, as shares of them; widths are made equal."""
    sampled = [o.sampled for o in outputs if o.sampled is not None]
    width = max(s.token_ids.shape[1] for s in sampled)
    ids, counts = (
        torch.cat([pad(part, (0, width - part.shape[1])) for part in parts]).to(device)
        for parts in ([s.token_ids for s in sampled], [s.counts for s in sampled])
    )
    # What pads has no share; id 0 is as good as any then.
    shares = counts.float() / counts.sum(-1, keepdim=True)
    return TeacherSampled(ids.where(counts > 0, 0), shares)


def hidden_states(
    decoder: Any, tokens: Tensor, positions: Tensor, layers: Sequence[int]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The final states [B·L, H] (see `final_hidden`), and those after `layers`, counted from 1.

    The last layer's are those after the final norm.
    """
    if not layers:
        return final_hidden(decoder, tokens, positions).flatten(0, 1), {}
    output = decoder(
        input_ids=tokens, position_ids=positions, use_cache=False, output_hidden_states=True
    )
    states = output.hidden_states
    return output.last_hidden_state.flatten(0, 1), {n: states[n].flatten(0, 1) for n in layers}


def online_teacher(
    folder: Path, dtype: torch.dtype, device: torch.device, layers: Sequence[int]
) -> OnlineTeacher:
    """Load the teacher from a downloaded folder; `layers` as for OnlineTeacher."""
    return OnlineTeacher(load_model(folder, "spec.teacher", dtype).to(device), layers)


def _awaited(request: StreamIdentity | Question, store: Store, stall_seconds: float) -> Resolution:
    """The stream, once a teacher has chosen its payload. StreamStalled after the wait."""
    deadline = time.monotonic() + stall_seconds
    while (found := resolved(request, store)) is None:
        if time.monotonic() > deadline:
            raise StreamStalled(f"no teacher has measured payloads within {stall_seconds:.0f} s")
        time.sleep(_POLL_SECONDS)
    return found


def stream_teacher(
    context: Context,
    dataset: Dataset,
    request: StreamIdentity | Question,
    config: dict[str, Any],
    temperature: float,
    device: torch.device,
) -> StreamTeacher:
    """Wait for the stream's manifest and open it."""
    stall_seconds = float(context.run.spec.stall_timeout_seconds)
    settings = ReaderSettings(stall_seconds=stall_seconds)
    identity, rows = _awaited(request, context.storage, stall_seconds)
    cache = context.scratch / f"stream-{context.rank}"
    consumer = f"{context.run.uid}/{context.rank}"
    reader = StreamReader(
        context.storage,
        identity,
        cache=cache,
        consumer=consumer,
        ranks=context.world_size,
        settings=settings,
    )
    hidden = identity.payloads[0].kind == "Hidden"
    head = load_head(context.storage, reader.manifest, cache).to(device) if hidden else None
    softcap = config.get("final_logit_softcapping")
    uri = context.storage.child(identity.address).uri
    return StreamTeacher(reader, head, dataset, temperature, softcap, uri, list(rows))

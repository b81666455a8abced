"""The distribution of a teacher whose logits are not learnt, over the held-out sequences.

It may be learnt by its text, which says nothing of it, or be there to compare with; and perplexity,
agreement and divergence need it. So the teacher's pod (once all answers are there) writes its states
over the held-out sequences as a `Hidden` stream of their own, which the student's ranks read when
they evaluate.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.status import TeacherStreamStatus
from torch import Tensor

from kubedistill_trainer.context import Context
from kubedistill_trainer.data.conversation import Message
from kubedistill_trainer.data.dataset import Dataset, learns_text, load_dataset
from kubedistill_trainer.data.template import ChatTemplate, Unrenderable
from kubedistill_trainer.data.tokenizer import TextTokenizer, load_tokenizer
from kubedistill_trainer.evaluation.speak import Tick
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.methods.generate import teacher_outputs
from kubedistill_trainer.methods.learn_text import text_there
from kubedistill_trainer.methods.signal import Ids, StreamTeacher, TeacherBatch
from kubedistill_trainer.models.folder import read_config
from kubedistill_trainer.store import Store
from kubedistill_trainer.store.errors import NotFound, StoreError
from kubedistill_trainer.teacher.digest import teacher_digest
from kubedistill_trainer.teacher.errors import StreamError
from kubedistill_trainer.teacher.head import load_head, publish_head
from kubedistill_trainer.teacher.manifest import Manifest, StreamIdentity, publish_manifest
from kubedistill_trainer.teacher.mend import mend
from kubedistill_trainer.teacher.payload import TeacherOutputs
from kubedistill_trainer.teacher.payload_spec import HiddenSpec
from kubedistill_trainer.teacher.reading import ReaderSettings
from kubedistill_trainer.teacher.request import identity_of
from kubedistill_trainer.teacher.stream_reader import StreamReader
from kubedistill_trainer.teacher.stream_writer import StreamWriter
from kubedistill_trainer.teacher.whole import is_whole

_log = logging.getLogger(__name__)
_TALK = (Message("user", "What is it?"), Message("assistant", "It is this."))
_TALKS = (_TALK, (Message("system", "Be brief."), *_TALK), _TALK * 2)
_PARTITION = 0
_TRIES, _MOST_TRIES = "tries", 3
_STALL_SECONDS = 60.0
"""A stream that is whole needs no teacher: what stalls is the store."""


class NotComparable(Exception):
    """There is no such distribution; the text says why."""


@dataclass(frozen=True)
class HeldOut:
    """`dataset`: the held-out sequences alone; `config`: the teacher's config.json."""

    dataset: Dataset
    identity: StreamIdentity
    config: dict[str, Any]


def check_comparable(
    context: Context, tokenizer: TextTokenizer, template: ChatTemplate | None
) -> dict[str, Any]:
    """The teacher's config.json. `tokenizer`, `template`: the student's.

    NotComparable for a server, and for a teacher that reads other tokens than the student.
    """
    source = context.run.teacher_model
    if source is None:
        raise NotComparable("a server says what it answers, not how likely all other words were")
    store = context.open_store(source.uri)
    own, config = load_tokenizer(store, "spec.teacher"), read_config(store, "spec.teacher")
    if own.digest != tokenizer.digest:
        raise NotComparable("the teacher has another tokenizer than the student")
    talks = template is not None or learns_text(context.run.spec)
    if talks and (template is None or _rendered(own) != _rendered(tokenizer, template)):
        raise NotComparable("the teacher has another chat template than the student")
    for name, least in (("vocab_size", tokenizer.vocab_size), ("hidden_size", 1)):
        size = config.get(name)
        if not isinstance(size, int) or size < least:
            raise NotComparable(f"the teacher's config.json has {name}: {size!r}")
    return config


def _rendered(tokenizer: TextTokenizer, template: ChatTemplate | None = None) -> list[str]:
    """What a template, by default the tokenizer's own, makes of a few conversations: templates that
    are written in another way may say the same."""
    if template is None:
        template = ChatTemplate(tokenizer, tokenizer.chat_template or "", "spec.teacher")
    texts = []
    for turns in _TALKS:
        try:
            texts.append(template.render(turns))
        except Unrenderable:
            texts.append("")
    return texts


def held_out(context: Context, dataset: Dataset) -> HeldOut:
    """What the teacher is asked for; the same in the preflight, its pods and the ranks. Raises
    NotComparable."""
    config = check_comparable(context, dataset.tokenizer, dataset.template)
    source = context.run.teacher_model
    assert source is not None
    ids = dataset.split.heldout
    mine = hashlib.sha256(json.dumps([dataset.digest, ids.tolist()]).encode()).hexdigest()
    part = replace(dataset, packed=dataset.packed.take(ids), digest=mine)
    digest = teacher_digest(source, context.open_store(source.uri))
    return HeldOut(part, identity_of(HiddenSpec(), part, digest, config), config)


def is_settled(store: Store, wanted: HeldOut) -> bool:
    """Whether no teacher is needed: its states are there, or were given up. `store` is rooted at the
    storage URI."""
    if is_whole(store, wanted.identity, ask=True):
        return True
    return _tries(store.child(wanted.identity.address)) >= _MOST_TRIES


def write_held_out(context: Context, model: Callable[[], Any], tick: Tick) -> None:
    """In a teacher's pod: write the stream, where all answers are there and it is not.

    `model` gives the teacher, and is called where it is needed. The answers are worth more than
    this: what fails costs the figures only, and after `_MOST_TRIES` nobody tries again. RunFailure
    where the pod is to stop, or a split teacher's processes are out of step.
    """
    try:
        text = learns_text(context.run.spec)
        there = text_there(context) if text else load_dataset(context.run, context.open_store)
        wanted = None if there is None else held_out(context, there)
        if wanted is None or is_settled(context.storage, wanted):
            return
        stream = context.storage.child(wanted.identity.address)
        tries = _tries(stream)
        stream.put(_TRIES, str(tries + 1).encode())
        try:
            _write(context, wanted, model(), tick)
        except RunFailure as failure:
            if failure.code == ExitCode.INTERRUPTED:
                stream.put(_TRIES, str(tries).encode())
            raise
        stream.delete([_TRIES])
    except NotComparable as reason:
        _log.info("the teacher is not held beside the student's distribution: %s", reason)
    except RunFailure:
        raise
    except Exception as error:
        _log.exception("the teacher's states over the held-out sequences are not written")
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()


def _tries(stream: Store) -> int:
    """How often writing was begun and did not come to its end."""
    try:
        found = stream.get(_TRIES)
    except NotFound:
        return 0
    return int(found) if found.isdigit() else 0


def _write(context: Context, wanted: HeldOut, teacher: Any, tick: Tick) -> None:
    _log.info("writing the teacher's states over the held-out sequences")
    scratch = context.scratch / "held-out"
    scratch.mkdir(parents=True, exist_ok=True)
    identity, packed = wanted.identity, wanted.dataset.packed
    head = publish_head(context.storage, identity, teacher.get_output_embeddings().weight, scratch)
    manifest = publish_manifest(
        context.storage,
        Manifest(identity=identity, partitions=1, samples=len(packed), head_sha256=head),
    )

    def made(sample: int) -> tuple[Any, TeacherOutputs]:
        tick()
        return packed.tokens[sample], teacher_outputs(
            teacher, identity, packed.take([sample]), sample
        )

    mend(context.storage, manifest, _PARTITION, scratch=scratch, produce=made)
    with StreamWriter(
        context.storage, manifest, _PARTITION, scratch=scratch, pause=lambda seconds: tick()
    ) as writer:
        for sample in writer.samples():
            writer.write(sample, *made(sample))
        writer.end()


class HeldOutTeacher:
    """A `Signal` for the held-out sequences. What cannot be read is left out of the figures, and
    named in `problem`: the student is trained by now."""

    def __init__(self, inner: StreamTeacher, ids: Ids) -> None:
        """`ids`: of the held-out sequences, ascending."""
        self._inner = inner
        self._ids = ids
        self.problem = ""

    def expect(self, batches: Iterator[Ids]) -> None:
        self._inner.expect(self._places(samples) for samples in batches)

    def there(self, samples: Ids, seconds: float = 0.0) -> bool:
        return True  # the stream was whole when it was opened

    def batch(self, samples: Ids, tokens: Tensor, positions: Tensor) -> TeacherBatch:
        try:
            return self._inner.batch(self._places(samples), tokens, positions)
        except (StreamError, StoreError) as error:
            self.problem = str(error)
            _log.warning("a held-out sequence is not compared: %s", error)
            return None

    def status(self) -> TeacherStreamStatus | None:
        return None

    def close(self) -> None:
        self._inner.close()

    def _places(self, samples: Ids) -> Ids:
        return np.searchsorted(self._ids, samples)


def held_out_teacher(context: Context, dataset: Dataset, device: torch.device) -> HeldOutTeacher:
    """Open what the teacher's pod wrote. NotComparable where there is nothing to compare with."""
    wanted = held_out(context, dataset)
    cache = context.scratch / f"held-out-{context.rank}"
    with ExitStack() as opened:
        try:
            if not is_whole(context.storage, wanted.identity):
                raise NotComparable(
                    "its pod has not written its states over the held-out sequences"
                )
            reader = opened.enter_context(
                StreamReader(
                    context.storage,
                    wanted.identity,
                    cache=cache,
                    ranks=context.world_size,
                    settings=ReaderSettings(stall_seconds=_STALL_SECONDS),
                )
            )
            head = load_head(context.storage, reader.manifest, cache).to(device)
        except (StreamError, StoreError) as error:
            raise NotComparable(str(error)) from error
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise NotComparable("memory ran out for the teacher's LM head") from error
        opened.pop_all()
    softcap = wanted.config.get("final_logit_softcapping")
    inner = StreamTeacher(reader, head, wanted.dataset, 1.0, softcap, "", [])
    return HeldOutTeacher(inner, dataset.split.heldout)

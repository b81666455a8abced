"""A teacher's likeliest next tokens from a server that scores prompts: the `Sparse` payload at T = 1.

Two ways are known. vLLM's `prompt_logprobs` on /completions, whose keys are token ids; and OpenAI's
older `echo` with `logprobs`, where the server writes ids (`return_tokens_as_token_ids`) in place of
texts, which may be those of several tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kubedistill_trainer.data.packing import IGNORED, Packed
from kubedistill_trainer.failures import refuse, unreadable
from kubedistill_trainer.teacher.endpoint_client import Ask, Client
from kubedistill_trainer.teacher.endpoint_reply import (
    Again,
    PromptRefused,
    Reply,
    check_model,
    tokens_of,
)
from kubedistill_trainer.teacher.metrics import ENDPOINT_TOKENS

COMPLETIONS = "completions"
ID_PREFIX = "token_id:"
Way = Literal["prompt_logprobs", "echo"]
Ids = npt.NDArray[np.int64]
_LAST_ID = (1 << 31) - 1
"""Of any tokenizer; beyond it an id does not fit the arrays."""
_NOTHING = -9000.0
"""Servers write −inf, which JSON has not, as −9999."""


class NoScores(Exception):
    """The server answers, and scores no prompts this way."""


@dataclass(frozen=True)
class Scores:
    """Of a piece of n tokens: the K likeliest tokens after each but the last.

    `ids` int64 [n − 1, K], rising along K; `log_probs` float32 [n − 1, K], at T = 1.
    """

    ids: Ids
    log_probs: npt.NDArray[np.float32]


def pieces(sequence: Packed) -> list[tuple[int, int]]:
    """(begin, end) of what a server has to read of one sequence [1, L], for all that has a label.

    A text is read from its beginning in the sequence up to the token after its last label, as
    nothing attends across texts; one without labels, such as padding, is not read at all.
    """
    [positions], [labels] = sequence.positions, sequence.labels
    bounds = [*np.flatnonzero(positions == 0).tolist(), len(positions)]
    found = []
    for begin, end in pairwise(bounds):
        labelled = np.flatnonzero(labels[begin:end] != IGNORED)
        if len(labelled):
            found.append((begin, begin + int(labelled[-1]) + 2))
    return found


def longest_piece(packed: Packed) -> int:
    """Tokens of the longest piece of all sequences."""
    return int(packed.positions[packed.labels != IGNORED].max(initial=-1)) + 2


class Scorer:
    """Asks a server to score token ids."""

    def __init__(self, client: Client, k: int, vocab_size: int, way: Way) -> None:
        """`vocab_size`: ids that the data's tokenizer has."""
        self._client = client
        self._k = k
        self._vocab_size = vocab_size
        self.way = way

    def start(self, tokens: Sequence[int]) -> Future[Scores]:
        """Begin to score a piece."""
        read = partial(self._read, tokens=tokens)
        return self._client.start(Ask(COMPLETIONS, read, partial(self._body, tokens)))

    def _body(self, tokens: Sequence[int]) -> dict[str, Any]:
        return body_of(self._client.model, tokens, self._k, self.way)

    def _read(self, reply: Reply, tokens: Sequence[int]) -> Scores:
        content = reply.json()
        try:
            rows = rows_of(content, len(tokens), self.way)
        except NoScores as error:
            # It did when it was probed.
            raise Again("unreadable", str(error)) from error
        check_model(content, self._client.model, self._client.url)
        prompt_tokens, answer_tokens = tokens_of(content)
        ENDPOINT_TOKENS.labels("prompt").inc(prompt_tokens)
        ENDPOINT_TOKENS.labels("answer").inc(answer_tokens)
        return scores_of(rows, self._k, self._vocab_size)


def body_of(model: str, prompt: Sequence[int] | str, k: int, way: Way) -> dict[str, Any]:
    """The request of one piece. The temperature is 1 in words: some servers score at it."""
    common = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0}
    if not isinstance(prompt, str):
        common["prompt"] = [int(token) for token in prompt]
    if way == "prompt_logprobs":
        return {**common, "prompt_logprobs": k}
    asked = {"echo": True, "logprobs": k, "return_tokens_as_token_ids": True}
    return {**common, **asked, "add_special_tokens": False}


def rows_of(content: Any, length: int, way: Way) -> list[dict[int, float]]:
    """What is said of each token but the first, {id: log-probability}, [length − 1].

    NoScores where the server says nothing of prompts in this way, Again for another shape.
    """
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Again("unreadable", "JSON without choices")
    if way == "prompt_logprobs":
        rows = choices[0].get("prompt_logprobs")
        read: Callable[[Any], dict[int, float]] = _by_id
    else:
        scored = choices[0].get("logprobs") or {}
        if not isinstance(scored, dict):
            raise Again("unreadable", f"{way} of another shape")
        rows, read = scored.get("top_logprobs"), _by_name
    if rows is None:
        raise NoScores(f"it knows no {way}")
    if not isinstance(rows, list):
        raise Again("unreadable", f"{way} of another shape")
    if len(rows) < length:
        raise NoScores(f"it scores {len(rows)} of {length} tokens with {way}")
    try:
        return [read(row) for row in rows[1:length]]
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
        raise Again("unreadable", f"{way} of another shape") from error


def _by_id(row: dict[str, dict[str, Any]]) -> dict[int, float]:
    return {_id(token): float(entry["logprob"]) for token, entry in row.items()}


def _by_name(row: dict[str, float]) -> dict[int, float]:
    if not all(name.startswith(ID_PREFIX) for name in row):
        raise NoScores("it knows no return_tokens_as_token_ids, and names tokens by texts")
    return {_id(name.removeprefix(ID_PREFIX)): float(value) for name, value in row.items()}


def _id(text: str) -> int:
    found = int(text)
    if not 0 <= found <= _LAST_ID:
        raise ValueError(f"{found} is no token id")
    return found


def scores_of(rows: Sequence[dict[int, float]], k: int, vocab_size: int) -> Scores:
    """The K likeliest of each row: a server adds the text's own token, likely or not.

    Again where a row has fewer than K; InputsRefused for ids that the tokenizer does not have and
    for numbers that are no log-probabilities.
    """
    ids = np.empty((len(rows), k), dtype=np.int64)
    log_probs = np.empty((len(rows), k), dtype=np.float32)
    for place, row in enumerate(rows):
        if len(row) < k:
            raise Again("unreadable", f"{len(row)} of {k} log-probabilities of a token")
        known = np.fromiter(row.keys(), np.int64, len(row))
        values = np.fromiter(row.values(), np.float64, len(row))
        kept = np.lexsort((known, -values))[:k]
        kept = kept[np.argsort(known[kept])]
        ids[place], log_probs[place] = known[kept], values[kept]
    if rows:
        _check_scores(ids, log_probs, vocab_size)
    log_probs[log_probs < _NOTHING] = -np.inf
    return Scores(ids, np.minimum(log_probs, 0.0))


def _check_scores(ids: Ids, log_probs: npt.NDArray[np.float32], vocab_size: int) -> None:
    if ids.max() >= vocab_size or ids.min() < 0:
        raise unreadable(
            "spec.data.tokenizer", f"a tokenizer of {vocab_size} ids",
            f"the server names token {ids.max()}: give the tokenizer of its model",
        )  # fmt: skip
    mass = np.exp(log_probs.astype(np.float64)).sum(-1)
    if not (mass < 1.01).all() or log_probs.max(-1).min() < -np.log(vocab_size) - 1:
        raise unreadable(
            "spec.teacher.endpoint", "numbers that are no log-probabilities",
            "serve the model with raw log-probabilities (vLLM: --logprobs-mode raw_logprobs)",
        )  # fmt: skip


class ScoredData:
    """Scores of whole sequences, asked for ahead of their use so that the server is kept busy."""

    def __init__(self, scorer: Scorer, packed: Packed, k: int, vocab_size: int, ahead: int) -> None:
        """`ahead`: pieces that are asked for before they are needed."""
        self._scorer = scorer
        self._packed = packed
        self._k = k
        self._vocab_size = vocab_size
        self._ahead = ahead
        self._begun: dict[int, list[tuple[int, Future[Scores]]]] = {}

    def expect(self, samples: Iterable[int]) -> None:
        """Samples in the order in which they will be asked for; whatever else was begun is left."""
        coming: list[int] = []
        open_pieces = 0
        for sample in samples:
            if coming and open_pieces >= self._ahead:
                break
            coming.append(sample)
            if sample not in self._begun:
                self._begun[sample] = self._begin(sample)
            open_pieces += len(self._begun[sample])
        for sample in self._begun.keys() - coming:
            for _, future in self._begun.pop(sample):
                future.cancel()

    def scores(self, sample: int) -> Scores:
        """Of all positions [L, K]. What nothing is learnt from is any distribution at all.

        InputsRefused where the server does not take a piece.
        """
        length = self._packed.sequence_length
        ids = np.tile(np.arange(self._k, dtype=np.int64), (length, 1))
        log_probs = np.full((length, self._k), -np.log(self._vocab_size), dtype=np.float32)
        for begin, future in self._begun.pop(sample, None) or self._begin(sample):
            try:
                found = future.result()
            except PromptRefused as refusal:
                raise refuse(
                    "spec.data.sequenceLength", f"a text that the server does not take ({refusal})",
                    "write fewer tokens than the server's context has room for",
                ) from refusal  # fmt: skip
            end = begin + len(found.ids)
            ids[begin:end], log_probs[begin:end] = found.ids, found.log_probs
        return Scores(ids, log_probs)

    def _begin(self, sample: int) -> list[tuple[int, Future[Scores]]]:
        sequence = self._packed.take([sample])
        tokens = sequence.tokens[0].tolist()
        return [(begin, self._scorer.start(tokens[begin:end])) for begin, end in pieces(sequence)]

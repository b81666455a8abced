"""What a teacher stream can carry for each position of a sample.

`Sparse` is the top of the teacher's distribution with exact normalisers; `Hidden` the teacher's
last hidden state, exact at every temperature once the LM head is applied. A stream may carry both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sparse:
    """N positions, K kept tokens each.

    `token_ids` int64 [N, K], strictly rising along K; `log_probs` float32 [N, K], log p at T = 1
    (−inf for a padded entry); `log_z` float32 [N, G] with log Z_T = logsumexp_v(log p_v / T) over
    the WHOLE vocabulary for each T of `temperatures` (G of them), so that
    log p_T(v) = log p_v / T − log Z_T.
    """

    token_ids: Tensor
    log_probs: Tensor
    log_z: Tensor
    temperatures: tuple[float, ...]

    def log_probs_at(self, temperature: float) -> Tensor:
        """log p_T of the kept tokens, float32 [N, K]. ValueError for a T outside the grid."""
        return self.log_probs / temperature - self.log_z_at(temperature)[:, None]

    def log_z_at(self, temperature: float) -> Tensor:
        """log Z_T, float32 [N]. ValueError for a T outside the grid."""
        for column, known in enumerate(self.temperatures):
            if math.isclose(known, temperature, rel_tol=1e-9):
                return self.log_z[:, column]
        raise ValueError(
            f"temperature {temperature} is not in this stream's grid {list(self.temperatures)}; "
            "use one of these, or a stream with the Hidden payload, which is exact at every T"
        )


@dataclass(frozen=True, slots=True)
class Hidden:
    """`states` float [N, H]: the teacher's hidden states after its final norm."""

    states: Tensor


@dataclass(frozen=True, slots=True)
class Sampled:
    """N positions of D draws each from the teacher's distribution at one temperature.

    `token_ids` int64 [N, K], strictly rising along K, K the most distinct tokens that a position
    has; `counts` int64 [N, K], how often each was drawn: they sum to D. A padded entry has count 0
    and an id that the vocabulary does not have.
    """

    token_ids: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class TeacherOutputs:
    """All that a stream says about one sample of N positions; None where it has no such payload."""

    sparse: Sparse | None = None
    hidden: Hidden | None = None
    sampled: Sampled | None = None

    @property
    def positions(self) -> int:
        """N. ValueError when the payloads disagree or there is none."""
        counts = set()
        if self.sparse is not None:
            counts.add(int(self.sparse.token_ids.shape[0]))
        if self.hidden is not None:
            counts.add(int(self.hidden.states.shape[0]))
        if self.sampled is not None:
            counts.add(int(self.sampled.token_ids.shape[0]))
        if len(counts) != 1:
            raise ValueError(f"payloads of one sample have {sorted(counts) or 'no'} positions")
        return counts.pop()


def sparse_of_logits(
    logits: Tensor,
    k: int,
    temperatures: tuple[float, ...],
    *,
    visible_vocab_size: int | None = None,
) -> Sparse:
    """Sparse payload of logits float [n, V], in float32; call it a chunk of positions at a time.

    Entries from `visible_vocab_size` on (padding of the teacher's vocabulary) count as −inf.
    Raises ValueError where k exceeds the vocabulary or a row has NaN, +inf or no finite entry.
    """
    log_probs = _log_probs(logits, visible_vocab_size, k)
    log_z = [
        # exactly 0 by definition; computing it would leave rounding in the file
        log_probs.new_zeros(log_probs.shape[0])
        if temperature == 1.0
        else torch.logsumexp(log_probs / temperature, dim=-1)
        for temperature in temperatures
    ]
    top, ids = log_probs.topk(k, dim=-1)
    ids, order = ids.sort(dim=-1)
    return Sparse(ids, top.gather(-1, order), torch.stack(log_z, dim=-1), temperatures)


def sampled_of_logits(
    logits: Tensor,
    draws: int,
    temperature: float,
    generator: torch.Generator,
    *,
    visible_vocab_size: int | None = None,
) -> Sampled:
    """`draws` tokens a position from softmax(logits / temperature), logits float [n, V].

    Padding and errors as in `sparse_of_logits`.
    """
    log_probs = _log_probs(logits, visible_vocab_size, 1)
    positions, vocab_size = log_probs.shape
    probabilities = torch.softmax(log_probs / temperature, dim=-1)
    drawn = torch.multinomial(probabilities, draws, replacement=True, generator=generator)
    drawn = drawn.sort(dim=-1).values
    begins = torch.ones_like(drawn)
    begins[:, 1:] = (drawn[:, 1:] != drawn[:, :-1]).long()
    column = begins.cumsum(dim=-1) - 1
    width = int(column.max()) + 1 if positions else 0
    padding = vocab_size + torch.arange(width, device=drawn.device)
    ids = padding.expand(positions, width).clone().scatter_(1, column, drawn)
    counts = torch.zeros_like(ids).scatter_add_(1, column, torch.ones_like(drawn))
    return Sampled(ids, counts)


def _log_probs(logits: Tensor, visible_vocab_size: int | None, k: int) -> Tensor:
    """Log-probabilities float32 [n, visible]; ValueError as in `sparse_of_logits`."""
    visible = logits.shape[-1] if visible_vocab_size is None else visible_vocab_size
    if not 1 <= k <= visible <= logits.shape[-1]:
        raise ValueError(
            f"k = {k} and visible_vocab_size = {visible} do not fit logits of {logits.shape[-1]}"
        )
    log_probs = torch.log_softmax(logits[:, :visible].float(), dim=-1)
    # log_softmax gives NaN for a row with NaN, +inf, or nothing but −inf
    bad = torch.isnan(log_probs).any(dim=-1)
    if bool(bad.any()):
        raise ValueError(
            f"teacher logits at position {int(bad.nonzero()[0])} hold NaN, +inf or no finite value"
        )
    return log_probs

"""Sums over held-out tokens → figures: exact, by source, the same over any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from kubedistill_api.runspec import TERMINATION_MESSAGE_BYTES, Outcome
from kubedistill_api.status import Metric
from kubedistill_trainer.data.packing import IGNORED, pack
from kubedistill_trainer.losses import TeacherHidden, TeacherSparse
from kubedistill_trainer.methods.signal import NoTeacher
from kubedistill_trainer.report.evaluate import evaluate, heldout_perplexity, measure
from kubedistill_trainer.report.figures import BINS, Sums

VOCABULARY, LENGTH, HIDDEN = 11, 6, 4
ONE = torch.ones(1)


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def dataset(documents: int = 12) -> Any:
    random = np.random.default_rng(0)
    texts = [random.integers(0, VOCABULARY, 5) for _ in range(documents)]
    packed = pack(texts, LENGTH, [i % 2 for i in range(documents)])
    split = SimpleNamespace(heldout=np.arange(1, len(packed)))
    return SimpleNamespace(packed=packed, split=split, sources=("even", "odd"))


class Engine:
    """A student that is a table: the logits of each next token depend on the token only."""

    device = torch.device("cpu")

    def __init__(self, seed: int = 1) -> None:
        self.table = 3 * torch.randn(VOCABULARY, VOCABULARY, generator=_generator(seed))

    def eval(self) -> None: ...

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.table[tokens.flatten()]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Hidden(NoTeacher):
    """A teacher with as many hidden units as tokens: its logits are its table."""

    table = 3 * torch.randn(VOCABULARY, VOCABULARY, generator=_generator(2))

    def batch(self, samples: Any, tokens: Any, positions: Any) -> Any:
        return TeacherHidden(self.table[tokens.flatten()], torch.eye(VOCABULARY))


class Sparse(Hidden):
    def batch(self, samples: Any, tokens: Any, positions: Any) -> Any:
        top = self.table.log_softmax(-1)[tokens.flatten()].topk(3)
        return TeacherSparse(top.indices, top.values, torch.zeros(len(top.values)))


def expected(data: Any, source: int | None = None) -> dict[str, float]:
    """The same figures, token by token in Python."""
    sequences = data.packed.take(data.split.heldout)
    student, teacher = (table.double().log_softmax(-1) for table in (Engine().table, Hidden.table))
    rows = [
        (student[token], teacher[token], label)
        for token, label, file in zip(
            sequences.tokens.ravel(), sequences.labels.ravel(), sequences.sources.ravel(),
            strict=True,
        )
        if label != IGNORED and source in (None, file)
    ]  # fmt: skip
    count = len(rows)
    perplexity, teachers = (
        math.exp(-sum(float(row[i][row[2]]) for row in rows) / count) for i in (0, 1)
    )
    return {
        "perplexity": perplexity,
        "accuracy": sum(int(s.argmax()) == label for s, _, label in rows) / count,
        "teacherAgreement": sum(int(s.argmax() == t.argmax()) for s, t, _ in rows) / count,
        "teacherKL": sum(float((t.exp() * (t - s)).sum()) for s, t, _ in rows) / count,
        "teacherPerplexity": teachers,
        "perplexityRatio": perplexity / teachers,
    }


def test_figures_are_those_of_a_plain_loop(group: Any) -> None:
    data = dataset()
    found = evaluate(Engine(), Hidden(), data, 0, 1, group)
    assert set(found.figures) == {*expected(data), "ece", "teacherEce"}
    assert {n: found.figures[n] for n in expected(data)} == pytest.approx(
        expected(data), rel=1e-5, abs=1e-5
    )
    for index, part in enumerate(found.slices):
        assert dict(part.figures) == pytest.approx(expected(data, index), rel=1e-5, abs=1e-5)
    assert [part.name for part in found.slices] == ["even", "odd"]
    heldout = data.packed.take(data.split.heldout)
    assert sum(part.tokens for part in found.slices) == heldout.valid_tokens


def test_calibration_counts_every_token_and_the_bins_give_the_accuracy(group: Any) -> None:
    data = dataset()
    found = evaluate(Engine(), Hidden(), data, 0, 1, group)
    assert found.teacher is not None
    assert found.student.tokens == found.teacher.tokens == sum(s.tokens for s in found.slices)
    assert found.student.accuracy == pytest.approx(found.figures["accuracy"], abs=1e-6)


@pytest.mark.parametrize("ranks", [2, 3, 5, 40])
def test_ranks_add_up_to_one(ranks: int) -> None:
    data = dataset()
    alone = measure(Engine(), Hidden(), data, 0, 1).vector
    parts = [measure(Engine(), Hidden(), data, rank, ranks).vector for rank in range(ranks)]
    assert torch.allclose(sum(parts), alone)  # type: ignore[arg-type]
    assert {len(part) for part in parts} == {len(alone)}


def test_every_rank_makes_the_same_number_of_passes() -> None:
    class Counting(Engine):
        passes = 0

        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            self.passes += 1
            return super().__call__(*inputs)

    engines = [Counting() for _ in range(4)]
    for rank, engine in enumerate(engines):
        measure(engine, NoTeacher(), dataset(), rank, 4)
    assert {engine.passes for engine in engines} == {3}


def test_a_sparse_teacher_gives_its_agreement_only(group: Any) -> None:
    data = dataset()
    found = evaluate(Engine(), Sparse(), data, 0, 1, group)
    assert set(found.figures) == {"perplexity", "accuracy", "teacherAgreement", "ece"}
    assert found.figures["teacherAgreement"] == pytest.approx(
        expected(data)["teacherAgreement"], abs=1e-6
    )
    assert found.teacher is None


def test_without_a_teacher(group: Any) -> None:
    data = dataset()
    found = evaluate(Engine(), NoTeacher(), data, 0, 1, group)
    assert set(found.figures) == {"perplexity", "accuracy", "ece"}
    perplexity = heldout_perplexity(Engine(), data, 0, 1, group)
    assert perplexity == found.figures["perplexity"]


@pytest.mark.parametrize(
    ("confidence", "place"),
    [(1e-6, 0), (1 / 15, 0), (0.0668, 1), (0.2, 2), (0.5, 7), (14 / 15, 13), (0.9334, 14), (1, 14)],
)
def test_a_bin_is_open_below_and_closed_above(confidence: float, place: int) -> None:
    sums = Sums(1)
    sums.add_confidence("student", torch.tensor([confidence]), torch.tensor([True]))
    filled = [part.tokens for part in sums.evaluation(("a",)).student.bins]
    assert filled == [float(i == place) for i in range(BINS)]


def test_the_calibration_error_is_the_mean_gap_by_tokens() -> None:
    """Three tokens at 0.9 of which one is right, one at 0.3 that is right (Guo et al. 2017)."""
    sums = Sums(1)
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.3])
    sums.add_confidence("student", confidence, torch.tensor([True, False, False, True]))
    found = sums.evaluation(("a",)).student
    assert found.ece == pytest.approx(3 / 4 * abs(1 / 3 - 0.9) + 1 / 4 * abs(1 - 0.3))
    assert (found.accuracy, found.confidence) == pytest.approx((0.5, 0.75))


def _sliced(*rows: tuple[int, float, float]) -> Sums:
    """Sums of sources with (tokens, student's, teacher's cross-entropy a token)."""
    sums = Sums(len(rows))
    for index, (tokens, nll, teacher) in enumerate(rows):
        sums.add(
            torch.tensor([index]), tokens=ONE * tokens, nll=ONE * tokens * nll,
            exactTokens=ONE * tokens, teacherNll=ONE * tokens * teacher,
        )  # fmt: skip
    return sums


def test_a_student_that_is_not_a_number_has_no_perplexity(group: Any) -> None:
    """The bound on the loss is for the unlikely, and must not make a figure of NaN."""
    engine = Engine()
    engine.table[:] = math.nan
    assert math.isnan(heldout_perplexity(engine, dataset(), 0, 1, group))
    engine.table[:] = 0
    engine.table[:, 0] = 1e6
    assert heldout_perplexity(engine, dataset(), 0, 1, group) == pytest.approx(math.exp(50))


def test_the_weakest_by_perplexity_and_by_ratio_differ() -> None:
    found = _sliced((500, 3.0, 2.9), (600, 2.0, 1.0), (700, 1.0, 0.9)).evaluation(("a", "b", "c"))
    weakest = found.weakest()
    assert {name: part.name for name, part in weakest.items()} == {
        "perplexity": "a",
        "perplexityRatio": "b",
    }
    assert weakest["perplexity"].tokens == 500


def test_a_slice_of_few_tokens_is_not_called_the_weakest() -> None:
    found = _sliced((99, 9.0, 1.0), (600, 2.0, 1.5), (700, 1.0, 0.9)).evaluation(("a", "b", "c"))
    assert {part.name for part in found.weakest().values()} == {"b"}


def test_one_slice_has_nothing_to_be_weaker_than() -> None:
    assert _sliced((500, 3.0, 2.9)).evaluation(("a",)).weakest() == {}


def test_a_source_of_which_nothing_is_held_out_has_no_figures() -> None:
    empty = _sliced((500, 3.0, 2.9), (0, 0.0, 0.0)).evaluation(("a", "b")).slices[1]
    assert (empty.tokens, dict(empty.figures)) == (0, {})


def test_all_figures_fit_a_termination_message() -> None:
    data, sums = dataset(), measure(Engine(), Hidden(), dataset(), 0, 1)
    metrics = [*sums.evaluation(data.sources).metrics, Metric(name="initialPerplexity", value=1e5)]
    outcome = Outcome(reason="Completed", message="model exported", metrics=metrics)
    assert len(outcome.to_termination_message()) < TERMINATION_MESSAGE_BYTES / 4


def test_a_teacher_that_is_not_a_number_leaves_what_is_one() -> None:
    sums, torn = Sums(2), torch.tensor([1.0, math.nan])
    for source, nll in ((0, torch.ones(2)), (1, torn)):
        sources = torch.full((2,), source)
        sums.add(
            sources, tokens=torch.ones(2), nll=torch.ones(2), teacherTokens=torch.ones(2),
            exactTokens=torch.ones(2), teacherNll=nll, divergence=nll, agreements=torch.ones(2),
        )  # fmt: skip
        sums.add_confidence("student", torch.full((2,), 0.5), torch.ones(2))
        sums.add_confidence("teacher", nll / 2, torch.ones(2))
    found = sums.evaluation(("sound", "torn"))
    assert math.isnan(found.figures["teacherKL"])  # which whoever publishes it leaves out
    assert found.teacher is None
    assert "teacherKL" in found.slices[0].figures
    assert set(found.slices[1].figures) == {"perplexity", "accuracy", "teacherAgreement"}

"""Text → packed sequences → batches: exact, within texts, the same for any number of ranks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_api.data import Data, DataSource
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.data.dataset import source_names
from kubedistill_trainer.data.order import Order, Part, micro_batch_size, split
from kubedistill_trainer.data.packing import IGNORED, pack
from kubedistill_trainer.data.records import BadRecords
from kubedistill_trainer.data.sources import Corpus, parse_source, read_corpus
from kubedistill_trainer.failures import InputsRefused


def test_packing_keeps_texts_apart() -> None:
    documents = [np.array([1, 2, 3, 0]), np.array([4, 5, 0]), np.array([6, 7, 8, 9, 0])]
    packed = pack(documents, 4)
    assert packed.tokens.tolist() == [[1, 2, 3, 0], [4, 5, 0, 6], [7, 8, 9, 0]]
    assert packed.labels.tolist() == [
        [2, 3, 0, IGNORED],
        [5, 0, IGNORED, IGNORED],
        [8, 9, 0, IGNORED],
    ]
    assert packed.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 3]]
    assert packed.valid_tokens == 8


def test_packing_knows_the_file_of_a_token() -> None:
    documents = [np.array([1, 2, 0]), np.array([3, 0]), np.array([4, 5, 6, 0])]
    packed = pack(documents, 4, [0, 2, 0])
    assert packed.sources.tolist() == [[0, 0, 0, 2], [2, 0, 0, 0]]
    assert packed.take([1]).sources.tolist() == [[2, 0, 0, 0]]
    assert pack(documents, 4).sources.tolist() == [[0] * 4] * 2


def test_documents_know_their_file() -> None:
    files = {"a.jsonl": b'{"text": "x"}\n{"text": "y"}\n', "b.txt": b" ", "c.txt": b"z"}
    store = SimpleNamespace(get=files.__getitem__)
    data = Data.model_validate({"sources": [{"uri": f"s3://data/{name}"} for name in files]})
    corpus = read_corpus(data, lambda uri: store, BadRecords(0))  # type: ignore[arg-type,return-value]
    assert (corpus.documents, corpus.sources) == (["x", "y", "z"], [0, 0, 2])


def test_a_file_read_for_two_fields_has_two_names() -> None:
    sources = [
        _source("s3://data/a.jsonl"), DataSource(uri="s3://data/b.jsonl", text_field="q"),
        DataSource(uri="s3://data/b.jsonl", text_field="a"),
    ]  # fmt: skip
    assert source_names(sources) == (
        "s3://data/a.jsonl",
        "s3://data/b.jsonl#q",
        "s3://data/b.jsonl#a",
    )
    assert source_names(sources[:1] * 2) == (
        "s3://data/a.jsonl#text[0]",
        "s3://data/a.jsonl#text[1]",
    )


@given(st.lists(st.integers(1, 40), min_size=2, max_size=20), st.integers(2, 16))
def test_packing_loses_only_the_tail(lengths: list[int], length: int) -> None:
    documents = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    total = sum(lengths)
    if total // length < 1:
        return
    packed = pack(documents, length)
    assert (
        packed.tokens.ravel().tolist() == np.concatenate(documents)[: len(packed) * length].tolist()
    )
    # A label is the next token of the same text: texts here count up.
    valid = packed.labels != IGNORED
    assert (packed.labels[valid] == packed.tokens[valid] + 1).all()


@given(st.integers(2, 300), st.floats(0.001, 0.999), st.integers(0, 5))
def test_a_split_is_a_partition(count: int, holdout: float, seed: int) -> None:
    parts = split([count], holdout, seed)
    assert sorted([*parts.training, *parts.heldout]) == list(range(count))
    assert len(parts.training) >= 1 and len(parts.heldout) >= 1


@given(st.integers(1, 50), st.integers(1, 30), st.integers(1, 4))
def test_every_epoch_sees_each_sequence_once(size: int, batch: int, epochs: int) -> None:
    order = Order([Part(np.arange(size) * 3)], batch, seed=1)
    steps = -(-size * epochs // batch)
    row = np.concatenate([order.batch(step) for step in range(steps)])[: size * epochs]
    for epoch in range(epochs):
        assert sorted(row[epoch * size : (epoch + 1) * size]) == (np.arange(size) * 3).tolist()


def test_a_batch_depends_on_nothing_but_step_and_seed() -> None:
    parts = [Part(np.arange(100))]
    assert (Order(parts, 8, 3).batch(17) == Order(parts, 8, 3).batch(17)).all()
    assert (Order(parts, 8, 3).batch(17) != Order(parts, 8, 4).batch(17)).any()


@pytest.mark.parametrize(
    ("per_rank", "wanted", "size"), [(8, 4, 4), (6, 4, 3), (7, 4, 1), (4, 100, 4), (1, 1, 1)]
)
def test_micro_batches_divide_the_batch(per_rank: int, wanted: int, size: int) -> None:
    assert micro_batch_size(per_rank, wanted) == size


def _source(uri: str = "s3://data/a.jsonl") -> DataSource:
    return DataSource(uri=uri)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{not json", "line 2: not JSON"),
        ("[1, 2]", "line 2: a JSON list, not an object"),
        ('{"body": "x"}', "line 2: no field 'text', only ['body']"),
        ('{"text": 5}', "line 2: field 'text' is a int, not a string"),
        ('{"text": "a\\ud83d"}', "line 2: field 'text' holds half a character, \\ud83d"),
        ("[" * 100_000, "line 2: JSON that is too deep or too large"),
        ('{"text": ' + "1" * 5_000 + "}", "line 2: JSON that is too deep or too large"),
    ],
)
def test_a_bad_line_is_named(line: str, found: str) -> None:
    body = ('{"text": "good"}\n' + line + "\n").encode()
    with pytest.raises(InputsRefused) as refused:
        parse_source(Corpus(), 0, _source(), body, BadRecords(0))
    assert refused.value.code == ExitCode.UNREADABLE_INPUT
    [problem] = refused.value.problems
    assert problem.field == "spec.data.sources[0].uri"
    assert f"s3://data/a.jsonl {found}" in problem.found
    assert "maxBadRecords" in problem.expected


def test_bad_lines_within_the_limit_are_counted() -> None:
    corpus, bad = Corpus(), BadRecords(1)
    parse_source(corpus, 0, _source(), b'{"text": "a"}\nx\n\n{"text": "b"}\n', bad)
    assert (corpus.documents, bad.count) == (["a", "b"], 1)


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    corpus = Corpus()
    body = '{"text": "a"}\r\n{"text": "b"}\r\n'.encode("utf-8-sig")
    parse_source(corpus, 0, _source(), body, BadRecords(0))
    assert corpus.documents == ["a", "b"]


def test_text_that_is_not_utf_8_is_named() -> None:
    with pytest.raises(InputsRefused, match="line 2 is not UTF-8"):
        parse_source(Corpus(), 0, _source(), b'{"text": "a"}\n\xff\xfe\n', BadRecords(9))


def test_a_file_of_another_kind_is_refused() -> None:
    with pytest.raises(InputsRefused, match=r"give a \.jsonl or a \.txt file"):
        parse_source(Corpus(), 0, _source("s3://data/a.parquet"), b"", BadRecords(0))

"""Conversations → sequences → weighted epochs: whole, apart, and seen as often as was asked for."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from data_kit import STRICT, TURNS, Bucket, job, jsonl, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from kubedistill_trainer.data.conversation import Conversation, Message
from kubedistill_trainer.data.dataset import Dataset, load_dataset, tokenizer_source
from kubedistill_trainer.data.order import Order, Part, split
from kubedistill_trainer.data.packing import IGNORED, Fit, pack_conversations
from kubedistill_trainer.data.template import Encoded
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.preflight import _check_tokenizers, _teacher_config, _verdict

PAIRS = {"uri": "s3://data/pairs.jsonl", "promptField": "q", "responseField": "a"}
TEXT = {"uri": "s3://data/text.jsonl"}
ASKED = {"uri": "s3://data/asked.jsonl", "promptField": "q", "origin": "Teacher"}
TEACHER, STUDENT = "s3://data/teacher", "s3://data/student"


def _encoded(first: int, length: int, learnt_from: int) -> Encoded:
    return Encoded(np.arange(first, first + length), np.arange(length) >= learnt_from)


def test_conversations_stay_whole() -> None:
    talks = [_encoded(10, 3, 1), _encoded(20, 4, 2), _encoded(30, 2, 1)]
    packed, fit = pack_conversations(talks, 5, source=3, padding=0)
    assert packed.tokens.tolist() == [[10, 11, 12, 30, 31], [20, 21, 22, 23, 0]]
    assert packed.labels.tolist() == [
        [11, 12, IGNORED, 31, IGNORED],
        [IGNORED, 22, 23, IGNORED, IGNORED],
    ]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert (packed.sources == 3).all()
    assert fit == Fit(whole=3, cut=0, dropped=0, padding=1)


def test_too_long_a_conversation_is_cut_or_dropped() -> None:
    talks = [_encoded(10, 9, 3), _encoded(20, 9, 4)]
    packed, fit = pack_conversations(talks, 4, source=0, padding=0)
    assert packed.tokens.tolist() == [[10, 11, 12, 13]]
    assert packed.labels.tolist() == [[IGNORED, IGNORED, 13, IGNORED]]
    assert fit == Fit(whole=0, cut=1, dropped=1, padding=0)


@given(st.lists(st.tuples(st.integers(2, 12), st.integers(0, 11)), min_size=1, max_size=40))
def test_packing_keeps_every_conversation_apart(sizes: list[tuple[int, int]]) -> None:
    talks = [_encoded(100 * (i + 1), n, min(first, n - 1)) for i, (n, first) in enumerate(sizes)]
    packed, fit = pack_conversations(talks, 12, source=0, padding=0)
    assert fit.whole == len(talks)
    assert fit.padding == packed.tokens.size - sum(n for n, _ in sizes)
    valid = packed.labels != IGNORED
    assert (packed.labels[valid] == packed.tokens[valid] + 1).all()
    # A conversation's first token is nowhere predicted, and each other learnt one exactly once.
    wanted = sum(n - max(1, min(first, n - 1)) for n, first in sizes)
    assert packed.valid_tokens == wanted
    own = packed.tokens > 0
    assert (packed.positions[own] == packed.tokens[own] % 100).all()
    # Positions go on or restart at 0, the padding's too, by which transformers tells them apart.
    assert ((np.diff(packed.positions) == 1) | (packed.positions[:, 1:] == 0)).all()


def test_attention_stays_within_a_conversation() -> None:
    import torch
    from kubedistill_trainer.models.decoder import final_hidden
    from kubedistill_trainer.models.load import config_of, random_model

    keys = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
    }  # fmt: skip
    model = random_model(config_of(keys, 64, "f", 64), 0, torch.float32).eval()

    def states(tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> Any:
        with torch.no_grad():
            return final_hidden(
                model.get_decoder(), torch.from_numpy(tokens), torch.from_numpy(positions)
            )

    packed, _ = pack_conversations([_encoded(10, 5, 2), _encoded(30, 4, 1)], 12, 0, padding=1)
    together = states(packed.tokens, packed.positions)[0]
    for start, end in ((0, 5), (5, 9), (9, 12)):
        alone = states(packed.tokens[:, start:end], np.arange(end - start)[None])[0]
        assert torch.allclose(together[start:end], alone, atol=1e-5)


_PARTS = st.lists(
    st.tuples(st.integers(1, 20), st.sampled_from([0.05, 0.29, 0.5, 1.0, 1.5, 2.0, 7.3])),
    min_size=1,
    max_size=4,
)


def _order(parts: list[tuple[int, float]], batch: int = 5, seed: int = 3) -> Order:
    ids = np.split(np.arange(sum(n for n, _ in parts)), np.cumsum([n for n, _ in parts])[:-1])
    return Order([Part(i, weight) for i, (_, weight) in zip(ids, parts, strict=True)], batch, seed)


@settings(max_examples=60, deadline=None)
@given(_PARTS, st.integers(1, 12))
def test_a_sequence_is_seen_as_often_as_it_weighs(
    parts: list[tuple[int, float]], epochs: int
) -> None:
    size = sum(Part(np.arange(n), w).taken(epochs) for n, w in parts)
    order = _order(parts, batch=1)
    seen = Counter(int(order.batch(step)[0]) for step in range(size))
    first = 0
    for count, weight in parts:
        assert all(abs(seen[i] - weight * epochs) < 1 + 1e-9 for i in range(first, first + count))
        first += count


@settings(max_examples=40, deadline=None)
@given(_PARTS, st.integers(1, 7), st.integers(0, 30))
def test_a_row_is_the_same_from_wherever_it_is_resumed(
    parts: list[tuple[int, float]], batch: int, step: int
) -> None:
    one = _order(parts, batch=1)
    row = [int(one.batch(place)[0]) for place in range(step * batch, (step + 1) * batch)]
    assert _order(parts, batch).batch(step).tolist() == row
    after = _order(parts, batch)
    after.batch(step + 1)
    assert after.batch(step).tolist() == row


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 40))
def test_with_weight_one_it_is_one_shuffle_an_epoch(
    counts: list[int], batch: int, step: int
) -> None:
    order, size = _order([(n, 1.0) for n in counts], batch, seed=3), sum(counts)
    places = np.arange(step * batch, (step + 1) * batch)
    shuffles = {e: np.random.default_rng([3, e]).permutation(size) for e in set(places // size)}
    assert order.batch(step).tolist() == [shuffles[p // size][p % size] for p in places.tolist()]


def test_an_epoch_is_as_long_as_it_weighs() -> None:
    order = _order([(100, 0.29), (10, 2.0), (3, 0.5)], batch=7)
    assert order.total_steps(1, None) == (29 + 20 + 1) // 7
    assert order.total_steps(2, None) == (58 + 40 + 3) // 7
    assert order.total_steps(2, 4) == 4


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0.01, 0.9))
def test_something_of_every_part_is_held_out(counts: list[int], holdout: float) -> None:
    if sum(counts) < 2:
        return
    parts = split(counts, holdout, seed=1)
    assert sorted([*parts.training, *parts.heldout]) == list(range(sum(counts)))
    assert len(parts.training) and len(parts.heldout)
    part = np.repeat(np.arange(len(counts)), counts)
    if max(counts) > 1:
        assert set(part[parts.training]) == set(range(len(counts)))
        assert set(part[parts.heldout]) == {i for i, n in enumerate(counts) if n > 1}


def test_the_first_part_is_split_as_it_would_be_alone() -> None:
    shuffled = np.random.default_rng([5, 1_000_003]).permutation(50)
    for counts in ([50], [50, 20]):
        heldout = split(counts, 0.1, seed=5).heldout
        assert heldout[heldout < 50].tolist() == sorted(shuffled[:5])


def _bucket(template: str | None = TURNS) -> Bucket:
    pairs = [{"q": f"the {i}?", "a": f"The answer is {i}"} for i in range(40)]
    texts = [{"text": "the question is the answer to the question " * 4}] * 12
    bucket = Bucket(
        **{
            "pairs.jsonl": jsonl(*pairs),
            "text.jsonl": jsonl(*texts),
            "asked.jsonl": jsonl(*[{"q": "Why?"}] * 3),
        }
    )
    bucket.put("tokenizer", tokenizer(template).files)
    return bucket


def _load(*sources: dict[str, Any], bucket: Bucket | None = None, **parts: Any) -> Dataset:
    return load_dataset(job(*sources, **parts), (bucket or _bucket()).open)


def test_text_and_conversations_are_mixed_by_weight() -> None:
    data = _load(TEXT, {**PAIRS, "weight": 2.5})
    sources = [set(row) for row in data.packed.sources.tolist()]
    assert all(len(found) == 1 for found in sources)
    of_pairs = np.asarray([found == {1} for found in sources])
    assert set(of_pairs[data.split.heldout]) == {True, False}
    texts, pairs = (int((of_pairs[data.split.training] == x).sum()) for x in (False, True))
    assert data.total_steps == (4 * texts + 10 * pairs) // 4
    row = np.concatenate([data.order.batch(step) for step in range(data.total_steps)])
    assert abs(int(of_pairs[row].sum()) - 10 * pairs) <= 4
    assert data.fit is not None and (data.fit.whole, data.fit.cut, data.fit.dropped) == (40, 0, 0)
    decode = data.tokenizer.tokenizer.decode
    labels = data.packed.labels[of_pairs]
    said = decode(labels[labels != IGNORED].tolist(), skip_special_tokens=False)
    answers = sorted(said.removesuffix("<|im_end|>").split("<|im_end|>"))
    assert answers == sorted(f"The answer is {i}" for i in range(40))


def test_weights_do_not_change_the_sequences() -> None:
    one, other = _load(TEXT, {**PAIRS, "weight": 2}), _load(TEXT, {**PAIRS, "weight": 0.5})
    assert (one.packed.tokens == other.packed.tokens).all()
    assert (one.packing_digest, one.digest) == (other.packing_digest, other.digest)


def test_text_of_another_weight_is_packed_by_itself() -> None:
    again = {**TEXT, "uri": "s3://data/again.jsonl"}
    bucket = _bucket()
    bucket.objects["again.jsonl"] = bucket.objects["text.jsonl"]
    together = _load(TEXT, again, bucket=bucket)
    apart = _load(TEXT, {**again, "weight": 3}, bucket=bucket)
    assert together.packing_digest == _load(TEXT).packing_digest != apart.packing_digest
    assert all(len(set(row)) == 1 for row in apart.packed.sources.tolist())


@pytest.mark.parametrize("others", [[], [TEXT]])
def test_a_file_of_which_no_epoch_holds_anything_is_refused(others: list[dict[str, Any]]) -> None:
    """By itself it would have the order look for its first sequence through all epochs to come."""
    with pytest.raises(InputsRefused) as refused:
        _load(*others, {**PAIRS, "weight": 1e-9})
    [problem] = refused.value.problems
    assert problem.field == f"spec.data.sources[{len(others)}].weight"
    assert problem.found.startswith("1e-09, by which 4 epochs hold none of the ")
    least = float(problem.expected.split()[3].rstrip(","))
    assert _load(*others, {**PAIRS, "weight": least}).total_steps
    with pytest.raises(InputsRefused):
        _load(*others, {**PAIRS, "weight": least - 0.001})


def test_answers_that_were_paid_for_are_not_refused_for_their_weight() -> None:
    asked = {**ASKED, "weight": 1e-9}
    talk = Conversation((Message("user", "Why?"), Message("assistant", "The answer is no")))
    assert load_dataset(job(TEXT, asked), _bucket().open, [(1, talk)] * 3).total_steps > 0


def test_the_template_pins_the_sequences() -> None:
    first = _load(PAIRS)
    given = _load(PAIRS, data={"chatTemplate": TURNS.replace("im_start", "im_end")})
    assert first.packing_digest != given.packing_digest
    assert first.tokenizer.files["chat_template.jinja"] == TURNS.encode()
    assert b"<|im_end|>' + m.role" in given.tokenizer.files["chat_template.jinja"]
    assert _load(TEXT).packing_digest == _load(TEXT, data={"chatTemplate": STRICT}).packing_digest


def test_what_the_template_refuses_is_a_bad_record() -> None:
    twice = [{"role": "user", "content": "Hi"}] * 2 + [{"role": "assistant", "content": "Hello"}]
    bucket = _bucket(STRICT)
    bucket.objects["pairs.jsonl"] = jsonl(*[{"t": twice[1:]}] * 20, {"t": twice})
    source = {"uri": "s3://data/pairs.jsonl", "messagesField": "t"}
    with pytest.raises(InputsRefused) as refused:
        _load(source, bucket=bucket)
    [problem] = refused.value.problems
    assert problem.field == "spec.data.sources[0].uri"
    assert problem.found.startswith("s3://data/pairs.jsonl line 21: the chat template refuses it: ")
    assert "roles must alternate" in problem.found and "maxBadRecords" in problem.expected
    fit = _load(source, bucket=bucket, data={"maxBadRecords": 1}).fit
    assert fit is not None and fit.whole == 20


def test_conversations_that_do_not_fit_are_told() -> None:
    bucket = _bucket()
    long = [{"q": "x" * 90, "a": "y"}] * 3 + [{"q": "x", "a": "y" * 90}] * 20
    bucket.objects["pairs.jsonl"] = jsonl(*long)
    data = _load(PAIRS, bucket=bucket)
    assert _verdict(data) == (
        "all inputs fit; of 23 conversations 20 are cut at 32 tokens, and 3 with longer prompts "
        "are dropped"
    )
    bucket.objects["pairs.jsonl"] = jsonl(*long[:3])
    with pytest.raises(InputsRefused, match=r"none of 3 conversations .* within 32 tokens"):
        _load(PAIRS, bucket=bucket)
    assert _verdict(_load(PAIRS)) == "all inputs fit"


def test_too_little_says_how_much_is_needed() -> None:
    bucket = _bucket()
    bucket.objects["text.jsonl"] = jsonl({"text": "x" * 20})
    found = r"21 tokens of text in s3://data/text.jsonl; give at least 64 tokens \(two sequences\)"
    with pytest.raises(InputsRefused, match=found):
        _load(PAIRS, TEXT, bucket=bucket)
    bucket.objects["pairs.jsonl"] = jsonl({"q": "x", "a": "y"})
    with pytest.raises(InputsRefused, match="one sequence of 32 tokens; give at least 64 tokens"):
        _load(PAIRS, bucket=bucket)


TEXTS: dict[str, Any] = {
    "fineTune": None, "distill": {"signal": "Responses"}, "teacher": {"model": {"uri": TEACHER}},
}  # fmt: skip


def test_the_teacher_s_answers_are_learnt() -> None:
    run, bucket = job(ASKED, TEXT, **TEXTS), _bucket()
    said = Conversation((Message("user", "Why?"), Message("assistant", "The answer")))
    data = load_dataset(run, bucket.open, [(0, said)] * 9)
    assert (data.packed.sources == 0).any() and data.fit is not None and data.fit.whole == 9
    other = load_dataset(run, bucket.open, [(0, said)] * 8)
    without = load_dataset(run, bucket.open)
    assert len({data.digest, other.digest, without.digest}) == 3
    with pytest.raises(InputsRefused, match="found 3 prompts and no answer that is learnt"):
        load_dataset(job(ASKED, **TEXTS), bucket.open)


LOGITS = {**TEXTS, "distill": {}, "teacher_model": TEACHER}


@pytest.mark.parametrize(
    ("signal", "field"), [({}, "spec.teacher"), ({"signal": "Responses"}, "spec.student")]
)
def test_whose_tokenizer_is_taken(signal: dict[str, Any], field: str) -> None:
    source = ASKED if signal else TEXT
    run = job(
        source, **{**LOGITS, "distill": signal, "student_model": STUDENT},
        student={"model": {"uri": STUDENT}}, data={"tokenizer": None},
    )  # fmt: skip
    assert tokenizer_source(run)[0] == field


def _check(bucket: Bucket, *sources: dict[str, Any], **parts: Any) -> None:
    run = job(*sources, **parts)
    context: Any = type("Context", (), {"run": run, "open_store": staticmethod(bucket.open)})
    said = Conversation((Message("user", "Why?"), Message("assistant", "The answer")))
    answered = [(0, said)] * 9 if sources[0] is ASKED else []
    dataset = load_dataset(run, bucket.open, answered)
    _check_tokenizers(context, dataset.tokenizer, dataset.template)


def test_logits_need_the_teacher_s_template() -> None:
    bucket = _bucket()
    bucket.put("teacher", tokenizer(STRICT).files)
    with pytest.raises(InputsRefused) as refused:
        _check(bucket, PAIRS, **LOGITS)
    [problem] = refused.value.problems
    assert problem.found == "another chat template than the teacher's, s3://data/teacher"
    assert problem.field == "spec.data.tokenizer.uri"
    _check(bucket, TEXT, **LOGITS)
    _check(bucket, PAIRS, **LOGITS, data={"chatTemplate": STRICT})
    bucket.put("teacher", tokenizer(TURNS).files)
    _check(bucket, PAIRS, **LOGITS)
    with pytest.raises(InputsRefused, match=r"spec.data.chatTemplate: .*another chat template"):
        _check(bucket, PAIRS, **LOGITS, data={"chatTemplate": STRICT})


def test_a_teacher_of_text_may_have_another_tokenizer() -> None:
    bucket = _bucket()
    other = tokenizer().files | {"tokenizer.json": _without_merges()}
    bucket.put("teacher", other)
    with pytest.raises(InputsRefused, match="a teacher's logits need one tokenizer"):
        _check(bucket, TEXT, **LOGITS)
    _check(bucket, ASKED, **{**LOGITS, "distill": {"signal": "Responses"}})
    bucket.put("student", other)
    with pytest.raises(InputsRefused, match="the student needs its own tokenizer"):
        _check(
            bucket, ASKED, **{**TEXTS, "student": {"model": {"uri": STUDENT}}},
            student_model=STUDENT,
        )  # fmt: skip


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_teacher_whose_config_does_not_say_its_size_is_refused(key: str) -> None:
    """GPT-2 has other names for them, and its blocks are no `layers` either."""
    bucket = _bucket()
    config = {"model_type": "m", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2}
    bucket.put("teacher", {"config.json": json.dumps(config).encode()})
    context: Any = type(
        "Context", (), {"run": job(TEXT, **LOGITS), "open_store": staticmethod(bucket.open)}
    )
    assert _teacher_config(context) == config
    del config[key]
    bucket.put("teacher", {"config.json": json.dumps(config).encode()})
    with pytest.raises(InputsRefused) as refused:
        _teacher_config(context)
    [problem] = refused.value.problems
    assert problem.field == "spec.teacher"
    assert problem.found == f"no {key} in s3://data/teacher/config.json"


def _without_merges() -> bytes:
    content = json.loads(tokenizer().files["tokenizer.json"])
    content["model"]["merges"] = []
    return json.dumps(content).encode()

"""Streams of text in a real S3 server: nothing committed is asked for again, whatever happens."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from kubedistill_api.runspec import RunSpec
from kubedistill_trainer.exporter import ProgressBoard
from kubedistill_trainer.failures import InputsRefused, RunFailure
from kubedistill_trainer.methods.write_text import run_text_teacher
from kubedistill_trainer.store import Store
from kubedistill_trainer.store.errors import StoreError
from kubedistill_trainer.teacher.errors import StreamDamaged, StreamStalled
from kubedistill_trainer.teacher.manifest import publish_manifest
from kubedistill_trainer.teacher.text import TextAnswer, TextRequest
from kubedistill_trainer.teacher.text_manifest import TextManifest, requests_in
from kubedistill_trainer.teacher.text_reader import read_text, wait_for_text
from kubedistill_trainer.teacher.text_writer import TextSettings, TextWriter
from s3_fixture import Faults, S3Server, s3  # noqa: F401  (s3 is a fixture)
from text_kit import (
    Clerk,
    context_of,
    identity_of,
    put_prompts,
    text_job,
    view_of,
)

PROMPTS, SAMPLES = 20, 2
ALL = sorted(itertools.product(range(PROMPTS), range(SAMPLES)))


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


@pytest.fixture
def prompts(s3: S3Server) -> str:  # noqa: F811
    return put_prompts(s3.store("shared"), PROMPTS)


def teach(
    run: RunSpec, store: Store, scratch: Path, clerk: Clerk, partition: int = 0
) -> ProgressBoard:
    board = ProgressBoard()
    run_text_teacher(context_of(run, store, scratch, partition), board, clerk.open)
    return board


def committed(run: RunSpec, store: Store) -> set[tuple[int, int]]:
    """(prompt, sample) of all answers that are committed."""
    view = view_of(run, store)
    if view is None:
        return set()
    return {view.manifest.place(n) for _, shard in view.shards() for n in requests_in(shard)}


def assert_reads(run: RunSpec, store: Store) -> None:
    view = wait_for_text(store, identity_of(run, store), stall_seconds=0)
    answers = read_text(view)
    wanted = {
        prompt * SAMPLES + sample: TextAnswer(
            f"question {prompt}\u2028{sample}\n", prompt_tokens=10, answer_tokens=5
        )
        for prompt, sample in ALL
    }
    assert answers == wanted
    assert list(answers) == sorted(answers)


def test_all_is_asked_once_and_said_in_the_log(store: Store, prompts: str, tmp_path: Path) -> None:
    run = text_job(store, prompts, samples=SAMPLES)
    clerk, again = Clerk(), Clerk()
    board = teach(run, store, tmp_path, clerk)
    assert sorted(clerk.asked) == ALL
    assert_reads(run, store)
    stream = board.report.teacher_stream
    assert stream is not None and stream.complete
    facts = (stream.answers, stream.tokens, stream.prompt_tokens, stream.cost)
    assert facts == (len(ALL), 5 * len(ALL), 10 * len(ALL), None)
    view = view_of(run, store)
    assert view is not None
    end = view.logs[0]._end
    assert end is not None and end.text is not None
    assert (end.count, end.text.answer_tokens) == (len(ALL), 5 * len(ALL))
    written = {info.key: info.size_bytes for info in view.stream.list("partitions/0/shards/")}
    assert stream.bytes == sum(written.values())
    teach(run, store, tmp_path, again)
    assert again.asked == []


def test_partitions_are_answered_by_pods_of_their_own(
    store: Store, prompts: str, tmp_path: Path
) -> None:
    teacher = {"model": {"uri": "s3://nowhere/teacher"}, "workers": {"replicas": 3}}
    run = text_job(store, prompts, samples=SAMPLES, teacher=teacher)
    clerks = [Clerk() for _ in range(3)]
    boards = [teach(run, store, tmp_path, clerk, p) for p, clerk in enumerate(clerks)]
    assert sorted(itertools.chain(*(clerk.asked for clerk in clerks))) == ALL
    said = [board.report.teacher_stream for board in boards]
    assert [stream.complete for stream in said if stream] == [False, False, True]
    assert [stream.answers for stream in said if stream] == [14, 28, 40]
    assert_reads(run, store)
    # One pod that asks for the same finds the three parts.
    single = text_job(store, prompts, samples=SAMPLES)
    teach(single, store, tmp_path, late := Clerk())
    assert late.asked == []


@pytest.mark.parametrize("applied", [True, False])
def test_a_writer_that_dies_at_any_request_asks_for_nothing_twice(
    s3: S3Server,  # noqa: F811
    prompts: str,
    tmp_path: Path,
    applied: bool,
) -> None:
    number, died = 0, True
    while died:
        store = s3.store()
        run = text_job(store, prompts, samples=SAMPLES)
        dying = Store(store.uri, endpoint=s3.endpoint, limits=replace(s3.limits, attempts=1))
        Faults(dying).die_at(number, applied=applied)
        first, second = Clerk(), Clerk()
        try:
            teach(run, dying, tmp_path, first)
            died = False
        except StoreError:
            there = committed(run, store)
            teach(run, store, tmp_path, second)
            assert sorted(second.asked) == sorted(set(ALL) - there)
        assert_reads(run, store)
        number += 1
    assert number > 10


def test_a_commit_whose_answer_is_lost_counts_once(
    store: Store, prompts: str, tmp_path: Path
) -> None:
    run = text_job(store, prompts, samples=SAMPLES)
    faults = Faults(store)
    clerk = Clerk(lambda request: faults.lose_answers("PUT"))
    teach(run, store, tmp_path, clerk)
    assert sorted(clerk.asked) == ALL
    assert_reads(run, store)


def test_what_was_answered_is_committed_when_the_teacher_fails(
    store: Store, prompts: str, tmp_path: Path
) -> None:
    """As when it is asked to stop."""
    run = text_job(store, prompts, samples=SAMPLES)

    def fail(request: TextRequest) -> None:
        if len(failing.asked) == 5:
            raise KeyboardInterrupt

    failing, second = Clerk(fail), Clerk()
    with pytest.raises(KeyboardInterrupt):
        teach(run, store, tmp_path, failing)
    assert committed(run, store) == set(failing.asked[:4])
    teach(run, store, tmp_path, second)
    assert sorted(failing.asked[:4] + second.asked) == ALL
    assert_reads(run, store)


def test_a_limit_needs_a_server_that_counts(store: Store, prompts: str, tmp_path: Path) -> None:
    endpoint = {"url": "http://x/v1", "model": "m", "price": {"outputPerMillion": 1}}

    def job(**limit: float) -> RunSpec:
        return text_job(
            store, prompts, samples=SAMPLES, teacher={"endpoint": {**endpoint, **limit}}
        )

    clerk = Clerk(counts=False)
    with pytest.raises(
        InputsRefused, match=r"endpoint.maxCost: found a server whose answers do not"
    ):
        teach(job(maxCost=3), store, tmp_path, clerk)
    assert len(clerk.asked) == 1
    assert committed(job(), store) == {(0, 0)}
    stream = teach(job(), store, tmp_path, Clerk(counts=False)).report.teacher_stream
    assert stream is not None and (stream.answers, stream.cost) == (len(ALL), 0.0)


def test_the_first_request_may_be_the_one_that_is_too_dear(
    s3: S3Server,  # noqa: F811
    store: Store,
    tmp_path: Path,
) -> None:
    shared = s3.store("dear")
    questions = ["the longest of all questions", *(f"question {n}" for n in range(8))]
    shared.put("q.jsonl", "".join(json.dumps({"q": q}) + "\n" for q in questions).encode())
    price = {"outputPerMillion": 1_000_000}  # 5 an answer
    endpoint = {"url": "http://x/v1", "model": "m", "price": price, "maxCost": 40}
    run = text_job(store, shared.uri_of("q.jsonl"), teacher={"endpoint": endpoint})
    clerk = Clerk()
    with pytest.raises(RunFailure, match=r"40 is spent, of at most 40 .* 8 of 9 answers"):
        teach(run, store, tmp_path, clerk)
    assert sorted(clerk.asked) == [(n, 0) for n in range(1, 9)]


def test_a_second_that_has_to_end_leaves_what_it_was_answered(store: Store, prompts: str) -> None:
    _, (first, second) = _writers(store, prompts)
    for n in (0, 1):
        first.add(n, TextAnswer(f"{n}"))
    for n in (1, 2):
        second.add(n, TextAnswer(f"{n}"))
    second.add(3, TextAnswer("3"))
    assert second.lost
    second.commit_all()
    assert second.committed == 4
    for n in (4, 5, 6, 7):
        first.add(n, TextAnswer(f"{n}"))
    assert first.lost
    first.stand_by()
    first.commit()
    assert first.committed == 8


def test_of_two_writers_one_goes_on(s3: S3Server, prompts: str, tmp_path: Path) -> None:  # noqa: F811
    one, other = s3.store("two"), s3.store("two")
    many = put_prompts(s3.store("many"), 300)
    together = threading.Barrier(2)

    def meet(request: TextRequest) -> None:
        if request.prompt == 0:
            together.wait(60)

    clerks = [Clerk(meet), Clerk(meet)]
    run = text_job(one, many)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(teach, run, store, tmp_path, clerk)
            for store, clerk in zip((one, other), clerks, strict=True)
        ]
        for job in jobs:
            job.result()
    asked = Counter(clerks[0].asked) + Counter(clerks[1].asked)
    assert set(asked) == {(n, 0) for n in range(300)}
    # The second learns at its first commit that it is second.
    assert asked.total() - len(asked) <= TextSettings().first_answers
    view = wait_for_text(one, identity_of(run, one), stall_seconds=0)
    assert len(read_text(view)) == 300
    log = view.logs[0]
    assert sum(shard.count for shard in log.shards) == 300
    left = {info.key for info in view.stream.list("partitions/0/shards/")}
    assert left == {shard.key for shard in log.shards}


def _writers(store: Store, prompts: str, count: int = 2) -> tuple[TextManifest, list[TextWriter]]:
    run = text_job(store, prompts, samples=SAMPLES)
    manifest = publish_manifest(
        store, TextManifest(identity=identity_of(run, store), partitions=1, prompts=PROMPTS)
    )
    settings = TextSettings(first_answers=2, patience_seconds=0)
    return manifest, [TextWriter(store, manifest, 0, settings=settings) for _ in range(count)]


def test_the_second_keeps_what_the_first_was_not_answered(store: Store, prompts: str) -> None:
    manifest, (first, second) = _writers(store, prompts)
    said = {n: TextAnswer(f"{n}") for n in range(manifest.requests)}
    for n in (0, 1):
        first.add(n, said[n])
    for n in (1, 2):
        second.add(n, said[n])
    assert (first.lost, second.lost) == (False, True)
    second.add(3, said[3])  # was under way
    assert second.committed == 2
    second.stand_by()  # the first one says no more
    second.commit()
    assert second.committed == 4
    assert next(second.missing()) == 4
    for n in second.missing():
        second.add(n, said[n])
    second.end()
    # The first comes back: what it was answered meanwhile is there.
    first.add(4, said[4])
    first.commit()
    first.stand_by()
    first.end()
    assert first.ended
    view = wait_for_text(store, manifest.identity, stall_seconds=0)
    assert read_text(view) == said


def test_a_partition_does_not_end_before_all_is_answered(store: Store, prompts: str) -> None:
    _, [writer] = _writers(store, prompts, 1)
    writer.add(0, TextAnswer("x"))
    with pytest.raises(ValueError, match="sample 1 of prompt 0 has no answer"):
        writer.end()
    assert writer.committed == 1


def test_an_old_answer_is_not_kept_waiting(store: Store, prompts: str) -> None:
    manifest, _ = _writers(store, prompts, 0)
    now = [0.0]
    settings = TextSettings(first_answers=100, seconds=20)
    writer = TextWriter(store, manifest, 0, settings=settings, clock=lambda: now[0])
    writer.add(0, TextAnswer("x"))
    now[0] = 19
    writer.add(1, TextAnswer("x"))
    assert writer.committed == 0
    now[0] = 20
    writer.add(2, TextAnswer("x"))
    assert writer.committed == 3


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_damaged_shard_is_named_and_only_its_answers_are_asked_again(
    store: Store, prompts: str, tmp_path: Path, how: str
) -> None:
    run = text_job(store, prompts, samples=SAMPLES)
    teach(run, store, tmp_path, Clerk())
    for version in range(2):
        view = view_of(run, store)
        assert view is not None
        shard = view.repairs[0].newest(view.logs[0].shards[1])
        data = view.stream.get(shard.key)
        if how == "delete":
            view.stream.delete([shard.key])
        else:
            flipped = data[:20] + bytes([data[20] ^ 1]) + data[21:]
            view.stream.put(shard.key, flipped if how == "flip" else data[:-9])
        words = "the shard is missing" if how == "delete" else "bytes with SHA-256"
        with pytest.raises(StreamDamaged, match=words) as error:
            read_text(view)
        assert error.value.uri == view.stream.uri_of(shard.key)
        after = view_of(run, store)
        assert after is not None and after.damaged
        teach(run, store, tmp_path, clerk := Clerk())
        assert sorted(clerk.asked) == [view.manifest.place(n) for n in requests_in(shard)]
        assert_reads(run, store)
        fresh = view_of(run, store)
        assert fresh is not None and not fresh.damaged
        # What was asked again was paid for again.
        assert fresh.totals.answer_tokens == 5 * (len(ALL) + shard.count)
        assert fresh.totals.answers == len(ALL)
        assert fresh.repairs[0].newest(fresh.logs[0].shards[1]).version == version + 1


def test_a_request_without_damage_asks_the_teacher_nothing(
    store: Store, prompts: str, tmp_path: Path
) -> None:
    run = text_job(store, prompts, samples=SAMPLES)
    teach(run, store, tmp_path, Clerk())
    view = view_of(run, store)
    assert view is not None
    view.repairs[0].ask(view.logs[0].shards[0], "a flip on the way")
    teach(run, store, tmp_path, clerk := Clerk())
    assert clerk.asked == []
    assert_reads(run, store)


def test_shards_that_are_gone_are_found_by_a_listing(
    store: Store, prompts: str, tmp_path: Path
) -> None:
    run = text_job(store, prompts, samples=SAMPLES)
    teach(run, store, tmp_path, Clerk())
    view = view_of(run, store)
    assert view is not None
    view.ask_for_missing()
    assert not view.damaged
    view.stream.delete([view.logs[0].shards[0].key])
    view.ask_for_missing()
    assert view.damaged


def test_a_stream_that_nobody_writes_is_not_waited_for_for_ever(store: Store, prompts: str) -> None:
    run = text_job(store, prompts, samples=SAMPLES)
    now = itertools.count()
    with pytest.raises(StreamStalled, match=r"s3://.*/streams/.*no answer was committed for 3 s"):
        wait_for_text(
            store, identity_of(run, store), stall_seconds=3,
            clock=lambda: float(next(now)), pause=lambda seconds: None,
        )  # fmt: skip


def test_a_student_waits_while_answers_come(store: Store, prompts: str, tmp_path: Path) -> None:
    run = text_job(store, prompts, samples=SAMPLES)
    waited = threading.Event()

    def hold_back(request: TextRequest) -> None:
        if len(clerk.asked) == 30:
            assert waited.wait(60)

    def pause(seconds: float) -> None:
        waited.set()
        writing.exception(60)

    clerk = Clerk(hold_back)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(teach, run, store, tmp_path, clerk)
        view = wait_for_text(store, identity_of(run, store), stall_seconds=60, pause=pause)
        writing.result()
    assert len(read_text(view)) == len(ALL)

"""`python -m kubedistill_trainer.checkpoint` on real prefixes: what it says, and its exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from kubedistill_trainer.checkpoint import CommitLog, pins
from kubedistill_trainer.checkpoint.__main__ import main
from kubedistill_trainer.checkpoint.errors import ForeignLog, LogTooNew
from kubedistill_trainer.checkpoint.history import Entry, replay
from kubedistill_trainer.checkpoint.inspection import Inspection, inspect
from kubedistill_trainer.checkpoint.inspection_view import MOST_ROWS, as_json, bytes_text, show
from kubedistill_trainer.checkpoint.log import slot_key
from kubedistill_trainer.checkpoint.records import VERSION, Commit, Fence, Reject
from kubedistill_trainer.checkpoint.retention import retire
from kubedistill_trainer.store import Store
from rich.console import Console
from run_kit import RUN, Run, described
from s3_fixture import Faults, S3Server, s3  # noqa: F401  (s3 is a fixture)
from test_checkpoint_records import signed


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    """Slots: FENCE, COMMIT 100, COMMIT 200, RETIRE of 100, FENCE 2, COMMIT 300."""
    store = s3.store()
    first = Run(store)
    old = first.commit(100)
    first.commit(200)
    retire(store, first.log, [old])
    Run(store, 2).commit(300)
    return store


Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(s3: S3Server, capsys: pytest.CaptureFixture[str]) -> Say:  # noqa: F811
    """Run a command; its exit code, output and errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main([*arguments, "--endpoint", s3.endpoint])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else -1
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        if "--json" not in arguments:
            assert all(len(line.rstrip()) <= 100 for line in captured.out.splitlines())
        return code, captured.out, captured.err

    return run


def row(output: str, slot: int) -> list[str]:
    return next(line.split() for line in output.splitlines() if line.split()[:1] == [str(slot)])


def test_a_good_run(store: Store, say: Say) -> None:
    code, out, _ = say("inspect", store.uri)
    assert code == 0
    assert f"run {RUN}" in out
    assert row(out, 0)[1:3] == ["FENCE", "1"]
    assert row(out, 0)[-1] == "over"
    assert row(out, 1)[-4:] == ["retired", "in", "slot", "3"]
    assert row(out, 3)[3:5] == ["→", "1"]
    assert row(out, 5)[1:4] == ["COMMIT", "2", "300"]
    assert row(out, 5)[-3:] == ["live,", "sizes", "right"]
    assert "A resume takes step 300 (slot 5)." in out
    assert "Nothing is damaged." in out
    code, out, err = say("inspect", store.uri, "--deep")
    assert code == 0
    assert "live, verified" in out
    assert err.splitlines() == [f"step {n}: 2 shards, 802 B, good" for n in (200, 300)]


def test_it_writes_nothing(store: Store, say: Say) -> None:
    before = list(store.list())
    faults = Faults(store)
    inspect(store, deep=True)
    assert {request.split()[0] for request in faults.requests} <= {"GET", "HEAD"}
    for command in ("inspect", "list"):
        say(command, store.uri)
    assert list(store.list()) == before


SHARD = "data/e2/s300/u300/state/a.pt"


@pytest.mark.parametrize(
    ("damage", "words", "only_deep"),
    [
        (lambda s: s.delete([SHARD]), f"slot 5: {SHARD} is missing", False),
        (lambda s: s.put(SHARD, b"x"), f"slot 5: {SHARD} has 1 bytes, committed were 800", False),
        (
            lambda s: s.put(SHARD, b"x" * 800),
            f"slot 5: {SHARD} is not what was committed: wrong CRC32C at offset 0",
            True,
        ),
        (lambda s: s.put(slot_key(5), b"{"), "slot 5 is unreadable: not JSON", False),
        (
            lambda s: s.delete([slot_key(2)]),
            "slot 2 is unreadable: the slot is empty and a later one is not",
            False,
        ),
    ],
)  # fmt: skip
def test_damage(
    store: Store, say: Say, damage: Callable[[Store], None], words: str, only_deep: bool
) -> None:
    damage(store)
    code, out, _ = say("inspect", store.uri)
    assert code == (0 if only_deep else 1)
    code, out, _ = say("inspect", store.uri, "--deep")
    assert code == 1
    assert words in " ".join(out.split())
    found: dict[str, Any] = json.loads(say("inspect", store.uri, "--deep", "--json")[1])
    assert len(found["findings"]) == 1
    assert found["resume"]["step"] in (200, 300)


@pytest.mark.parametrize(
    ("record", "refusal", "why", "finding"),
    [
        (
            signed(version=VERSION + 1, run=RUN),
            LogTooNew,
            "slot 6 is of a later version",
            "too new",
        ),
        (
            signed(run="o/o/o", restart=...),
            ForeignLog,
            f"slot 6 is of run o/o/o, and the log of run {RUN}",
            "foreign",
        ),
    ],
)
def test_a_log_that_the_program_refuses_promises_no_resume(
    store: Store, say: Say, record: bytes, refusal: type[Exception], why: str, finding: str
) -> None:
    store.put(slot_key(6), record)
    with pytest.raises(refusal):
        Run(store, 10)
    code, out, _ = say("inspect", store.uri)
    assert code == 1
    assert f"No resume: {why}" in " ".join(out.split())
    assert "A resume takes" not in out
    assert row(out, 5)[-3:] == ["live,", "sizes", "right"]
    found = json.loads(say("inspect", store.uri, "--json")[1])
    assert found["resume"] is None
    assert found["refusal"].startswith(why)
    assert found["passedOver"] == []
    assert [text.startswith(f"slot 6 is {finding}: ") for text in found["findings"]] == [True]


def test_a_resume_and_why_newer_ones_are_not_taken(store: Store, say: Say) -> None:
    third = Run(store, 3)
    rejected = third.commit(400)
    third.log.append(Reject, sequence=rejected.sequence, reason="shard missing")
    third.commit(500)
    store.delete(["data/e3/s500/u500/rng-00000.json", SHARD])
    code, out, _ = say("inspect", store.uri)
    assert code == 1
    text = " ".join(out.split())
    assert "A resume takes step 200 (slot 2)." in text
    assert "not slot 9 (step 500), it would be rejected: data/e3/s500/u500/rng" in text
    assert "not slot 7 (step 400), rejected: shard missing" in text
    assert f"not slot 5 (step 300), it would be rejected: {SHARD} is missing" in text


def test_what_lies_around(store: Store, say: Say) -> None:
    store.put("data/e1/s250/lost/a", b"x" * 2048)
    store.put("data/e1/s100/u100/late", b"x")  # of the retired commit
    store.put("notes.txt", b"hello")
    for ours in ("cursor/a.json", ".preflight/x"):
        store.put(ours, b"{}")
    pins.pin(store, CommitLog(store), 2)
    client = store._connection.client
    client.create_multipart_upload(Bucket=store.bucket, Key=f"{store.prefix}/data/e2/s9/u/a")
    code, out, _ = say("inspect", store.uri)
    assert code == 0, "nothing of it is damage"
    assert "data/e1/s250/lost 2.0 KiB: no commit names it" in " ".join(out.split())
    assert "slot 1, retired: the next clean-up deletes it" in out
    assert "slot 2: keeps step 200" in out
    assert "data/e2/s9/u/a  since 20" in out
    found = json.loads(say("inspect", store.uri, "--json")[1])
    assert found["strangers"] == ["notes.txt"]
    assert [upload["key"] for upload in found["uploads"]] == ["data/e2/s9/u/a"]
    assert [leftover["size_bytes"] for leftover in found["leftovers"]] == [1, 2048]


def test_a_commit_that_is_retired_meanwhile_is_no_damage(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Run(store, 3)
    head, done = Store.head, []

    def head_late(self: Store, key: str) -> Any:
        if not done:
            done.append(True)
            retire(store, writer.log, writer.log.commits()[:1])
            writer.commit(400)
        return head(self, key)

    monkeypatch.setattr(Store, "head", head_late)
    found = inspect(store)
    assert found.findings == []
    assert found.resume is not None
    assert found.resume.entry.sequence == len(found.slots) - 1


def test_list_pin_and_unpin(store: Store, say: Say) -> None:
    assert say("pin", store.uri, "--step", "200")[:2] == (0, "pinned slot 2: step 200, 802 B\n")
    code, out, _ = say("list", store.uri)
    assert code == 0
    assert [line.endswith("pinned") for line in out.splitlines()] == [True, False]
    listed = json.loads(say("list", store.uri, "--json")[1])
    assert [(c["slot"], c["step"], c["pinned"]) for c in listed] == [
        (2, 200, True),
        (5, 300, False),
    ]
    assert say("unpin", store.uri, "2")[0] == 0
    assert say("unpin", store.uri, "2")[0] == 2
    code, _, err = say("pin", store.uri, "--step", "100")
    assert code == 2
    assert "no usable commit of step 100; there are: 200, 300" in err
    code, _, err = say("pin", store.uri, "1")
    assert (code, "was retired (in slot 3)" in err) == (2, True)
    assert pins.pinned(store) == []


def test_prefixes_that_are_no_run(s3: S3Server, say: Say) -> None:  # noqa: F811
    above = s3.store()
    Run(above.child("team/student-1"))
    code, _, err = say("inspect", above.uri)
    assert code == 0, "the only run below it is meant"
    assert f"the run is {above.uri}/team/student-1" in err
    assert say("inspect", f"{above.uri}/team/student")[0] == 0, "a job's folder, without the uid"
    Run(above.child("team/student-2"))
    for place in (above.uri, f"{above.uri}/team/student"):
        code, _, err = say("inspect", place)
        assert code == 2
        assert f"2 runs are here; give one of them:\n  {above.uri}/team/student-1" in err
    code, _, err = say("inspect", s3.uri())
    assert (code, "holds nothing" in err) == (2, True)
    above.child("other").put("x", b"")
    code, _, err = say("inspect", f"{above.uri}/other")
    assert (code, "1 objects and no commit log" in err) == (2, True)


def test_a_slot_that_is_none_ends_in_a_message(store: Store, say: Say) -> None:
    store.put(slot_key(10**19), b"{}")
    code, _, err = say("inspect", store.uri)
    assert (code, "move it away" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "s3://nobody-made-this/x"], "bucket 'nobody-made-this' does not exist"),
        (["inspect", "http://x"], "not an S3 URI"),
        (["inspect"], "required: uri"),
        (["look", "s3://b/x"], "invalid choice"),
        (["pin", "s3://kubedistill/x"], "one of the arguments sequence --step is required"),
        (["pin", "s3://kubedistill/x", "-3"], "'-3' is not a number from 0 on"),
        (["pin", "s3://kubedistill/x", "--step", "ten"], "'ten' is not a number"),
    ],
)
def test_wrong_usage(say: Say, arguments: list[str], words: str) -> None:
    code, _, err = say(*arguments)
    assert (code, words in err) == (2, True), err


def run_alone(s3: S3Server, *arguments: str, **environment: str) -> tuple[int, str]:  # noqa: F811
    done = subprocess.run(
        [sys.executable, "-m", "kubedistill_trainer.checkpoint", *arguments],
        env={"AWS_EC2_METADATA_DISABLED": "true", "PATH": "", "HOME": "/nonexistent"} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_without_keys_or_a_server(s3: S3Server) -> None:  # noqa: F811
    code, err = run_alone(s3, "inspect", "s3://kubedistill/x", "--endpoint", s3.endpoint)
    assert (code, "no S3 credentials; set AWS_ACCESS_KEY_ID" in err) == (2, True), err
    code, err = run_alone(
        s3, "inspect", "s3://kubedistill/x", "--endpoint", "http://127.0.0.1:9", **s3.environment()
    )
    assert (code, "no usable answer from http://127.0.0.1:9" in err) == (2, True), err


def test_it_needs_no_torch() -> None:
    code = "import sys, kubedistill_trainer.checkpoint.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB"), (2**60, "1048576.0 TiB")],
)  # fmt: skip
def test_sizes(size_bytes: int, text: str) -> None:
    assert bytes_text(size_bytes) == text


def test_another_jobs_run_is_not_taken_for_a_jobs(s3: S3Server, say: Say) -> None:  # noqa: F811
    """`student-` begins `student-large-…` too."""
    above = s3.store()
    other = above.child("team/student-large-0c9f")
    CommitLog(other, fence=1, run="team/student-large/0c9f").take_over()
    code, _, err = say("inspect", f"{above.uri}/team/student")
    assert code == 2
    assert "holds nothing" in err
    assert say("pin", f"{above.uri}/team/student", "0")[0] == 2
    CommitLog(above.child("team/student-1d2e"), fence=1, run="team/student/1d2e").take_over()
    code, _, err = say("inspect", f"{above.uri}/team/student")
    assert code == 0
    assert "team/student-1d2e" in err


def test_keys_that_may_not_list_uploads_can_inspect_all_else(store: Store) -> None:
    def refuse(request: Any, **_event: Any) -> AWSResponse:
        body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
        raw = SimpleNamespace(stream=lambda *_: iter([body]))
        return AWSResponse(request.url, 403, {}, raw)

    client: Any = store._connection.client
    client.meta.events.register("before-send.s3.ListMultipartUploads", refuse)
    found = inspect(store)
    assert found.findings == []
    assert found.resume is not None
    assert "refuses these credentials" in found.uploads_unknown
    console = Console(width=100, record=True, file=io.StringIO())
    show(found, console)
    assert "not known: list uploads" in console.export_text()
    assert "refuses" in as_json(found)["uploadsUnknown"]


def test_a_log_of_years_is_shown_by_its_end() -> None:
    """A table of 100,000 rows takes minutes and is read by nobody."""
    fields: dict[str, Any] = {
        "nonce": "0" * 32, "fence": 1, "attempt": "a", "trainer_version": "1", "time": "2026-01-01",
    }  # fmt: skip
    shards = [described("a", b"x")]
    records = [
        Fence(**fields),
        *(
            Commit(**fields, step=n, world_size=1, data=f"data/e1/s{n}/u", shards=shards, cursor={},
                   config_digest="")
            for n in range(1, 3 * MOST_ROWS)
        ),
    ]  # fmt: skip
    slots = replay([Entry(n, record) for n, record in enumerate(records)])
    problems = {n: f"shard {n} is missing" for n in range(10, len(records) - 1)}
    found = Inspection("s3://b/p", RUN, False, slots, problems)
    console = Console(width=100, record=True, file=io.StringIO())
    show(found, console)
    text = console.export_text()
    assert "1,000 earlier slots are left out: --json has them" in text
    assert len(text.splitlines()) < 2 * MOST_ROWS + 30
    assert row(text, len(records) - 1)[-3:] == ["live,", "sizes", "right"]
    assert "and 989 more: --json has them" in text
    assert len(as_json(found)["slots"]) == len(records)
    found.problems[len(records) - 1] = "shard is missing"
    console = Console(width=100, record=True, file=io.StringIO())
    show(found, console)
    assert "nor 990 more: --json has them" in console.export_text()

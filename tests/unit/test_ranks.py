"""Whether the ranks of a pod are started again in place, and what a pod says at its end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.context import committed_file, trained_file
from kubedistill_trainer.ranks import End, Ranks, may_restart

KILLED, LOST, FINE = -signal.SIGKILL, int(ExitCode.PEER_LOST), 0


@pytest.mark.parametrize(
    ("raw", "restarts", "asked", "trained", "expected"),
    [
        ([KILLED], [], False, False, True),
        ([-signal.SIGSEGV, LOST], [], False, False, True),
        ([LOST, LOST], [], False, False, True),
        ([LOST], [], True, False, False),
        ([LOST], [], False, True, False),
        ([KILLED, int(ExitCode.OUT_OF_MEMORY)], [], False, False, False),
        ([int(ExitCode.FENCED)], [], False, False, False),
        ([int(ExitCode.UNKNOWN)], [], False, False, False),
        ([int(ExitCode.STORAGE_UNAVAILABLE), LOST], [], False, False, False),
        ([KILLED], [901.0, 902.0], False, False, True),
        ([KILLED], [901.0, 902.0, 903.0], False, False, False),
        ([KILLED], [100.0, 200.0, 300.0, 902.0, 903.0], False, False, True),
    ],
)
def test_only_kills_and_lost_peers_are_answered_in_place(
    raw: list[int], restarts: list[float], asked: bool, trained: bool, expected: bool
) -> None:
    ends = [End(rank, code) for rank, code in enumerate(raw)]
    found = may_restart(ends, restarts, 1000.0, in_vain=0, asked=asked, trained=trained)
    assert found is expected


@pytest.mark.parametrize(("in_vain", "expected"), [(0, True), (2, True), (3, False)])
def test_ranks_that_die_again_and_again_without_a_commit_are_the_operators(
    in_vain: int, expected: bool
) -> None:
    """However long each of their lives is."""
    found = may_restart([End(0, KILLED)], [], 1e6, in_vain=in_vain, asked=False, trained=False)
    assert found is expected


def program(folder: Path, text: str) -> str:
    """A module that stands for a rank; its pod's folder is in SCRATCH."""
    (folder / "as_rank.py").write_text(
        "import json, os, signal, sys, time\n"
        f"folder = {str(folder)!r}\n"
        "restart = json.loads(os.environ['KUBEDISTILL_RESTART'])\n" + text
    )
    return "as_rank"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


KILL = "os.kill(os.getpid(), signal.SIGKILL)\n"


def test_a_kill_is_followed_by_a_start_that_knows_of_it(folder: Path) -> None:
    text = (
        "if restart['number'] < 2: " + KILL + "open(folder + '/said', 'w').write(restart['reason'])"
    )
    code, _ = started(Ranks(1, folder, program(folder, text), in_place=True))
    assert code is ExitCode.SUCCESS
    assert (folder / "said").read_text() == "local rank 0 was ended by SIGKILL"


def started(ranks: Ranks) -> tuple[ExitCode, str]:
    ranks.start()
    code, outcome = ranks.wait()
    return code, outcome.message


def test_the_fourth_kill_is_the_pods_end(folder: Path) -> None:
    text = "open(folder + '/starts', 'a').write('x')\n" + KILL
    code, message = started(Ranks(1, folder, program(folder, text), in_place=True))
    assert (code, message) == (ExitCode.UNKNOWN, "local rank 0 was ended by SIGKILL")
    assert (folder / "starts").read_text() == "xxxx"


@pytest.mark.parametrize(("commits", "starts"), [(0, 4), (1, 7)])
def test_a_commit_gives_the_ranks_new_lives(
    folder: Path, monkeypatch: pytest.MonkeyPatch, commits: int, starts: int
) -> None:
    monkeypatch.setattr("kubedistill_trainer.ranks._WINDOW_SECONDS", 0.0)
    marker = committed_file(folder, 0)
    text = (
        "open(folder + '/starts', 'a').write('x')\n"
        f"if restart['number'] == {3 if commits else -1}: open({str(marker)!r}, 'w').close()\n"
        + KILL
    )
    code, _ = started(Ranks(1, folder, program(folder, text), in_place=True))
    assert code is ExitCode.UNKNOWN
    assert (folder / "starts").read_text() == "x" * starts


def test_a_teachers_processes_are_not_started_again(folder: Path) -> None:
    code, _ = started(Ranks(1, folder, program(folder, KILL)))
    assert code is ExitCode.UNKNOWN


def test_ranks_that_have_trained_do_not_come_back(folder: Path) -> None:
    marker = trained_file(folder, 0)
    text = f"open({str(marker)!r}, 'w').close()\nopen(folder + '/starts', 'a').write('x')\n" + KILL
    started(Ranks(1, folder, program(folder, text), in_place=True))
    assert (folder / "starts").read_text() == "x"


def test_restarted_ranks_that_do_not_meet_their_peers_end_the_pod(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kubedistill_trainer.ranks._JOIN_SECONDS", 1.0)
    text = "if restart['number'] == 0: " + KILL + "time.sleep(60)\n"
    code, message = started(Ranks(1, folder, program(folder, text), in_place=True))
    assert (code, message) == (ExitCode.UNKNOWN, "local rank 0 was ended by SIGKILL")


def test_ranks_that_had_nothing_to_commit_end_at_once_when_asked(folder: Path) -> None:
    ranks = Ranks(1, folder, program(folder, "time.sleep(60)\n"), in_place=True)
    ranks.start()
    ranks.forward(signal.SIGTERM, None)
    code, outcome = ranks.wait()
    assert (code, outcome.message) == (
        ExitCode.INTERRUPTED,
        "asked to stop before training began",
    )


def test_a_forked_rank_is_watched_like_any_other(folder: Path) -> None:
    def run(local_rank: int) -> None:
        if '"number":0' in os.environ["KUBEDISTILL_RESTART"]:
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "forked").write_text(os.environ["KUBEDISTILL_RESTART"])
        os._exit(0)

    ranks = Ranks(1, folder, in_place=True)
    ranks.fork = run  # type: ignore[assignment]  # it never returns
    code, _ = started(ranks)
    assert code is ExitCode.SUCCESS
    assert '"number":1' in (folder / "forked").read_text()


def test_a_sigterm_in_the_moment_of_the_fork_is_not_lost(folder: Path) -> None:
    """The child has its parent's handler until it has put it away."""
    parent = os.getpid()
    armed = [True]

    def strike() -> None:
        if armed[0] and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    def run(local_rank: int) -> None:
        time.sleep(30)  # as a rank that nobody has told of the signal

    ranks = Ranks(1, folder, in_place=True)
    ranks.fork = run  # type: ignore[assignment]  # it never returns
    usual = signal.signal(signal.SIGTERM, ranks.forward)
    os.register_at_fork(after_in_child=strike)
    try:
        ranks.start()
        armed[0] = False
        ranks.asked_to_stop = True  # the launcher got it too
        code, _ = ranks.wait()
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert code is ExitCode.INTERRUPTED


def test_a_sigterm_while_a_ranks_end_is_taken_in_ends_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler asks for ends too: a child can be reaped once only."""
    ranks = Ranks(1, folder, in_place=True)
    ranks.fork = lambda local_rank: os._exit(int(ExitCode.UNKNOWN))
    waitpid = os.waitpid

    def interrupted(pid: int, options: int) -> tuple[int, int]:
        found = waitpid(pid, options)
        if found[0] and not ranks.asked_to_stop:
            ranks.forward(signal.SIGTERM, None)
        return found

    ranks.start()
    monkeypatch.setattr(os, "waitpid", interrupted)
    code, _ = ranks.wait()
    assert code is ExitCode.UNKNOWN
    assert ranks.asked_to_stop

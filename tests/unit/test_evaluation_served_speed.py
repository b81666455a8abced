"""A real server's speed where its answers are odd: no figure that is wrong, no token unpaid."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from typing import Any

import pytest
from endpoint_kit import Fault, Server
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.teacher import Price
from kubedistill_trainer.evaluation.measure import measure_voice
from kubedistill_trainer.evaluation.results import Abilities, Performance
from kubedistill_trainer.evaluation.voice import NotAsked
from kubedistill_trainer.failures import RunFailure
from kubedistill_trainer.interrupt import interrupt
from kubedistill_trainer.teacher.tab import Tab
from test_evaluation_served import plan, voice

DONE = b"data: [DONE]\n\n"
PRICE = Price(input_per_million=1, output_per_million=1)


def pieces(count: int, used: dict[str, Any] | None) -> list[bytes]:
    found = [{"choices": [{"index": 0, "delta": {"content": f"{n} "}}]} for n in range(count)]
    last = [{"choices": [], "usage": used}] if used else []
    return [f"data: {json.dumps(piece)}\n\n".encode() for piece in [*found, *last]] + [DONE]


def speed(server: Server, tab: Tab | None = None, **settings: Any) -> Performance:
    with voice(server, tab=tab, **settings) as found:
        return found.speed()


def not_asked(server: Server, tab: Tab | None = None) -> NotAsked:
    with pytest.raises(NotAsked) as caught:
        speed(server, tab)
    return caught.value


def test_what_is_paid_for_beside_a_failure_counts(server: Server) -> None:
    # The last of the first eight at once.
    server.faults = [*[None] * (1 + 3 + 7), Fault(503)]
    tab = Tab()
    assert "503" in str(not_asked(server, tab))
    paid = [seen for seen in server.paid if seen.body["stream"]]
    assert len(paid) == 11
    each = tab.paid.tokens / 11
    assert each == int(each) > 64


def test_pieces_that_come_all_at_once_say_nothing_of_speed(server: Server) -> None:
    """As through a proxy that keeps an answer until it is whole."""
    used = {"prompt_tokens": 60, "completion_tokens": 32}
    at_once = Fault("pieces", body=[b"".join(pieces(32, used))], pause=0)
    server.faults = [at_once] * 40
    failure = not_asked(server)
    assert "in one piece each" in str(failure) and not failure.again


def test_hidden_reasoning_does_not_make_a_server_faster(server: Server) -> None:
    used = {"prompt_tokens": 60, "completion_tokens": 32,
            "completion_tokens_details": {"reasoning_tokens": 30}}  # fmt: skip
    server.faults = [Fault("pieces", body=pieces(2, used), pause=0.02)] * 40
    found = speed(server, concurrency=1)
    assert found.answer_tokens == 2
    assert found.paces[0].tokens_per_second < 60


def test_nobody_is_timed_for_an_unknown_price_under_a_limit(server: Server) -> None:
    server.faults = [Fault("pieces", body=pieces(9, None), pause=0.003)] * 40
    failure = not_asked(server, Tab(price=PRICE, left=1.0))
    assert "usage" in str(failure) and not failure.again
    assert len(server.seen) == 1
    # Without a limit nothing is to be kept.
    assert speed(server, Tab(price=PRICE), concurrency=1).answer_tokens == 9


def test_a_server_that_knows_no_pieces_is_asked_once_for_all(server: Server) -> None:
    server.streams = False
    tab = Tab()
    failure = not_asked(server, tab)
    assert "without pieces" in str(failure) and not failure.again
    assert tab.paid.tokens > 64


def test_nothing_is_asked_under_a_limit_where_nobody_counts(server: Server) -> None:
    said = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    server.faults = [Fault("other-body", body=said)] * 40
    found: Abilities
    with voice(server, tab=Tab(price=PRICE, left=1.0), concurrency=1) as asked:
        found = measure_voice(asked, plan())
    assert all("usage" in why for why in found.problems.values()) and not found.again
    assert set(found.problems) == {"chain_sum", "questions"}
    assert len(server.seen) == 2


def test_a_pod_that_is_asked_to_stop_does_not_wait_for_pieces(server: Server) -> None:
    server.faults = [*[None] * (1 + 3 + 7), Fault("hang", pause=60)]

    def stop() -> None:
        while len(server.paid) < 11 or server.open > 1:
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    tab, stopper, before = Tab(), threading.Thread(target=stop), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, interrupt)
    stopper.start()
    try:
        with pytest.raises(RunFailure) as caught:
            speed(server, tab)
    finally:
        stopper.join()
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == ExitCode.INTERRUPTED
    # It hangs still; what came beside it counts.
    assert server.seen[-1].left == 0 or server.seen[-1].left - server.seen[-1].came < 30
    assert tab.paid.tokens > 11 * 64

"""What the operator makes of the API server's answers: their dates, and those that are of no use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from kubedistill_operator.cache import Cache
from kubedistill_operator.clock import ServerClock
from kubedistill_operator.cluster import DISTILLATION_JOBS, Cluster, NotLeading
from kubedistill_operator.queue import WorkQueue
from kubedistill_operator.settings import Settings
from kubedistill_operator.watch import Resync, Watcher
from kubedistill_operator.watching import _told
from kubernetes.aio import client

HOUR = timedelta(hours=1)


class Server:
    """Answers everything with one text; its clock is ahead."""

    def __init__(self) -> None:
        self.text = '{"items": []}'
        self.ahead = timedelta(0)
        self.failures = 0
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.asked = asyncio.Event()
        self.methods: list[str] = []
        self.cluster: Cluster

    async def answer(self, request: web.Request) -> web.Response:
        self.methods.append(request.method)
        self.asked.set()
        await self.goes_on.wait()
        if self.failures:
            self.failures -= 1
            return web.json_response({"reason": "InternalError"}, status=500)
        date = format_datetime(datetime.now(UTC) + self.ahead, usegmt=True)
        return web.Response(text=self.text, headers={"Date": date})

    async def ask(self, times: int = 1) -> None:
        for _ in range(times):
            assert [one async for one in self.cluster.list(DISTILLATION_JOBS)] == []

    def seconds_ahead(self) -> float:
        return (self.cluster.clock.now() - datetime.now(UTC)).total_seconds()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    found, app = Server(), web.Application()
    app.router.add_route("*", "/{path:.*}", found.answer)
    async with TestServer(app) as running:
        configuration = client.Configuration(host=f"http://127.0.0.1:{running.port}")
        configuration.connection_pool_maxsize = 1
        found.cluster = Cluster(client.ApiClient(configuration=configuration))
        yield found
        await found.cluster.close()


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
async def test_the_time_is_the_api_servers(server: Server, ahead: timedelta) -> None:
    server.ahead = ahead
    await server.ask(times=4)
    assert abs(server.seconds_ahead() - ahead.total_seconds()) < 60


@pytest.mark.parametrize("lie", [HOUR, -HOUR])
async def test_an_answer_with_another_time_than_the_others_changes_nothing(
    server: Server, lie: timedelta
) -> None:
    await server.ask(times=3)
    server.ahead = lie
    await server.ask()
    assert abs(server.seconds_ahead()) < 60


def test_a_clock_that_is_right_to_a_second_is_left_alone() -> None:
    """Dates are whole seconds: times of plans would jump to and fro."""
    now = 1000.0
    clock = ServerClock(steady=lambda: now)
    before = clock.now()
    for _ in range(9):
        clock.heard(format_datetime(datetime.fromtimestamp(int(time.time()), UTC), usegmt=True))
    clock.heard(None)
    clock.heard("no date")
    assert clock.now() == before


@pytest.mark.parametrize("text", ['{"items": [{"meta', "", "[]", "<html>"])
async def test_an_answer_without_an_object_is_a_failure(server: Server, text: str) -> None:
    """It was taken for a list in which nothing is: every object was forgotten."""
    server.text = text
    with pytest.raises(aiohttp.ClientPayloadError, match="without an object"):
        await server.ask()


async def test_the_first_listing_is_asked_for_again(server: Server) -> None:
    """A failure of it ended the operator."""
    server.failures = 2
    cache, queue = Cache(), WorkQueue()
    resync = Resync(server.cluster, cache, Watcher(cache, queue), queue, Settings())
    await resync.first()
    assert server.failures == 0


@pytest.mark.parametrize(("slips_in", "said"), [("request_cancel_callback", 0), ("other", 1)])
def test_of_failures_that_nobody_awaits_kopfs_known_one_is_no_news(
    slips_in: str, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Its request that is under way when it is to end asks for a task that it is not in."""

    def slip() -> None:
        raise AssertionError

    slip.__qualname__ = f"stream.<locals>.{slips_in}"
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(_told)
    loop.call_soon(slip)
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == said


async def test_a_write_that_waited_for_a_connection_is_not_made_by_one_that_leads_no_more(
    server: Server,
) -> None:
    """A leader was paused between its look at the lease and its call, and made the call when it woke,
    while another led (make chaos SEED=0 FAMILY=operator-pause CASE=4)."""
    leads = True
    server.cluster.may_write = lambda: leads
    server.goes_on.clear()
    asked = asyncio.create_task(server.ask())
    await server.asked.wait()
    delete = server.cluster.delete(DISTILLATION_JOBS, "default", "one")
    write = asyncio.create_task(delete)
    await asyncio.sleep(0.1)
    leads = False
    server.goes_on.set()
    await asked
    with pytest.raises(NotLeading):
        await write
    assert server.methods == ["GET"]
    leads = True
    await server.cluster.delete(DISTILLATION_JOBS, "default", "one")
    assert server.methods == ["GET", "DELETE"]

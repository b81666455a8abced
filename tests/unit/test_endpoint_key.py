"""The key of a teacher's server: sent, and never said."""

from __future__ import annotations

import logging

import pytest
from endpoint_kit import Fault, Server
from kubedistill_trainer.failures import InputsRefused
from unit.test_endpoint_kit import KEY, asked, endpoint, requests


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", KEY)


def test_the_key_is_sent_and_never_said(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    server.key = KEY
    server.faults = [Fault(500), Fault("reset"), Fault("half")]
    asked(endpoint(server))
    assert {seen.key for seen in server.seen} == {KEY}
    server.key = "another"
    with pytest.raises(InputsRefused) as met:
        asked(endpoint(server))
    assert "Incorrect API key provided: ***" in met.value.message
    written = caplog.text + "".join(capfd.readouterr()) + repr(met.value) + repr(met.value.__dict__)
    assert "asked again" in caplog.text
    assert KEY not in written


def test_a_keys_newline_is_not_part_of_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", f"{KEY}\n")
    asked(endpoint(server), wanted=requests(1))
    assert server.seen[0].key == KEY
    monkeypatch.setenv("API_KEY", "sk-\nbroken")
    with pytest.raises(InputsRefused, match=r"endpoint\.secretRef") as met:
        asked(endpoint(server), wanted=requests(1))
    assert "broken" not in met.value.message


def test_without_a_key_none_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("API_KEY")
    asked(endpoint(server), wanted=requests(1))
    assert server.seen[0].key == ""

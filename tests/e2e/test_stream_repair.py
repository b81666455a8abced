"""A teacher's stream that loses a shard between jobs, and one whose shard rots unseen."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.kit import SLOW_SECONDS, Team

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2 * SLOW_SECONDS)]

SHORT: dict[str, Any] = {"training": {"maxSteps": 4}, "workers": {"nodes": 1}}


@pytest.fixture(scope="module")
def stream(team: Team) -> str:
    """The address of a complete stream that one job has used."""
    team.apply(team.tuned("giver", **SHORT), team.distilled("first", "giver", **SHORT))
    return str(team.ends("first", "Completed")["teacherStream"]["uri"])


def _a_shard(team: Team, stream: str) -> str:
    return min(key for key in team.objects(stream) if key.endswith(".shard"))


def _at(stream: str, key: str) -> dict[str, str]:
    bucket, _, prefix = stream.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": f"{prefix}/{key}"}


def _repairs(team: Team, stream: str) -> list[str]:
    found = (key for key in team.objects(stream) if "/repairs/" in key)
    return sorted(key.rsplit("/", 1)[1] for key in found)


def test_a_missing_shard_is_written_before_the_student_starts(team: Team, stream: str) -> None:
    team.handle.s3.client().delete_object(**_at(stream, _a_shard(team, stream)))
    team.apply(team.distilled("second", "giver", **SHORT))
    status = team.ends("second", "Completed")
    assert len(status["attempts"]) == 1
    assert team.condition("second", "TeacherReady")["reason"] == "StreamComplete"
    assert _repairs(team, stream) == ["000001.asked", "000001.json"]


def test_a_rotten_shard_ends_the_attempt_and_the_next_has_it_whole(team: Team, stream: str) -> None:
    team.apply(team.distilled("third", "giver", **SHORT))
    assert team.ends("third", "Completed")["resolved"]["streamComplete"]
    assert team.condition("third", "TeacherReady")["reason"] == "NotNeeded"
    key = _a_shard(team, stream)
    data = bytearray(team.objects(stream)[key])
    data[len(data) // 2] ^= 1
    team.handle.s3.client().put_object(**_at(stream, key), Body=bytes(data))
    team.apply(team.distilled("fourth", "giver", **SHORT))
    status = team.ends("fourth", "Completed")
    assert [a["reason"] for a in status["attempts"]] == ["StreamDamaged", "Completed"], status
    first = status["attempts"][0]
    assert key in first["message"]
    assert "SHA-256" in first["message"]
    assert team.condition("fourth", "TeacherReady")["reason"] == "StreamComplete"
    assert team.weights("fourth") == team.weights("third")

"""What changed between two configurations, in words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_trainer.checkpoint.configuration import differences

configs = st.dictionaries(
    st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=5)
)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({}, {}, []),
        ({"a": 1}, {"a": 1.0}, []),
        (
            {"training.learningRate": 0.001},
            {"training.learningRate": 0.002},
            ["training.learningRate: committed under 0.001, now 0.002"],
        ),
        ({"a": True}, {"a": 1}, ["a: committed under true, now 1"]),
        ({"a": 0}, {"a": False}, ["a: committed under 0, now false"]),
        ({"a": [1, True]}, {"a": [1, 1]}, ["a: committed under [1, true], now [1, 1]"]),
        ({"a": {"b": 1}}, {"a": {"b": 1.0}}, []),
        ({"a": "x"}, {}, ['a: committed under "x", now not set']),
        ({}, {"a": None}, ["a: committed without it, now null"]),
        ({"b": 1, "a": 1}, {}, [f"{n}: committed under 1, now not set" for n in "ab"]),
    ],
)
def test_differences(old: dict[str, Any], new: dict[str, Any], words: list[str]) -> None:
    assert differences(old, new) == words


def test_a_long_value_is_cut() -> None:
    (said,) = differences({"a": "x" * 1000}, {"a": 1})
    assert len(said) < 100
    assert "…, now 1" in said


@given(old=configs, new=configs)
def test_equal_configurations_and_only_they_have_no_differences(
    old: dict[str, Any], new: dict[str, Any]
) -> None:
    typed = [sorted((k, type(v).__name__, repr(v)) for k, v in c.items()) for c in (old, new)]
    assert (differences(old, new) == []) == (typed[0] == typed[1])
    assert differences(old, old) == []

"""What is sent as YAML is read as what was meant, whatever a container's last words were."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kubedistill_operator.wire import yaml_safe_json


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_yaml_reads_what_json_meant(text: str) -> None:
    body = {"message": text, text: [text, 1, None, 2.5e-7, True]}
    sent = yaml_safe_json(body)
    assert json.loads(sent) == body
    assert yaml.safe_load(sent.encode())["message"] == text


@pytest.mark.parametrize("text", ["half \ud83d", "\udcff bytes", "\ud83d\ude00"])
def test_surrogates_become_the_replacement_character(text: str) -> None:
    read = yaml.safe_load(yaml_safe_json({"m": text}).encode())["m"]
    assert read == "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)

"""Hypothesis over the schema of a CRD: values that fit it, values that do not, and edits of an object."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

Schema = dict[str, Any]
Path_ = tuple[str, ...]
JOB, CHAIN = "DistillationJob", "DistillationChain"
_CRDS = Path(__file__).parents[2] / "crds"
_DEPTH = 4
# What the pods run is the test's own; of a chain's template only the parts are edited.
_LEFT_ALONE = ("template",)
# Beyond these, a bad value of one kind is as good as another's.
_HOSTILE: list[Any] = [
    None, "", " ", "\u0000", "x" * 3000, "é\U0001f600", "1e999", -1, 0, 2**31, 2**63, 1e308, -0.5,
    True, [], {}, [[]], {"": ""}, "s3://", "s3://b/../x", "http://127.0.0.1:1",
]  # fmt: skip


def spec_schema(kind: str) -> Schema:
    """Of the spec of a kind."""
    crd = yaml.safe_load((_CRDS / f"kubedistill.dev_{kind.lower()}s.yaml").read_text())
    found: Schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return found


def paths(schema: Schema, at: Path_ = ()) -> Iterator[tuple[Path_, Schema]]:
    """Every field of an object, and of the objects in it."""
    for name, part in schema.get("properties", {}).items():
        if name not in _LEFT_ALONE:
            yield (*at, name), part
        elif "student" not in part.get("properties", {}):
            continue
        yield from paths(part, (*at, name))


def values(schema: Schema, depth: int = _DEPTH) -> st.SearchStrategy[Any]:
    """Values that the schema, its CEL rules apart, allows."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        shared = {key: part for key, part in schema.items() if key != "anyOf"}
        return st.one_of([values({**shared, **option}, depth) for option in schema["anyOf"]])
    kind = schema.get("type")
    if kind == "object":
        return _objects(schema, depth)
    if kind == "array":
        most = min(schema.get("maxItems", 3), schema.get("minItems", 0) + 2)
        inner = values(schema.get("items", {}), depth - 1)
        return st.lists(inner, min_size=schema.get("minItems", 0), max_size=most)
    if kind == "string":
        return _strings(schema)
    if kind == "boolean":
        return st.booleans()
    low, high = schema.get("minimum"), schema.get("maximum")
    if kind == "integer":
        return st.integers(0 if low is None else int(low), 2**31 - 1 if high is None else int(high))
    if kind == "number":
        return st.floats(
            0 if low is None else low,
            1e6 if high is None else high,
            exclude_min=bool(schema.get("exclusiveMinimum")),
            exclude_max=bool(schema.get("exclusiveMaximum")),
            allow_nan=False,
        )
    return st.sampled_from(_HOSTILE)


def _objects(schema: Schema, depth: int) -> st.SearchStrategy[Any]:
    known = {
        name: part for name, part in schema.get("properties", {}).items() if name not in _LEFT_ALONE
    }
    needed = set(schema.get("required", []))
    if depth <= 0:
        known = {name: part for name, part in known.items() if name in needed}
    return st.fixed_dictionaries(
        {name: values(part, depth - 1) for name, part in known.items() if name in needed},
        optional={
            name: values(part, depth - 1) for name, part in known.items() if name not in needed
        },
    )


def _strings(schema: Schema) -> st.SearchStrategy[str]:
    low, high = schema.get("minLength", 0), min(schema.get("maxLength", 200), 200)
    if "pattern" in schema:
        # `$` of Python also matches before a last line feed.
        pattern = schema["pattern"].replace("$", r"\Z")
        return st.from_regex(pattern).filter(lambda text: low <= len(text) <= high)
    return st.text(min_size=low, max_size=high)


def edits(schema: Schema, *, fitting: bool = False) -> st.SearchStrategy[list[tuple[Path_, Any]]]:
    """One to three fields, each with a value that fits it or, unless `fitting`, a hostile one."""
    fields = list(paths(schema))

    def of(field: tuple[Path_, Schema]) -> st.SearchStrategy[tuple[Path_, Any]]:
        fits = values(field[1])
        value = fits if fitting else st.one_of(fits, st.sampled_from(_HOSTILE))
        return st.tuples(st.just(field[0]), value)

    one = st.sampled_from(fields).flatmap(of)
    return st.lists(one, min_size=1, max_size=1 if fitting else 3)


def edited(spec: dict[str, Any], changes: list[tuple[Path_, Any]]) -> dict[str, Any]:
    """A copy of a spec with some fields put."""
    result = copy.deepcopy(spec)
    for path, value in changes:
        inner = result
        for name in path[:-1]:
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
            inner = inner[name]
        inner[path[-1]] = value
    return result

"""Pydantic model → structural OpenAPI v3 schema, as a CustomResourceDefinition wants it.

Rules of a structural schema: every node has a type, no $ref, no null types. Defaults of objects
become `{}`, so that the defaults of their own fields apply. See "Specifying a structural schema"
in the Kubernetes documentation.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from kubedistill_api.base import UNTYPED_MARK
from kubedistill_api.chain import PARTIAL_MARK, STAGE_MARK
from kubedistill_api.job import DistillationJobSpec

_DEFAULT_MAX_LENGTH = 1024
_INT_OR_STRING = "x-kubernetes-int-or-string"
_KEPT = (
    "type", "description", "enum", "pattern", "minLength", "maxLength", "minItems", "maxItems",
    "minimum", "maximum", "format", "x-kubernetes-validations", "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys", "x-kubernetes-preserve-unknown-fields", _INT_OR_STRING,
)  # fmt: skip


class UnsupportedSchemaError(TypeError):
    """A model uses something that has no structural form."""


def structural(model: type[BaseModel]) -> dict[str, Any]:
    """The structural schema of a model, ready for `openAPIV3Schema.properties`."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return _convert(schema, schema.get("$defs", {}), model.__name__)


def partial_job_spec() -> dict[str, Any]:
    """A job's spec with nothing required, no default and no rule: a part to be merged."""
    return _loosen(structural(DistillationJobSpec))


def _convert(node: dict[str, Any], definitions: dict[str, Any], path: str) -> dict[str, Any]:
    node = _inline(node, definitions)
    if node.get(PARTIAL_MARK):
        partial = partial_job_spec()
        return {**partial, "description": node.get("description", ""), **_default_of(node)}
    node = _without_null(node, definitions, path)
    if _INT_OR_STRING in node:
        # The mark stands in place of the type.
        return {key: node[key] for key in _KEPT if key in node} | _default_of(node)
    if "const" in node:
        node = {**node, "enum": [node["const"]]}
    if "type" not in node:
        raise UnsupportedSchemaError(f"{path}: no type in {node}")
    result = {key: node[key] for key in _KEPT if key in node}
    _convert_bounds(node, result)
    if UNTYPED_MARK in node:
        # Without a type, which Kubernetes allows only where it keeps unknown fields.
        del result["type"]
        result |= {"x-kubernetes-preserve-unknown-fields": True, "pattern": node[UNTYPED_MARK]}
    if node["type"] == "object" and "properties" in node:
        result["properties"] = {
            name: _convert(child, definitions, f"{path}.{name}")
            for name, child in node["properties"].items()
        }
        if node.get(STAGE_MARK):
            # A stage is a part of a job's spec beside its name; suspension belongs to the chain.
            part = partial_job_spec()["properties"]
            result["properties"] |= {k: v for k, v in part.items() if k != "suspend"}
        if node.get("required"):
            result["required"] = sorted(node["required"])
    elif node["type"] == "array":
        if "maxItems" not in node:
            raise UnsupportedSchemaError(f"{path}: a list needs max_length")
        result["items"] = _convert(node["items"], definitions, f"{path}[]")
    elif node["type"] == "string" and "enum" not in node:
        result.setdefault("maxLength", _DEFAULT_MAX_LENGTH)
    result.update(_default_of(node))
    return result


def _inline(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Replace $ref (alone or within a one-element allOf) by what it names; own keywords win."""
    while True:
        if "$ref" in node:
            target = definitions[node["$ref"].rsplit("/", 1)[-1]]
        elif len(node.get("allOf", ())) == 1:
            target = node["allOf"][0]
        else:
            return node
        own = {key: value for key, value in node.items() if key not in ("$ref", "allOf")}
        node = {**target, **own}


def _without_null(node: dict[str, Any], definitions: dict[str, Any], path: str) -> dict[str, Any]:
    if "anyOf" not in node:
        return node
    options = [option for option in node["anyOf"] if option.get("type") != "null"]
    if len(options) != 1:
        raise UnsupportedSchemaError(f"{path}: a union of several types")
    own = {key: value for key, value in node.items() if key != "anyOf"}
    return {**_inline(options[0], definitions), **own}


def _convert_bounds(node: dict[str, Any], result: dict[str, Any]) -> None:
    for exclusive, inclusive in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in node:
            result[inclusive] = node[exclusive]
            result[exclusive] = True


def _default_of(node: dict[str, Any]) -> dict[str, Any]:
    default = node.get("default")
    if default is None:
        return {}
    return {"default": {} if isinstance(default, dict) else default}


def _loosen(node: dict[str, Any]) -> dict[str, Any]:
    result = {
        key: value
        for key, value in node.items()
        if key not in ("required", "default", "x-kubernetes-validations")
    }
    if "properties" in node:
        result["properties"] = {name: _loosen(child) for name, child in node["properties"].items()}
    if "items" in node:
        result["items"] = _loosen(node["items"])
    return result

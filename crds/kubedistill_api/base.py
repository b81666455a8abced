"""What every model of the API shares: camelCase on the wire, unknown fields refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

GROUP = "kubedistill.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
JOB_KIND = "DistillationJob"
CHAIN_KIND = "DistillationChain"
JOB_PLURAL = "distillationjobs"
CHAIN_PLURAL = "distillationchains"


class ApiModel(BaseModel):
    """A part of a custom resource: camelCase on the wire, snake_case in Python."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        ser_json_inf_nan="strings",
    )

    def to_wire(self) -> dict[str, Any]:
        """The JSON object as the API server stores it: aliases, no nulls."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def cel(rule: str, message: str, field_path: str = "") -> dict[str, Any]:
    """One `x-kubernetes-validations` entry; `field_path` is relative to the model that has it."""
    entry: dict[str, Any] = {"rule": rule, "message": message}
    if field_path:
        entry["fieldPath"] = field_path
    return entry


def rules(entries: Iterable[dict[str, Any]]) -> ConfigDict:
    """Model configuration that carries CEL rules into the CRD."""
    return ConfigDict(json_schema_extra={"x-kubernetes-validations": list(entries)})


UNTYPED_MARK = "x-kubedistill-number-or"


def number_or(message: str) -> dict[str, Any]:
    """For a number that some YAML reader makes a string of: the API server then says `message`.

    A schema's own words for a wrong type ("must be of type number") cannot be replaced, and no rule
    is asked once a type is wrong. So the field has no type in the CRD, its bounds hold for numbers,
    and a string must match a pattern that reads as the message, beside which the server prints what
    it found. Whatever else may stand there is refused by the operator.
    """
    return {UNTYPED_MARK: f"^{message}$"}

"""How often the training's state is committed, how fast it goes to the store, how much is kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema

from kubedistill_api.base import ApiModel

_MOST_STEPS = 1_000_000


def _interval(value: Any) -> Any:
    if value == "Auto" or (
        isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_STEPS
    ):
        return value
    raise ValueError(f"write Auto, or a number of steps from 1 to {_MOST_STEPS}")


Interval = Annotated[
    int | Literal["Auto"],
    PlainValidator(_interval),
    PlainSerializer(lambda value: value, return_type=Any),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            # Of a string; the bounds are of a number.
            "pattern": "^Auto$",
            "maxLength": 4,
            "minimum": 1,
            "maximum": _MOST_STEPS,
        }
    ),
]


class Checkpoint(ApiModel):
    """How often state is committed, and how much of it is kept."""

    interval: Interval = Field(
        "Auto",
        description="Steps between commits, or Auto: as often as is worth it, by the time that a "
        "save takes of the training and by the failures seen.",
    )
    keep_last: int = Field(3, ge=1, le=100, description="Commits that are kept.")
    max_bandwidth: str | None = Field(
        None,
        max_length=32,
        pattern=r"^[1-9][0-9]*(k|M|G|Ki|Mi|Gi)?$",
        description="Bytes a second that a rank uploads at most, such as 200Mi; without it, as fast "
        "as it goes.",
    )

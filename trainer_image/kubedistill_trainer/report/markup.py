"""HTML and SVG elements. Whatever is not markup is escaped: there is no way around it."""

from __future__ import annotations

from html import escape
from typing import TypeAlias


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child: TypeAlias = "str | Markup | None"
_VOID = {"meta"}


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """One element. `class_` is class, `stroke_width` is stroke-width; None leaves it out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: Child) -> Markup:
    """Children in a row; plain text is escaped, None is nothing."""
    return Markup(
        "".join(c if isinstance(c, Markup) else escape(c) for c in children if c is not None)
    )


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"

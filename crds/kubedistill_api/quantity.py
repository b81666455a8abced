"""Kubernetes quantities such as 16Gi."""

from __future__ import annotations

import re
from decimal import Decimal

_SUFFIXES = {
    "": Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3), "M": Decimal(10**6),
    "G": Decimal(10**9), "T": Decimal(10**12), "P": Decimal(10**15), "E": Decimal(10**18),
    "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40),
    "Pi": Decimal(2**50), "Ei": Decimal(2**60),
}  # fmt: skip
_PATTERN = re.compile(r"^([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)$")


def to_bytes(quantity: str | int | float | None) -> int | None:
    """Bytes of a quantity, rounded down; None for none or for what is no quantity."""
    if quantity is None:
        return None
    match = _PATTERN.match(str(quantity).strip())
    if match is None or match.group(2) not in _SUFFIXES:
        return None
    return int(Decimal(match.group(1)) * _SUFFIXES[match.group(2)])

"""JSON that a YAML parser reads as the same thing: server-side apply is only taken as YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def yaml_safe_json(body: Mapping[str, Any]) -> str:
    """`body` as JSON that is YAML too, strings included.

    JSON writes characters beyond U+FFFF as two escapes, which YAML refuses; so they go as they are.
    What YAML does not take unescaped, or takes for a line break, is escaped. Half a surrogate pair,
    as a cut message may hold, is no character anywhere: it becomes U+FFFD.
    """
    text = json.dumps(body, ensure_ascii=False)
    text = _SURROGATE.sub("\ufffd", text)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found.group()):04x}", text)

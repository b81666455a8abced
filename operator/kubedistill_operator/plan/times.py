"""Times as the API writes them, and durations as people read them."""

from __future__ import annotations

from datetime import UTC, datetime


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str | None) -> datetime | None:
    """The inverse of `format_time`; also reads fractions and offsets. None for no time."""
    if not text:
        return None
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def seconds_since(text: str | None, now: datetime) -> float:
    """Seconds from a written time to now; infinite for no time."""
    moment = parse_time(text)
    return (now - moment).total_seconds() if moment else float("inf")


def duration_text(seconds: float | None) -> str:
    """Such as 42s, 7m, 3h12m, 2d4h; empty for None."""
    if seconds is None or seconds < 0 or seconds != seconds or seconds == float("inf"):
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 600:
        return f"{whole // 60}m{whole % 60}s" if whole % 60 else f"{whole // 60}m"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes}m"
    hours = minutes // 60
    if hours < 48:
        return f"{hours}h{minutes % 60}m"
    return f"{hours // 24}d{hours % 24}h"

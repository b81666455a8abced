"""An Inspection for people (100 columns) and for programs (JSON)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kubedistill_trainer.checkpoint.history import Slot, State
from kubedistill_trainer.checkpoint.inspection import Inspection
from kubedistill_trainer.checkpoint.records import Commit, Record, Reject, Retire

WIDTH = 100
MOST_ROWS = 500
"""Of a list. A log of years has more than a person reads, or a terminal takes in time."""
_COLOURS = {
    State.LIVE: "green",
    State.IN_FORCE: "green",
    State.RETIRED: "dim",
    State.OVER: "dim",
    State.APPLIED: "dim",
    State.REJECTED: "yellow",
    State.FENCED_OUT: "yellow",
    State.FOREIGN: "bold red",
    State.UNREADABLE: "bold red",
    State.TOO_NEW: "bold red",
}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def bytes_text(size_bytes: int) -> str:
    """`1.5 GiB`."""
    size, unit = float(size_bytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size_bytes} B" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def show(found: Inspection, console: Console) -> None:
    """Print it."""
    console.print(Text(found.uri, "bold", overflow="fold"))
    if found.run:
        console.print(Text(f"run {found.run}", "dim", overflow="fold"))
    if (earlier := len(found.slots) - MOST_ROWS) > 0:
        console.print(Text(f"{earlier:,} earlier slots are left out: --json has them", "dim"))
    console.print(_log_table(found))
    for line in _verdict(found):
        console.print(line)
    console.print(_rest(found))


def as_json(found: Inspection) -> dict[str, Any]:
    """Everything in it, with names and sizes as they are."""
    resume = found.resume
    return {
        "uri": found.uri,
        "run": found.run,
        "deep": found.deep,
        "slots": [_slot_json(slot, found) for slot in found.slots],
        "resume": _slot_json(resume, found) if resume else None,
        "refusal": found.refusal,
        "passedOver": [{"slot": s.entry.sequence, "why": why} for s, why in found.passed_over],
        "findings": found.findings,
        "leftovers": [asdict(leftover) for leftover in found.leftovers],
        "pins": [asdict(pin) for pin in found.pins],
        "uploads": [
            {"key": u.key, "id": u.id, "initiated": u.initiated.isoformat()} for u in found.uploads
        ],
        "uploadsUnknown": found.uploads_unknown,
        "strangers": [info.key for info in found.strangers],
    }


def _slot_json(slot: Slot, found: Inspection) -> dict[str, Any]:
    record = slot.entry.record
    said: dict[str, Any] = {
        "slot": slot.entry.sequence,
        "state": str(slot.state),
        "reason": slot.reason or slot.entry.problem,
    }
    if record is not None:
        said |= {name: getattr(record, name) for name in ("kind", "fence", "attempt", "time")}
    if isinstance(record, Commit):
        said |= {
            "step": record.step,
            "sizeBytes": record.size_bytes,
            "shards": len(record.shards),
            "data": record.data,
            "problem": found.problems.get(slot.entry.sequence, ""),
        }
    return said


def _log_table(found: Inspection) -> Table:
    table = Table(width=WIDTH, box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name, right in (("slot", True), ("kind", False), ("fence", True), ("step", True)):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("shards", justify="right", no_wrap=True)
    table.add_column("attempt", overflow="ellipsis", no_wrap=True, max_width=14)
    table.add_column("time (UTC)", no_wrap=True)
    table.add_column("state", overflow="fold", ratio=1)
    for slot in found.slots[-MOST_ROWS:]:
        table.add_row(*_cells(slot, found))
    return table


def _cells(slot: Slot, found: Inspection) -> list[Text | str]:
    record, sequence = slot.entry.record, slot.entry.sequence
    state = Text(str(slot.state), _COLOURS[slot.state])
    if sequence in found.problems:
        state = Text("damaged", "bold red")
    elif slot.state is State.LIVE:
        state.append(", verified" if found.deep else ", sizes right")
    elif reason := slot.reason or slot.entry.problem:
        reason = _shorter(reason, found)
        state.append(f" {reason}" if slot.state is State.RETIRED else f": {reason}")
    if sequence in {pin.sequence for pin in found.pins}:
        state.append(", pinned", "cyan")
    if record is None:
        return [str(sequence), "?", "", "", "", "", "", "", state]
    step, size, shards = _of_kind(record)
    # An attempt's name ends in what tells it from the others of its run.
    attempt = record.attempt if len(record.attempt) <= 14 else "…" + record.attempt[-13:]
    time = record.time[:19].replace("T", " ")
    return [str(sequence), record.kind, str(record.fence), step, size, shards, attempt, time, state]


def _shorter(text: str, found: Inspection) -> str:
    """Keys instead of addresses: the prefix is in the first line."""
    return text.replace(f"{found.uri}/", "")


def _of_kind(record: Record) -> tuple[str, str, str]:
    """Step, size and shards, or what else the record names."""
    match record:
        case Commit():
            return str(record.step), bytes_text(record.size_bytes), str(len(record.shards))
        case Reject(sequence=sequence):
            return f"→ {sequence}", "", ""
        case Retire(sequences=sequences):
            many = f"→ {sequences[0]}, …" if len(sequences) > 2 else f"→ {_listed(sequences)}"
            return many, "", ""
    return "", "", ""


def _listed(sequences: list[int]) -> str:
    return ", ".join(map(str, sequences))


def _verdict(found: Inspection) -> list[Text]:
    live = [slot.entry.record for slot in found.live]
    size = bytes_text(sum(r.size_bytes for r in live if isinstance(r, Commit)))
    lines = [Text(f"\n{len(live)} live, {size}", "bold")]
    resume = found.resume
    if resume is not None and isinstance(resume.entry.record, Commit):
        where = f"step {resume.entry.record.step} (slot {resume.entry.sequence})"
        lines.append(Text(f"A resume takes {where}.", "green"))
    elif found.refusal:
        lines.append(Text(f"No resume: {found.refusal}", "bold red", overflow="fold"))
    else:
        lines.append(Text("There is no commit to resume from.", "yellow"))
    passed_over = found.passed_over
    for slot, why in passed_over[:MOST_ROWS]:
        record = slot.entry.record
        what = f"step {record.step}" if isinstance(record, Commit) else "no record"
        line = f"  not slot {slot.entry.sequence} ({what}), {_shorter(why, found)}"
        lines.append(Text(line, "yellow", overflow="fold"))
    if (more := len(passed_over) - MOST_ROWS) > 0:
        lines.append(Text(f"  nor {more:,} more: --json has them", "yellow"))
    return lines


def _rest(found: Inspection) -> Group:
    lines: list[Text] = []

    def part(title: str, rows: list[str], style: str = "") -> None:
        if rows:
            lines.append(Text(f"\n{title}", "bold"))
            lines.extend(Text(f"  {row}", style, overflow="fold") for row in rows[:MOST_ROWS])
            if (more := len(rows) - MOST_ROWS) > 0:
                lines.append(Text(f"  and {more:,} more: --json has them", style))

    left = sum(leftover.size_bytes for leftover in found.leftovers)
    part(
        f"Data of no usable commit, {bytes_text(left)}",
        [f"{n.prefix}  {bytes_text(n.size_bytes)}: {n.why}" for n in found.leftovers],
    )
    part("Pins", [f"slot {pin.sequence}: {pin.means}" for pin in found.pins], "cyan")
    part(
        "Unfinished multipart uploads",
        [f"{u.key}  since {u.initiated:%Y-%m-%d %H:%M:%S}" for u in found.uploads]
        or [f"not known: {why}" for why in [found.uploads_unknown] if why],
    )
    part(
        "Objects that are none of ours",
        [f"{info.key}  {bytes_text(info.size_bytes)}" for info in found.strangers],
        "yellow",
    )
    part("Damage", [_shorter(finding, found) for finding in found.findings], "bold red")
    if not found.findings:
        lines.append(Text("\nNothing is damaged.", "green"))
    return Group(*lines)

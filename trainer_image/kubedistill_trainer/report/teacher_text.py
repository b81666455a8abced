"""What was learnt of a teacher's text, and what was not: in the document, and on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kubedistill_api.generation import ChainOfThought
from kubedistill_api.job import DistillationJobSpec

from kubedistill_trainer.report.markup import Child, Markup, tag
from kubedistill_trainer.report.text import SIGNALS, number
from kubedistill_trainer.teacher.filters import REASONS
from kubedistill_trainer.teacher.learn import TaughtText
from kubedistill_trainer.teacher.text_request import generation_of


def taught_text(spec: DistillationJobSpec, taught: TaughtText | None) -> dict[str, Any] | None:
    """`teacherText` of report.json; None where no text of a teacher was learnt."""
    if taught is None or spec.distill is None:
        return None
    learnt, stream = taught.learnt, taught.status
    reasoning = spec.distill.signal == "ChainOfThought"
    filters = spec.distill.chain_of_thought or ChainOfThought()
    return {
        "signal": spec.distill.signal,
        "generation": generation_of(spec).to_wire(),
        "filters": filters.to_wire() if reasoning else None,
        "asked": learnt.asked,
        "kept": len(learnt.conversations),
        "dropped": {reason: n for reason in REASONS if (n := learnt.dropped.get(reason, 0))},
        "withoutReasoning": learnt.unreasoned if reasoning else None,
        "promptTokens": stream.prompt_tokens,
        "answerTokens": stream.answer_tokens,
        "evaluationTokens": stream.evaluation_tokens,
        "cost": stream.cost,
        "stream": {"uri": stream.uri, "digest": stream.digest, "bytes": stream.bytes},
    }


def section(document: Mapping[str, Any]) -> Markup | None:
    """The section of the page."""
    text = document.get("teacherText")
    if not text:
        return None
    rows = [_row("learnt", text["kept"], text["asked"])]
    rows += [_row(REASONS[reason], n, text["asked"]) for reason, n in text["dropped"].items()]
    head = tag("tr", *(tag("th", name, scope="col") for name in ("Answers", "Number", "Share")))
    caption = "What became of the answers"
    table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *rows))
    told = f"{text['kept']:,} of {text['asked']:,} answers of the teacher were learnt"
    if text["withoutReasoning"]:
        told += f", {text['withoutReasoning']:,} of them without reasoning"
    return tag(
        "section",
        tag("h2", "Teacher text"),
        tag("p", f"{told}.", class_="lead"),
        tag("div", table, class_="scroll", role="region", aria_label=caption, tabindex=0),
        tag("dl", *(_fact(name, value) for name, value in _facts(text).items() if value)),
    )


def _facts(text: Mapping[str, Any]) -> dict[str, Child]:
    cost, filters = text["cost"], text["filters"]
    return {
        "Signal": f"{text['signal']}: {SIGNALS[text['signal']]}",
        "Generation": _settings(text["generation"]),
        "Filters": _settings(filters) if filters else None,
        "Tokens": _tokens(text),
        "Cost": None if cost is None else number(float(cost)),
        "Stream": text["stream"]["uri"],
    }


def _tokens(text: Mapping[str, Any]) -> str:
    told = f"{text['promptTokens']:,} of prompts, {text['answerTokens']:,} of answers"
    beside = text["evaluationTokens"]
    return f"{told}, {beside:,} to measure the teacher" if beside else told


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value != "")


def _fact(name: str, value: Child) -> Markup:
    return tag("div", tag("dt", name), tag("dd", value))


def _row(name: str, count: int, asked: int) -> Markup:
    cells = [tag("td", f"{count:,}"), tag("td", f"{count / asked:.1%}")]
    return tag("tr", tag("th", name, scope="row"), *cells)

"""The sections of the page: each from its part of the document, or None where that is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kubedistill_trainer.report.layout import (
    Document,
    beside,
    cards,
    data_table,
    definitions,
    figure,
    headings,
    section,
)
from kubedistill_trainer.report.markup import Child, Markup, join, tag
from kubedistill_trainer.report.plots import Labels, Series, lines, reliability
from kubedistill_trainer.report.text import SIGNALS, compared, number, paired, shown

_METHODS = {
    "distill": "distillation", "fineTune": "fine-tuning", "prune": "pruning",
    "quantize": "quantisation", "evaluate": "evaluation"}  # fmt: skip
_LOSSES = {"total": "total", "soft": "soft: against the teacher", "hard": "hard: cross-entropy"}
_SHOWN_STEPS = 12
_SLICE_COLUMNS = {
    "tokens": "Tokens",
    "perplexity": "Perplexity",
    "teacherPerplexity": "Teacher’s",
    "perplexityRatio": "Ratio",
    "accuracy": "Accuracy",
    "teacherAgreement": "Agreement",
    "teacherKL": "KL",
}
_WEAKEST = {"perplexity": "highest perplexity", "perplexityRatio": "furthest from the teacher"}
_BIN_COLUMNS = {"tokens": "Tokens", "confidence": "Sure", "accuracy": "Right"}
_INPUTS = {
    "inputsDigest": "Inputs",
    "dataDigest": "Data (SHA-256)",
    "tokenizerDigest": "Tokenizer (SHA-256)",
    "version": "kubedistill",
}


def summary(document: Document) -> Markup:
    """What was made of what."""
    job, data, training = document["job"], document["data"], document["training"]
    stage = f"{job['stage']} of {job['chain']}" if job.get("chain") else None
    facts = {
        "Job": f"{job['namespace']}/{job['name']}",
        "Stage": stage,
        "Method": _method(document),
        "Teacher": _teacher(document.get("teacher")),
        "Student": f"{document['student']['parameters']:,} parameters; "
        f"began as {document['student']['start']}",
        "Trained": f"{training['steps']:,} steps, {training['tokens']:,} tokens",
        "Data": f"{data['training']['tokens']:,} tokens to learn from in "
        f"{_counted(len(data['sources']), 'file')}; {data['heldOut']['tokens']:,} held out",
        "Conversations": _conversations(data["conversations"]),
    }
    return tag(
        "header",
        tag("p", "Distillation report", class_="kicker"),
        tag("h1", job["name"]),
        definitions(facts),
    )


def figures(document: Document) -> Markup | None:
    """Key figures as cards, the student beside its teacher."""
    with_teacher = document.get("teacher") is not None
    both, single = paired(document), compared(document)
    if not (both or single):
        return None
    if not with_teacher:
        both, single = [], both + single
    return section(
        "Figures",
        tag("p", "Measured on text that training never saw.", class_="lead"),
        cards(both, True),
        cards(single, False, "cards"),
    )


def trials(document: Document) -> Markup | None:
    """The trials of the sweep that this job belongs to, the chosen one marked."""
    sweep = document.get("sweep")
    if not sweep:
        return None
    rows: Sequence[Document] = sweep["trials"]
    names = list(dict.fromkeys(row["metric"]["name"] for row in rows if row.get("metric")))
    columns = [name for name in names if name != "perplexity"]
    body = []
    for row in rows:
        metric = row.get("metric") or {}
        values = [metric.get("value") if name == metric.get("name") else None for name in columns]
        cells = [shown(name, value) for name, value in zip(columns, values, strict=True)]
        badge = tag("span", "chosen", class_="badge good") if row["chosen"] else None
        temperature = tag("th", f"T = {number(row['temperature'])} ", badge, scope="row")
        rest = [*cells, number(row.get("perplexity")), row["state"], row["jobName"]]
        body.append(tag("tr", temperature, *(tag("td", cell) for cell in rest)))
    heading = headings("Temperature", *columns, "Perplexity", "State", "Job")
    told = f"Stage {sweep['stage']}: {sweep['choice']}."
    return section(
        "Sweep", tag("p", told, class_="lead"), data_table("Trials of the sweep", heading, body)
    )


def slices(document: Document) -> Markup | None:
    """Figures by source, the weakest marked."""
    rows = document.get("slices")
    if not rows:
        return None
    weakest = {n: part for n, part in document.get("weakest", {}).items() if n in _WEAKEST}
    columns = {n: t for n, t in _SLICE_COLUMNS.items() if any(n in row for row in rows)}
    body = []
    for row in sorted(rows, key=lambda r: -r.get("perplexity", 0.0)):
        marks = [_WEAKEST[n] for n, part in weakest.items() if part["source"] == row["source"]]
        badges = [tag("span", mark, class_="badge") for mark in marks]
        cells = [tag("td", shown(name, row.get(name))) for name in columns]
        source = tag("th", tag("span", row["source"], class_="uri"), *badges, scope="row")
        body.append(tag("tr", source, *cells, class_="weak" if marks else None))
    told = "The held-out text by the file that it comes from."
    if weakest:
        told += " More text like that of the marked files is what the next run needs most."
    return section(
        "Weakest data" if weakest else "Data", tag("p", told, class_="lead"),
        data_table("Figures by file", headings("File", *columns.values()), body),
    )  # fmt: skip


def losses(document: Document) -> Markup | None:
    """Loss and learning rate over the steps."""
    points: Sequence[Document] = document.get("history") or []
    if len(points) < 2:
        return None
    parts = _loss_parts(points)
    series = [Series(text, name, _course(points, name)) for name, text in parts.items()]
    rates = Series("learning rate", "rate", _course(points, "learningRate"))
    plots = join(
        figure(
            "Loss",
            lines(Labels("Loss", _change(points), "optimizer step", "mean loss a token"), series),
            {one.style: one.name for one in series},
        ),
        figure(
            "Learning rate",
            lines(
                Labels("Learning rate", "Over the steps.", "optimizer step", "learning rate"),
                [rates],
                height=200,
            ),
            {},
        ),
    )
    heading = headings("Step", *(name.capitalize() for name in parts), "Learning rate")
    body = [
        tag(
            "tr", tag("th", f"{point['step']:,}", scope="row"),
            *(tag("td", number(point[name])) for name in (*parts, "learningRate")),
        )
        for point in _spread(points)
    ]  # fmt: skip
    return section("Training", beside(plots, data_table("Loss at some steps", heading, body)))


def held_out(document: Document) -> Markup | None:
    """The held-out perplexity on the way, and which step was taken."""
    found = document.get("earlyStopping")
    if not found:
        return None
    looks: Sequence[Document] = found["looks"]
    last = looks[-1]["step"]
    best, exported = found["bestStep"], found["exportedStep"]
    taken = "which is what was exported"
    if exported != best:
        taken = f"whose commit was damaged, so that step {exported:,} was exported"
    told = f"Best after step {best:,}, {taken}; training ended after step {last:,}" + (
        ", for it no longer fell." if found["stopped"] else "."
    )
    if apart := found.get("overfitting"):
        told += f" Overfitting: {apart['sentence']}."
    course = [(float(look["step"]), float(look["perplexity"])) for look in looks]
    labels = Labels("Held-out perplexity", told, "optimizer step", "perplexity")
    body = [
        tag("tr", tag("th", f"{look['step']:,}", scope="row"),
            tag("td", number(look["perplexity"])), tag("td", number(look["loss"])))
        for look in _spread(looks)
    ]  # fmt: skip
    table = data_table("Looks", headings("Step", "Perplexity", "Loss"), body)
    plot = figure("Held-out perplexity", lines(labels, [Series("perplexity", "rate", course)]), {})
    return section("Early stopping", tag("p", told, class_="lead"), beside(plot, table))


def calibration(document: Document) -> Markup | None:
    """How far the models can be trusted when they are sure."""
    found = document.get("calibration") or {}
    models = {name: found[name] for name in ("student", "teacher") if found.get(name)}
    if not models:
        return None
    series = [Series(name, name, *_dots(model["bins"])) for name, model in models.items()]
    told = " ".join(_verdict(name, model) for name, model in models.items())
    plot = reliability(
        Labels("Reliability", told, "confidence", "accuracy"),
        # The student's dots lie over the teacher's.
        series[::-1],
    )
    body = [_bin_row(index, models) for index in range(len(models["student"]["bins"]))]
    groups = [
        tag("th", name.capitalize(), scope="colgroup", colspan=len(_BIN_COLUMNS)) for name in models
    ]
    heading = join(
        tag("tr", tag("td"), *groups),
        headings("Confidence", *(text for _ in models for text in _BIN_COLUMNS.values())),
    )
    legend = {name: name for name in models}
    return section(
        "Calibration",
        tag("p", told, class_="lead"),
        beside(
            figure("How often it is right, when it is how sure", plot, legend, ideal=True),
            data_table("Tokens by confidence", heading, [row for row in body if row is not None]),
        ),
    )


def inputs(document: Document) -> Markup | None:
    """What pins the run: digests, files, settings."""
    known = document.get("inputs")
    if not known:
        return None
    facts: dict[str, Child] = {text: known.get(name) for name, text in _INPUTS.items()}
    teacher = document.get("teacher") or {}
    facts["Teacher (digest)"] = teacher.get("digest") or None
    files = [tag("li", _file(file)) for file in document["data"]["files"]]
    facts["Files"] = tag("ul", *files)
    settings = {n: v for n, v in document["training"].items() if not isinstance(v, dict)}
    facts["Settings"] = ", ".join(f"{name} {value}" for name, value in settings.items())
    return section("Inputs", definitions(facts), class_="inputs")


def _conversations(fit: Mapping[str, int] | None) -> str | None:
    if fit is None:
        return None
    return f"{fit['whole']:,} whole, {fit['cut']:,} cut at the end, {fit['dropped']:,} dropped"


def _file(file: Document) -> str:
    """A file and what of it is learnt."""
    facts = [f"{file['tokens']:,} tokens to learn from"]
    if file["origin"] == "Teacher":
        facts.append("answers of the teacher")
    if file["weight"] != 1:
        facts.append(f"weight {number(file['weight'])}")
    return f"{file['source']} ({', '.join(facts)})"


def _method(document: Document) -> str:
    method = _METHODS[document["job"]["method"]]
    text = document.get("teacherText")
    if text:
        return f"{method}, {SIGNALS[text['signal']]}"
    objective = document.get("objective")
    if objective is None:
        return method
    return (
        f"{method}, {objective['loss']} at T = {number(objective['temperature'])}, "
        f"soft weight {number(objective['softWeight'])}"
    )


def _teacher(teacher: Document | None) -> str | None:
    if teacher is None:
        return None
    how = [teacher[name] for name in ("delivery", "payload") if name in teacher]
    text = f"job {teacher['job']}" if teacher.get("job") else str(teacher["uri"])
    if teacher.get("model"):
        text = f"{teacher['model']} at {text}"
    return f"{text} ({', '.join(how)})"


def _loss_parts(points: Sequence[Document]) -> dict[str, str]:
    """Name and text of the losses to show; where only one has a weight it is the total."""
    parts = {n: t for n, t in _LOSSES.items() if any(p[n] is not None for p in points)}
    return parts if len(parts) != 2 else {"total": parts[next(n for n in parts if n != "total")]}


def _course(points: Sequence[Document], name: str) -> list[tuple[float, float]]:
    return [(point["step"], point[name]) for point in points if point[name] is not None]


def _change(points: Sequence[Document]) -> str:
    first, last = points[0], points[-1]
    return (
        f"The total loss went from {number(first['total'])} at step {first['step']:,} "
        f"to {number(last['total'])} at step {last['step']:,}."
    )


def _spread(points: Sequence[Document]) -> Sequence[Document]:
    """Some of the points, evenly spread, the first and the last included."""
    if len(points) <= _SHOWN_STEPS:
        return points
    return [points[i * (len(points) - 1) // (_SHOWN_STEPS - 1)] for i in range(_SHOWN_STEPS)]


def _dots(bins: Sequence[Document]) -> tuple[list[tuple[float, float]], list[float]]:
    """(confidence, accuracy) of the bins that hold tokens, and their shares of the tokens."""
    total = sum(part["tokens"] for part in bins)
    filled = [part for part in bins if part["tokens"]]
    places = [(part["confidence"], part["accuracy"]) for part in filled]
    return places, [part["tokens"] / total for part in filled]


def _verdict(name: str, model: Document) -> str:
    gap = model["confidence"] - model["accuracy"]
    leaning = "overconfident" if gap > 0 else "underconfident"
    return (
        f"The {name} is {leaning} by {abs(gap) * 100:.1f} points on average; "
        f"its calibration error is {shown('ece', model['ece'])}."
    )


def _bin_row(index: int, models: Mapping[str, Document]) -> Markup | None:
    parts = [model["bins"][index] for model in models.values()]
    if not any(part["tokens"] for part in parts):
        return None
    cells = [tag("td", shown(name, part.get(name))) for part in parts for name in _BIN_COLUMNS]
    return tag("tr", tag("th", f"{parts[0]['from']:.2f}–{parts[0]['to']:.2f}", scope="row"), *cells)


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"

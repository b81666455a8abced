"""The spec: is it valid, what is it called, what digest stands for its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kubedistill_api.data import DataSource
from kubedistill_api.generation import Generation
from kubedistill_api.job import (
    IMMUTABLE_PARTS,
    METHODS,
    METHODS_TEXT,
    Distill,
    DistillationJobSpec,
)
from kubedistill_api.runspec import Problem, ResolvedModel
from kubedistill_api.teacher import Teacher
from pydantic import ValidationError
from pydantic.alias_generators import to_snake

_FOUND_LIMIT = 80


def parse_spec(raw: Mapping[str, Any]) -> tuple[DistillationJobSpec | None, list[Problem]]:
    """The spec, or everything wrong with it. Never raises."""
    try:
        spec = DistillationJobSpec.model_validate(raw)
    except ValidationError as error:
        return None, [_problem(dict(detail), raw) for detail in error.errors()]
    problems = rule_problems(spec)
    return (None if problems else spec), problems


def _problem(detail: dict[str, Any], raw: Mapping[str, Any]) -> Problem:
    path = "spec"
    for part in detail["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    expected = detail["msg"][:1].lower() + detail["msg"][1:]
    found = "nothing" if detail["type"] == "missing" else _shown(detail.get("input"))
    if detail["type"] == "missing":
        expected = "it is required"
    elif detail["type"] == "extra_forbidden":
        expected = "there is no such field; remove it or correct its name"
    elif detail["type"] in ("float_parsing", "float_type"):
        expected = "write a number such as 2.0e-5 (YAML reads 1e-5 without a point as text)"
    return Problem(field=path, found=found, expected=expected)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _FOUND_LIMIT else text[:_FOUND_LIMIT] + "…"


def rule_problems(spec: DistillationJobSpec) -> list[Problem]:
    """What the schema's CEL rules say too; stages of a chain are checked before they are sent."""
    found: list[Problem] = []

    def refuse(field: str, what: str, expected: str) -> None:
        found.append(
            Problem(field=f"spec.{field}" if field else "spec", found=what, expected=expected)
        )

    _method_problems(spec, refuse)
    _source_problems(spec, refuse)
    _objective_problems(spec, refuse)
    _text_problems(spec, refuse)
    _gate_problems(spec, refuse)
    if spec.workers.min_nodes is not None and spec.workers.min_nodes > spec.workers.nodes:
        refuse(
            "workers.minNodes", str(spec.workers.min_nodes),
            f"at most workers.nodes, {spec.workers.nodes}",
        )  # fmt: skip
    ranks = ranks_of(spec)
    if spec.training.global_batch_size % ranks:
        refuse(
            "training.globalBatchSize", str(spec.training.global_batch_size),
            f"a multiple of the {ranks} ranks (workers.nodes × workers.gpusPerNode)",
        )  # fmt: skip
    return found


def _method_problems(spec: DistillationJobSpec, refuse: Any) -> None:
    given = [name for name in METHODS if getattr(spec, to_snake(name)) is not None]
    if len(given) != 1:
        refuse("", ", ".join(given) or "no method", f"give exactly one method: {METHODS_TEXT}")
        return
    teacher = spec.teacher
    if spec.distill is not None and teacher is None:
        refuse(
            "teacher", "no teacher",
            "a `distill` job needs a `teacher` (`model: {uri: s3://…}` or `fromJob: {name: …}`)",
        )  # fmt: skip
    if spec.distill is None and teacher is not None and teacher.endpoint is not None:
        refuse(
            "teacher.endpoint", teacher.endpoint.model,
            "without `distill` the student is compared with the teacher's logits: give `model` or "
            "`fromJob`",
        )  # fmt: skip
    if not spec.trains and not (spec.student.model or spec.student.from_job):
        refuse(
            "student", "no model",
            "without training the student is a model that is there: give `student.model` or `fromJob`",
        )  # fmt: skip
    ranks = ranks_of(spec)
    if spec.quantize is not None and ranks > 1:
        refuse(
            "workers", f"{ranks} ranks",
            "`quantize` runs in one process: write `workers: {nodes: 1, gpusPerNode: 1}`",
        )  # fmt: skip
    quantize = spec.quantize
    if quantize is not None and quantize.scheme != "W4A16":
        if quantize.algorithm == "AWQ":
            refuse("quantize.algorithm", "AWQ", "it is for `scheme: W4A16`: write GPTQ or RTN")
        if quantize.group_size is not None:
            refuse("quantize.groupSize", str(quantize.group_size), "only W4A16 has groups")


def _source_problems(spec: DistillationJobSpec, refuse: Any) -> None:
    teacher, student = spec.teacher, spec.student
    if teacher is not None:
        given = [s for s in (teacher.model, teacher.from_job, teacher.endpoint) if s is not None]
        if len(given) != 1:
            refuse(
                "teacher", f"{len(given)} sources",
                "give exactly one of `model: {uri: s3://…}`, `fromJob: {name: …}` and "
                "`endpoint: {url: …, model: …}`",
            )  # fmt: skip
    starts = [
        student.model is not None, student.from_job is not None,
        student.from_teacher is not None, student.config is not None,
    ]  # fmt: skip
    if sum(starts) != 1:
        refuse(
            "student", f"{sum(starts)} starts",
            "give exactly one of `model`, `fromJob`, `fromTeacher` and `config`",
        )  # fmt: skip
    if student.from_teacher is not None and teacher is None:
        refuse("student.fromTeacher", "no teacher", "use `config`, `model` or `fromJob`")
    logits = spec.distill is not None and spec.distill.signal == "Logits"
    if student.config is not None and not logits and spec.data.tokenizer is None:
        refuse(
            "data.tokenizer", "nothing",
            "give `tokenizer: {uri: s3://…}`: only with a teacher's logits its tokenizer is taken",
        )  # fmt: skip
    taught = spec.distill is not None and teacher is not None and teacher.model
    if taught and student.model and taught.uri == student.model.uri:
        refuse("student.model.uri", student.model.uri, "another model than the teacher")


def _objective_problems(spec: DistillationJobSpec, refuse: Any) -> None:
    if spec.distill is None or spec.teacher is None:
        return
    objective, field = spec.distill.objective, "distill.objective"
    if (objective.loss == "Mix") != (objective.mix is not None):
        refuse(
            f"{field}.mix", "a mix" if objective.mix else "nothing",
            "give `mix` with `loss: Mix`, and only with it",
        )  # fmt: skip
    logits = spec.distill.signal == "Logits"
    if logits and objective.soft_weight == 0 and not objective.features:
        refuse(
            f"{field}.softWeight", "0 and no features",
            "nothing of the teacher would be learnt: raise it, add features, or write "
            "`fineTune: {}` without a teacher",
        )  # fmt: skip
    mix = objective.mix
    if mix is not None and not mix.forward_kl + mix.reverse_kl + mix.jsd > 0:
        refuse(f"{field}.mix", "no weight above 0", "weigh forwardKL, reverseKL or jsd")
    for index, feature in enumerate(objective.features):
        if (feature.student_layer is None) != (feature.teacher_layer is None):
            refuse(
                f"{field}.features[{index}]", "one layer",
                "give both studentLayer and teacherLayer, or neither",
            )  # fmt: skip
    sampled = (spec.teacher.delivery, spec.teacher.payload) == ("Stream", "Sampled")
    if sampled and objective.loss != "ForwardKL":
        refuse(
            f"{field}.loss", objective.loss,
            "draws (`teacher.payload: Sampled`) estimate ForwardKL only",
        )  # fmt: skip
    if sampled and len({objective.temperature, *spec.teacher.temperatures}) > 1:
        refuse(
            "teacher.temperatures", "other temperatures than the objective's",
            "draws (`teacher.payload: Sampled`) are made at one: write Hidden, Sparse or Auto",
        )  # fmt: skip
    if objective.features and spec.teacher.delivery != "Online":
        refuse(
            f"{field}.features", f"`teacher.delivery: {spec.teacher.delivery}`",
            "write `teacher.delivery: Online`, or leave features out: "
            "a stream holds no inner layers of the teacher",
        )  # fmt: skip


def _text_problems(spec: DistillationJobSpec, refuse: Any) -> None:
    """What concerns a teacher's text, and conversations."""
    distill, teacher = spec.distill, spec.teacher
    text = distill is not None and distill.signal != "Logits"
    asked = any(source.origin == "Teacher" for source in spec.data.sources)
    if text != asked:
        refuse(
            "data.sources", "a source" if asked else "no source with `origin: Teacher`",
            "`signal: Responses` and `ChainOfThought` need a source with `origin: Teacher`; other "
            "jobs have none",
        )  # fmt: skip
    for index, source in enumerate(spec.data.sources):
        _fields_problem(source, f"data.sources[{index}]", refuse)
    if teacher is not None and teacher.endpoint is not None and spec.student.from_teacher:
        refuse("student.fromTeacher", "a teacher behind an endpoint", "use another start")
    endpoint = teacher.endpoint if teacher is not None else None
    if endpoint is not None and endpoint.max_cost is not None and endpoint.price is None:
        refuse(
            "teacher.endpoint.price", "nothing", "give it beside `maxCost`: costs are counted by it"
        )
    if distill is None:
        return
    if text and teacher is not None and teacher.delivery != "Stream":
        refuse("teacher.delivery", teacher.delivery, "text needs `delivery: Stream`")
    if teacher is not None and teacher.endpoint is not None and not text:
        _scored_problems(spec, distill.objective.temperature, teacher, refuse)
    if distill.generation is not None and not text:
        refuse("distill.generation", "settings", "they are for signals of text: leave them out")
    samples = distill.generation.samples if distill.generation else 1
    if samples > 1 and distill.generation and distill.generation.temperature == 0:
        refuse("distill.generation.temperature", "0", f"above 0: {samples} samples would be alike")
    _thought_problems(distill, samples, refuse)
    if text and distill.objective.features:
        refuse("distill.objective.features", "layers", "a teacher's text has none: leave it out")


def _gate_problems(spec: DistillationJobSpec, refuse: Any) -> None:
    for index, gate in enumerate(spec.gates):
        if gate.min is None and gate.max is None:
            refuse(f"gates[{index}]", "no bound", "give `min` or `max`")
        elif gate.min is not None and gate.max is not None and gate.min > gate.max:
            refuse(f"gates[{index}].min", f"{gate.min:g}", f"at most `max`, {gate.max:g}")


def _scored_problems(
    spec: DistillationJobSpec, temperature: float, teacher: Teacher, refuse: Any
) -> None:
    """What logits of an endpoint ask for: only the likeliest are known, and only at T = 1."""
    if (teacher.payload, teacher.delivery) != ("Sparse", "Stream"):
        refuse(
            "teacher.payload", f"{teacher.payload} with `delivery: {teacher.delivery}`",
            "an endpoint gives text, or the likeliest tokens' probabilities: write `distill.signal: "
            "Responses`, or `payload: Sparse` with `delivery: Stream`",
        )  # fmt: skip
    others = {temperature, *teacher.temperatures} - {1.0}
    if others:
        refuse(
            "distill.objective.temperature", ", ".join(f"{t:g}" for t in sorted(others)),
            "an endpoint gives probabilities at temperature 1 only: write 1, and no other in "
            "spec.teacher.temperatures",
        )  # fmt: skip
    if spec.data.tokenizer is None:
        refuse("data.tokenizer", "nothing", "give the endpoint's tokenizer, which it does not show")
    if teacher.endpoint is not None and teacher.endpoint.max_cost is not None:
        refuse("teacher.endpoint.maxCost", "a limit", "it counts text only: leave it out")


def _thought_problems(distill: Distill, samples: int, refuse: Any) -> None:
    thought = distill.chain_of_thought
    if thought is None:
        return
    if distill.signal != "ChainOfThought":
        refuse("distill.chainOfThought", "settings", "they are for `signal: ChainOfThought`")
    if thought.min_agreement > 0 and samples < 2:
        refuse(
            "distill.chainOfThought.minAgreement", str(thought.min_agreement),
            "several samples: raise distill.generation.samples, or leave it out",
        )  # fmt: skip
    least, most = thought.min_reasoning_tokens, thought.max_reasoning_tokens
    if most is not None and least > most:
        refuse(
            "distill.chainOfThought.minReasoningTokens", str(least),
            f"at most `maxReasoningTokens`, {most}: no reasoning is so long and so short",
        )  # fmt: skip
    room = (distill.generation or Generation()).max_tokens
    if least > room:
        refuse(
            "distill.chainOfThought.minReasoningTokens", str(least),
            f"at most `distill.generation.maxTokens`, {room}: no answer holds so long a reasoning",
        )  # fmt: skip


def _fields_problem(source: DataSource, field: str, refuse: Any) -> None:
    if source.messages_field and (source.prompt_field or source.response_field):
        refuse(field, "both", "give `messagesField`, or `promptField` and `responseField`")
    elif source.response_field and not source.prompt_field:
        refuse(f"{field}.promptField", "nothing", "`responseField` needs it")
    if source.origin == "Teacher" and not (source.prompt_field or source.messages_field):
        refuse(field, "no prompts", "give `promptField` or `messagesField` for the teacher")


def ranks_of(spec: DistillationJobSpec) -> int:
    """Ranks of the gang: one a GPU, or one a pod on the CPU."""
    return spec.workers.nodes * max(1, spec.workers.gpus_per_node)


def inputs_digest(
    spec: DistillationJobSpec, teacher: ResolvedModel | None, student: ResolvedModel | None
) -> str:
    """SHA-256 over what cannot change once a job has started, and the digests of its models."""
    wire = spec.to_wire()
    parts: dict[str, Any] = {name: wire[name] for name in IMMUTABLE_PARTS if name in wire}
    parts["models"] = [m.to_wire() if m else None for m in (teacher, student)]
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def missing_models(
    spec: DistillationJobSpec, teacher: ResolvedModel | None, student: ResolvedModel | None
) -> bool:
    """Whether the spec has a model whose place is not among these."""
    parts = ((spec.teacher, teacher), (spec.student, student))
    return any(
        known is None and part is not None and bool(part.model or part.from_job)
        for part, known in parts
    )


def student_summary(spec: DistillationJobSpec) -> str:
    """The student in a few characters, for the table."""
    student = spec.student
    if student.from_teacher:
        return f"teacher, {student.from_teacher.summary}"[:64]
    if student.from_job:
        return f"from {student.from_job.name}"[:64]
    if student.model:
        return last_part(student.model.uri)
    config = student.config or {}
    kind = str(config.get("model_type", "config"))
    width = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    return (f"{kind} {width}×{layers}" if width and layers else kind)[:64]


def teacher_summary(spec: DistillationJobSpec) -> str:
    """The teacher in a few characters; empty where there is none."""
    if spec.teacher is None:
        return ""
    if spec.teacher.from_job:
        return f"from {spec.teacher.from_job.name}"[:64]
    if spec.teacher.endpoint:
        return spec.teacher.endpoint.model[:64]
    return last_part(spec.teacher.model.uri) if spec.teacher.model else ""


def last_part(uri: str) -> str:
    """The last path segment of a URI."""
    return uri.rstrip("/").rsplit("/", 1)[-1][:64]


def dependency_names(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Jobs whose models this spec needs, of a spec that may be invalid."""
    found = []
    for part in ("teacher", "student"):
        source = raw.get(part)
        reference = source.get("fromJob") if isinstance(source, Mapping) else None
        if isinstance(reference, Mapping) and isinstance(reference.get("name"), str):
            found.append(reference["name"])
    return tuple(dict.fromkeys(found))

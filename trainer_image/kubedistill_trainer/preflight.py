"""What is checked before GPUs are asked for: store, data, tokenizer, models, memory, evaluation, stream."""

from __future__ import annotations

from typing import Any

from kubedistill_api.metrics import OF_A_TEACHER
from kubedistill_api.runspec import Outcome, RunSpec
from kubedistill_api.status import Resolved

from kubedistill_trainer.compress.preflight import check_change, cut_of
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import (
    Dataset,
    learns_text,
    load_dataset,
    ranks_of,
    tokenizer_source,
)
from kubedistill_trainer.data.template import ChatTemplate
from kubedistill_trainer.data.tokenizer import TextTokenizer, load_tokenizer
from kubedistill_trainer.evaluation.gym import check_tasks
from kubedistill_trainer.evaluation.questions import read_questions
from kubedistill_trainer.evaluation.suites import check_suites
from kubedistill_trainer.failures import refuse, unreadable
from kubedistill_trainer.imports import quiet_collector
from kubedistill_trainer.methods.check_text import TextChecked, check_text
from kubedistill_trainer.methods.request import job_request
from kubedistill_trainer.models.folder import read_config
from kubedistill_trainer.models.sizes import decoder_parameters, is_plain
from kubedistill_trainer.models.weights import check_sample, vocabulary_rows
from kubedistill_trainer.store import preflight as check_store
from kubedistill_trainer.teacher.endpoint_preflight import check_endpoint
from kubedistill_trainer.teacher.endpoint_scores import longest_piece
from kubedistill_trainer.teacher.request import resolved
from kubedistill_trainer.teacher.whole import is_whole

_OVERHEAD_BYTES = 600 << 20
"""Interpreter, torch and DeepSpeed in a process."""
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")
"""Of a teacher's config: what its stream, its head and its layers are counted by."""


def run_preflight(context: Context) -> Outcome:
    """Check all inputs; the Outcome carries what was found out. Raises RunFailure or StoreError."""
    run = context.run
    check_store(context.storage)
    if learns_text(run.spec):
        return _text_preflight(context)
    dataset = load_dataset(run, context.open_store)
    teacher_config = _teacher_config(context)
    _check_tokenizers(context, dataset.tokenizer, dataset.template)
    _check_vocabularies(context, dataset.tokenizer, teacher_config)
    _check_weights(context, teacher_config)
    check_change(context, teacher_config)
    _check_features(context, dataset, teacher_config)
    _check_split(context, teacher_config)
    parameters = _student_parameters(context, dataset.tokenizer, teacher_config)
    _check_memory(run, parameters)
    _check_evaluation(context)
    stream_uri, complete = _stream(context, dataset)
    # Last: it is the one check that costs money.
    check_endpoint(run.spec, dataset.tokenizer, longest_piece(dataset.packed))
    found = Resolved(
        inputs_digest=run.inputs_digest,
        student_parameters=parameters,
        total_steps=dataset.total_steps,
        training_tokens=dataset.packed.take(dataset.split.training).valid_tokens,
        data_digest=dataset.digest,
        stream_uri=stream_uri,
        stream_complete=complete and not _has_to_measure(context, dataset.tokenizer),
    )
    return Outcome(reason="Completed", message=_verdict(dataset), resolved=found)


def _text_preflight(context: Context) -> Outcome:
    """The same for a teacher that is learnt by its text: how much there will be is not known yet."""
    run = context.run
    teacher_config = _teacher_config(context)
    text = check_text(context, teacher_config)
    _check_tokenizers(context, text.tokenizer, None)
    _check_vocabularies(context, text.tokenizer, teacher_config)
    _check_weights(context, teacher_config)
    check_change(context, teacher_config)
    _check_split(context, teacher_config)
    parameters = _student_parameters(context, text.tokenizer, teacher_config)
    _check_memory(run, parameters)
    _check_evaluation(context)
    _check_text_gates(context, text)
    if text.dataset is None:
        check_endpoint(run.spec, text.tokenizer)
    found = Resolved(
        inputs_digest=run.inputs_digest,
        student_parameters=parameters,
        data_digest=text.data_digest,
        stream_uri=text.stream_uri,
        stream_complete=_text_complete(context, text),
    )
    dataset = text.dataset
    if dataset is not None:
        tokens = dataset.packed.take(dataset.split.training).valid_tokens
        steps = {"total_steps": dataset.total_steps, "training_tokens": tokens}
        found = found.model_copy(update=steps)
    return Outcome(reason="Completed", message=text.message, resolved=found)


def _check_text_gates(context: Context, text: TextChecked) -> None:
    """A gate on a figure beside the teacher's distribution, where the student reads other tokens."""
    bounds = context.run.spec.gates
    asked = [i for i, gate in enumerate(bounds) if gate.metric in OF_A_TEACHER]
    if not asked:
        return
    with quiet_collector():
        from kubedistill_trainer.methods.held_out import NotComparable, check_comparable

    try:
        check_comparable(context, text.tokenizer, text.template)
    except NotComparable as reason:
        raise refuse(
            f"spec.gates[{asked[0]}].metric",
            f"{bounds[asked[0]].metric}, which nobody can measure: {reason}",
            "write one of the student's own figures, or of tasks and questions",
        ) from reason


def _text_complete(context: Context, text: TextChecked) -> bool:
    """Whether the teacher's pods have nothing to do."""
    dataset = text.dataset
    if dataset is None or _has_to_measure(context, text.tokenizer):
        return False
    with quiet_collector():
        from kubedistill_trainer.methods.held_out import NotComparable, held_out, is_settled

    try:
        return is_settled(context.storage, held_out(context, dataset))
    except NotComparable:
        return True


def _verdict(dataset: Dataset) -> str:
    """The outcome's message: what is lost of the conversations, if anything."""
    fit = dataset.fit
    if fit is None or not fit.cut + fit.dropped:
        return "all inputs fit"
    return (
        f"all inputs fit; of {fit.whole + fit.cut + fit.dropped} conversations {fit.cut} are cut at "
        f"{dataset.packed.sequence_length} tokens, and {fit.dropped} with longer prompts are dropped"
    )


def _teacher_config(context: Context) -> dict[str, Any] | None:
    model = context.run.teacher_model
    if model is None:
        return None
    store = context.open_store(model.uri)
    config = read_config(store, "spec.teacher")
    spec = context.run.spec
    if learns_text(spec) and spec.student.from_teacher is None:
        return config
    for key in _SIZES:
        if not isinstance(config.get(key), int):
            raise unreadable(
                "spec.teacher",
                f"no {key} in {store.uri_of('config.json')}",
                "give a teacher built like Llama (Mistral, Qwen, Gemma 2, …), whose config says it",
            )
    return config


def _check_tokenizers(
    context: Context, tokenizer: TextTokenizer, template: ChatTemplate | None
) -> None:
    """A model knows the ids of one tokenizer, and a teacher's logits one way to write a conversation:
    refuse others, and say what would work. A teacher's text may come of another tokenizer."""
    run = context.run
    used_field, used_uri = tokenizer_source(run)
    teacher = None if learns_text(run.spec) else run.teacher_model
    for field, model in (("spec.teacher", teacher), ("spec.student", run.student_model)):
        if model is None:
            continue
        store = context.open_store(model.uri)
        if store.head("tokenizer.json") is None:
            continue
        found = load_tokenizer(store, field)
        if found.digest != tokenizer.digest:
            needed = (
                "a teacher's logits need one tokenizer for teacher, student and data"
                if teacher is not None
                else "the student needs its own tokenizer for the data"
            )
            raise unreadable(
                field,
                f"the tokenizer of {model.uri} ({found.vocab_size} ids, {found.digest[:12]})",
                f"it differs from the one of {used_field}, {used_uri} "
                f"({tokenizer.vocab_size} ids, {tokenizer.digest[:12]}): {needed}",
            )
        if field == "spec.teacher":
            _check_template(template, model.uri, found.chat_template)


def _check_vocabularies(
    context: Context, tokenizer: TextTokenizer, teacher_config: dict[str, Any] | None
) -> None:
    """A model has a row for each id of the tokenizer; more rows than ids are padding, and are fine."""
    run = context.run
    models = []
    if run.teacher_model is not None and teacher_config is not None and not learns_text(run.spec):
        models.append(("spec.teacher", run.teacher_model.uri, teacher_config))
    if run.student_model is not None:
        uri = run.student_model.uri
        models.append(("spec.student", uri, read_config(context.open_store(uri), "spec.student")))
    ids = tokenizer.vocab_size
    used_field, used_uri = tokenizer_source(run)
    for field, uri, config in models:
        rows = vocabulary_rows(config)
        if rows is not None and rows < ids:
            raise unreadable(
                field,
                f"an embedding of {rows} rows (vocab_size) in {uri}",
                f"the tokenizer of {used_field}, {used_uri}, has {ids} ids: give the model's own "
                "tokenizer, or resize the embedding to at least as many rows",
            )


def _check_weights(context: Context, teacher_config: dict[str, Any] | None) -> None:
    """A model that is all zero or not a number is refused before anybody waits for GPUs."""
    run = context.run
    if run.teacher_model is not None and teacher_config is not None:
        check_sample(context.open_store(run.teacher_model.uri), teacher_config, "spec.teacher")
    if run.student_model is not None:
        store = context.open_store(run.student_model.uri)
        check_sample(store, read_config(store, "spec.student"), "spec.student")


def _check_template(used: ChatTemplate | None, uri: str, known: str | None) -> None:
    """A teacher that was taught conversations in another form says nothing of use about these."""
    if used is None or known is None or known == used.text:
        return
    raise unreadable(
        used.field,
        f"another chat template than the teacher's, {uri}",
        "learning a teacher's logits needs its own template: leave spec.data.chatTemplate out, and "
        "take spec.data.tokenizer from the teacher's folder; or write `signal: Responses`",
    )


def _check_features(
    context: Context, dataset: Dataset, teacher_config: dict[str, Any] | None
) -> None:
    """A layer that a model does not have is refused before anything is loaded."""
    distill = context.run.spec.distill
    if distill is None or teacher_config is None or not distill.objective.features:
        return
    # As in `_student_parameters`: seconds of imports, for those only who ask for features.
    with quiet_collector():
        from kubedistill_trainer.methods.objective import feature_pairs
        from kubedistill_trainer.models import load

    field, keys = _student_config(context, teacher_config)
    student = load.config_of(keys, dataset.tokenizer.vocab_size, field, 1)
    layers = int(student.num_hidden_layers)
    feature_pairs(distill.objective, layers, int(teacher_config["num_hidden_layers"]))


def _check_split(context: Context, teacher_config: dict[str, Any] | None) -> None:
    """A teacher that cannot be split over its GPUs is refused before they are asked for."""
    teacher = context.run.spec.teacher
    if teacher is None or teacher_config is None or teacher.delivery != "Stream":
        return
    size = teacher.workers.gpus_per_replica
    if size < 2:
        return
    with quiet_collector():
        from kubedistill_trainer.methods.sharding import check_plan
        from kubedistill_trainer.models import load

    vocab_size = int(teacher_config["vocab_size"])
    check_plan(load.config_of(teacher_config, vocab_size, "spec.teacher", 1), size)


def _student_parameters(
    context: Context, tokenizer: TextTokenizer, teacher_config: dict[str, Any] | None
) -> int:
    cut = cut_of(context, teacher_config)
    if cut is not None:
        return cut[1].parameters
    field, keys = _student_config(context, teacher_config)
    vocab_size = tokenizer.vocab_size
    counted = decoder_parameters(keys, vocab_size, field)
    # A config that a person wrote is looked at as it will be loaded: a folder's was loaded before.
    written = context.run.spec.student.config is not None
    if counted is not None and (is_plain(keys) or not written):
        return counted
    # Here, not at the top: torch takes seconds to import, and a wrong key should not wait for it.
    with quiet_collector():
        from kubedistill_trainer.models import load

    config = load.config_of(keys, vocab_size, field, context.run.spec.data.sequence_length)
    return load.parameter_count(load.empty_model(config, field))


def _student_config(
    context: Context, teacher_config: dict[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """The student's Hugging Face config as it will be, and the field that it comes from."""
    student = context.run.spec.student
    if student.config is not None:
        return "spec.student.config", student.config
    cut = cut_of(context, teacher_config)
    if cut is not None:
        field, plan = cut
        assert teacher_config is not None
        layers = min(sizes.layers for sizes in plan.candidates)
        return field, {**teacher_config, "num_hidden_layers": layers}
    model = context.run.student_model
    if model is None:
        raise refuse("spec.student", "no start", "give model, fromJob, fromTeacher or config")
    return "spec.student", read_config(context.open_store(model.uri), "spec.student")


def memory_bytes(parameters: int, precision: str, zero_stage: int, ranks: int) -> int:
    """Bytes that weights, gradients and AdamW's state take in one rank, activations not counted.

    Mixed precision keeps 2-byte weights and gradients and 12 bytes of fp32 master weights and
    moments a parameter; plain fp32 keeps 4, 4 and 8 (ZeRO, Rajbhandari et al. 2020, section 3.1).
    Stage 1 divides the optimizer's states by the ranks, 2 the gradients too, 3 the weights too.
    """
    weights, gradients, states = (2, 2, 12) if precision == "BF16" else (4, 4, 8)
    per_parameter = (
        weights / (ranks if zero_stage >= 3 else 1)
        + gradients / (ranks if zero_stage >= 2 else 1)
        + states / ranks
    )
    return int(parameters * per_parameter)


def _check_memory(run: RunSpec, parameters: int) -> None:
    """On the CPU the container's memory limit is known; a GPU's size is not, before it is given."""
    limit = run.memory_limit_bytes
    training, workers = run.spec.training, run.spec.workers
    if limit is None or workers.gpus_per_node > 0:
        return
    if not run.spec.trains:
        return  # what it takes depends on the method, and is little beside a training's
    ranks = ranks_of(run.spec)
    stage = training.deep_speed.zero_stage
    needed = memory_bytes(parameters, training.precision, stage, ranks) + _OVERHEAD_BYTES
    if needed > limit:
        raise refuse(
            "spec.student",
            f"{parameters:,} parameters, which need {needed / 2**30:.1f} GiB in each pod with "
            f"ZeRO stage {stage} over {ranks} ranks, and a memory limit of {limit / 2**30:.1f} GiB",
            "make the student smaller, raise spec.workers.nodes or "
            "spec.training.deepSpeed.zeroStage, or raise the limit in spec.workers.template",
        )


def _check_evaluation(context: Context) -> None:
    """Tasks that do not exist and questions that cannot be read, before anything is trained."""
    settings = context.run.spec.evaluation
    check_tasks(settings.tasks, settings.examples, "spec.evaluation.tasks")
    check_suites(settings.lm_eval)
    read_questions(settings.questions, context.open_store, settings.examples)


def _has_to_measure(context: Context, tokenizer: TextTokenizer) -> bool:
    """Whether a teacher whose stream is there has pods to start all the same: for the figures that
    the student is held beside."""
    with quiet_collector():
        from kubedistill_trainer.evaluation.teacher import is_to_be_measured

    return is_to_be_measured(context, tokenizer)


def _stream(context: Context, dataset: Dataset) -> tuple[str, bool]:
    """(URI of the stream, whether all of it is there); StreamMismatch for a foreign one.

    What is missing of a stream is asked for, so that the teacher writes it before anybody needs it.
    With `payload: Auto` the URI is known once a teacher has measured: until then it is empty.
    """
    spec = context.run.spec
    if spec.teacher is None or spec.teacher.delivery != "Stream":
        return "", False
    if spec.compares:
        with quiet_collector():
            from kubedistill_trainer.methods.held_out import held_out, is_settled

        wanted = held_out(context, dataset)
        return context.storage.child(wanted.identity.address).uri, is_settled(
            context.storage, wanted
        )
    asked = job_request(context.run, dataset, context.open_store)
    found = resolved(asked.request, context.storage)
    if found is None:
        return "", False
    identity = found.identity
    uri = context.storage.child(identity.address).uri
    return uri, is_whole(context.storage, identity, ask=True)

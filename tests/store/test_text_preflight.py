"""What of a job that learns text is refused before a teacher is started, and what is found out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data_kit
import pytest
import torch
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import ResolvedModel, RunSpec
from kubedistill_trainer.data.tokenizer import TextTokenizer, load_tokenizer
from kubedistill_trainer.evaluation import record
from kubedistill_trainer.evaluation.measure import plan_of
from kubedistill_trainer.evaluation.results import Abilities
from kubedistill_trainer.evaluation.teacher import request_of_teacher
from kubedistill_trainer.exporter import ProgressBoard
from kubedistill_trainer.failures import InputsRefused
from kubedistill_trainer.methods.learn_text import read_taught
from kubedistill_trainer.methods.write_text import run_text_teacher
from kubedistill_trainer.preflight import run_preflight
from kubedistill_trainer.store import Store
from kubedistill_trainer.teacher.errors import StreamDamaged
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)
from safetensors.torch import save
from text_kit import Clerk, context_of, text_job, view_of

POSITIONS = 200
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
FORGETFUL = (
    "{% for m in messages %}{{ m.role + '\n' + m.content.split('</think>')[-1] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
"""In the manner of DeepSeek-R1's: no reasoning of answers that were given."""
OWN = data_kit.TURNS + "!"
"""Of a teacher that is not held beside the student's distribution: it has no states to write."""
UNASKED = {"examples": 0, "latency": False}
SYSTEM = {"role": "system", "content": "Be brief"}
USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def put(
    store: Store, folder: str, tokenizer: TextTokenizer, config: dict[str, Any] | None = None
) -> None:
    for name, body in tokenizer.files.items():
        store.put(f"{folder}/{name}", body)
    if config is not None:
        store.put(f"{folder}/config.json", json.dumps(config).encode())
        embedding = {"model.embed_tokens.weight": torch.ones(config["vocab_size"], 16)}
        store.put(f"{folder}/model.safetensors", save(embedding))


def job(
    store: Store,
    *records: Any,
    student: str | None = data_kit.TURNS,
    teacher: str | None = data_kit.TURNS,
    source: dict[str, Any] | None = None,
    student_config: dict[str, Any] = LLAMA,
    **parts: Any,
) -> RunSpec:
    """A job with these prompts, templates and folders."""
    put(store, "tokenizer", data_kit.tokenizer(student))
    speaks = data_kit.tokenizer(teacher)
    sizes = {"vocab_size": speaks.vocab_size, "max_position_embeddings": POSITIONS}
    put(store, "teacher", speaks, LLAMA | sizes | {"tie_word_embeddings": True})
    store.put("data/q.jsonl", data_kit.jsonl(*records))
    data = {
        "sources": [
            {"uri": store.uri_of("data/q.jsonl"), "origin": "Teacher", "promptField": "q", "answerField": "a",
             **(source or {})}
        ],
        "tokenizer": {"uri": store.uri_of("tokenizer")}, "sequenceLength": 64, **parts.pop("data", {}),
    }  # fmt: skip
    data["sources"] = [{k: v for k, v in one.items() if v is not None} for one in data["sources"]]
    fields = {
        "teacher": {"model": {"uri": store.uri_of("teacher")}}, "data": data,
        "student": {"config": student_config}, "workers": {"gpusPerNode": 0},
        "training": {"globalBatchSize": 2}, "evaluation": UNASKED, **parts,
    }  # fmt: skip
    run = text_job(store, "", **fields)
    return run.model_copy(update={"teacher_model": ResolvedModel(uri=store.uri_of("teacher"))})


def refusal(run: RunSpec, store: Store, code: ExitCode = ExitCode.UNREADABLE_INPUT) -> str:
    with pytest.raises(InputsRefused) as refused:
        run_preflight(context_of(run, store, Path()))
    assert refused.value.code == code
    return str(refused.value)


def thoughtful(**settings: Any) -> dict[str, Any]:
    return {"distill": {"signal": "ChainOfThought", "generation": {"maxTokens": 16}, **settings}}


def test_a_record_without_its_prompt_is_named(store: Store) -> None:
    found = refusal(job(store, {"q": "Why?"}, {"text": "x"}), store)
    assert "data/q.jsonl line 2: no field 'q', only ['text']" in found


def test_a_task_that_there_is_not(store: Store) -> None:
    run = job(store, {"q": "Why?"}, evaluation={"tasks": ["chain_sums"]})
    found = refusal(run, store, ExitCode.BAD_CONFIGURATION)
    assert "spec.evaluation.tasks" in found and "chain_sum" in found


def test_no_prompt_at_all(store: Store) -> None:
    store.put("data/text.txt", b"some text")
    run = job(store)
    text = {"uri": store.uri_of("data/text.txt")}
    both = [*run.spec.to_wire()["data"]["sources"], text]
    found = refusal(job(store, data={"sources": both}), store)
    assert "spec.data.sources: found no prompt in s3://" in found


def test_templates_that_are_missing(store: Store) -> None:
    found = refusal(job(store, {"q": "Why?"}, teacher=None), store)
    assert "spec.teacher: found a tokenizer without chat template" in found
    other = store.child("other")
    found = refusal(job(other, {"q": "Why?"}, student=None), other)
    assert "spec.data.tokenizer.uri: found a tokenizer without chat template" in found


def test_prompts_that_a_template_refuses(store: Store) -> None:
    turns = {"promptField": None, "messagesField": "turns"}
    records = [{"turns": [USER]}, {"turns": [USER, USER]}]
    for side in ("teacher", "student"):
        run = job(store, *records, source=turns, **{side: data_kit.STRICT})
        found = refusal(run, store)
        assert "data/q.jsonl line 2: " in found and "roles must alternate" in found
    # A system turn goes into the user's, for the teacher alone.
    run = job(store, {"q": "Why?", "a": "x"}, teacher=data_kit.STRICT, **thoughtful())
    run_preflight(context_of(run, store, Path()))


def test_a_template_that_forgets_the_reasoning(store: Store) -> None:
    found = refusal(job(store, {"q": "Why?", "a": "x"}, student=FORGETFUL, **thoughtful()), store)
    assert "leaves the reasoning before an answer out" in found
    assert "trainOnReasoning: false" in found
    answers = thoughtful(chainOfThought={"trainOnReasoning": False})
    run_preflight(
        context_of(job(store, {"q": "Why?", "a": "x"}, student=FORGETFUL, **answers), store, Path())
    )


ONLY_ANSWERS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def test_templates_that_leave_the_user_out(store: Store) -> None:
    found = refusal(job(store, {"q": "Why?"}, student=ONLY_ANSWERS), store)
    assert "spec.data.tokenizer.uri: found a chat template that leaves the user's turn out" in found
    found = refusal(job(store, {"q": "Why?"}, teacher="hello"), store)
    assert "spec.teacher: found a chat template that leaves the user's turn out" in found


def test_half_a_character_in_a_prompt_is_a_bad_record(store: Store) -> None:
    found = refusal(job(store, {"q": "Why?"}, {"q": "x\ud83d"}), store)
    assert "data/q.jsonl line 2: field 'q' holds half a character" in found
    run = job(store, {"q": "Why?"}, {"q": "x\ud83d"}, data={"maxBadRecords": 1})
    assert "1 answers to 1 prompts" in run_preflight(context_of(run, store, Path())).message


def test_right_answers_that_no_record_has(store: Store) -> None:
    records = [{"q": "Why?", "answer": "x"}, {"q": "Who?", "level": 2}]
    run = job(store, *records, source={"answerField": "anser"}, **thoughtful())
    found = refusal(run, store)
    assert "spec.data.sources[0].answerField: found anser, which no record of s3://" in found
    assert "write one of the fields that there are: answer, level, q;" in found
    unchecked = thoughtful(chainOfThought={"checkAnswer": False})
    run = job(store, *records, source={"answerField": "anser"}, **unchecked)
    run_preflight(context_of(run, store, Path()))
    run = job(store, *records, source={"answerField": "answer"}, **thoughtful())
    run_preflight(context_of(run, store, Path()))


def test_no_prompt_leaves_room_in_a_sequence(store: Store) -> None:
    long = {"q": "Why? " * 20}
    found = refusal(
        job(store, long, data={"sequenceLength": 16}), store, ExitCode.BAD_CONFIGURATION
    )
    assert "spec.data.sequenceLength: found 16; the shortest prompt of s3://" in found
    both = job(store, long, {"q": "Hi"}, data={"sequenceLength": 64})
    run_preflight(context_of(both, store, Path()))


@pytest.mark.parametrize(
    ("tokens", "question", "words"),
    [
        (
            POSITIONS,
            "Why?",
            f"the teacher has {POSITIONS} positions for prompt and answer together",
        ),
        (16, "Why? " * 200, "the shortest prompt has"),
    ],
)
def test_no_room_for_an_answer(store: Store, tokens: int, question: str, words: str) -> None:
    distill = {"signal": "Responses", "generation": {"maxTokens": tokens}}
    run = job(store, {"q": question}, distill=distill, data={"sequenceLength": 2048})
    found = refusal(run, store, ExitCode.BAD_CONFIGURATION)
    assert "spec.distill.generation.maxTokens" in found and words in found


def test_prompts_that_are_too_long_are_counted(store: Store) -> None:
    run = job(store, {"q": "Why?"}, {"q": "Why? " * 200})
    outcome = run_preflight(context_of(run, store, Path()))
    assert outcome.message == (
        "2 answers to 2 prompts are asked for; prompts that are too long for the teacher: 1"
    )


def write(run: RunSpec, store: Store, scratch: Path) -> None:
    run_text_teacher(context_of(run, store, scratch), ProgressBoard(), Clerk().open)


def test_what_is_there_needs_no_teacher(store: Store, tmp_path: Path) -> None:
    run = job(store, *({"q": f"What is {n}?", "a": n} for n in range(40)), teacher=OWN)
    context = context_of(run, store, tmp_path)
    before = run_preflight(context).resolved
    assert before is not None
    assert (before.stream_complete, before.total_steps) == (False, 0)
    write(run, store, tmp_path)
    outcome = run_preflight(context)
    after = outcome.resolved
    assert after is not None
    assert after.stream_complete and after.total_steps > 0 and after.training_tokens > 0
    assert after.stream_uri == before.stream_uri
    assert outcome.message == "all inputs fit; kept 40 of 40 answers"

    view = view_of(run, store)
    assert view is not None
    shard = view.logs[0].shards[1]
    data = view.stream.get(shard.key)
    view.stream.put(shard.key, data[:-1] + bytes([data[-1] ^ 1]))
    student = context_of(run, store, tmp_path)
    with pytest.raises(StreamDamaged):
        read_taught(student)
    again = run_preflight(context).resolved
    assert again is not None and not again.stream_complete
    write(run, store, tmp_path)
    taught = read_taught(student)
    assert taught is not None and len(taught.learnt.conversations) == 40


def test_a_teacher_that_nobody_has_measured_is_started_for_it(store: Store, tmp_path: Path) -> None:
    """Every job is held beside its teacher, also where there is nothing to write any more."""
    asked = {"tasks": ["chain_sum"], "examples": 2, "latency": False}
    run = job(store, *({"q": f"What is {n}?"} for n in range(40)), evaluation=asked, teacher=OWN)
    write(run, store, tmp_path)
    context = context_of(run, store, tmp_path)
    before = run_preflight(context).resolved
    assert before is not None
    assert (before.stream_complete, before.total_steps > 0) == (False, True)
    speaks = load_tokenizer(store.child("teacher"), "spec.teacher")
    plan = plan_of(run.spec.evaluation, context.open_store)
    request = request_of_teacher(context, plan, speaks)
    record.publish(store, request, Abilities(prompting="ChatTemplate"))
    after = run_preflight(context).resolved
    assert after is not None and after.stream_complete


def test_a_shard_that_rots_is_asked_for_by_the_preflight(store: Store, tmp_path: Path) -> None:
    run = job(store, *({"q": f"What is {n}?"} for n in range(40)))
    write(run, store, tmp_path)
    view = view_of(run, store)
    assert view is not None
    shard = view.logs[0].shards[0]
    data = view.stream.get(shard.key)
    view.stream.put(shard.key, data[:-1] + bytes([data[-1] ^ 1]))
    found = run_preflight(context_of(run, store, tmp_path)).resolved
    assert found is not None and not found.stream_complete
    after = view_of(run, store)
    assert after is not None and after.damaged


def test_nothing_passes_the_filters(store: Store, tmp_path: Path) -> None:
    run = job(store, *({"q": f"What is {n}?", "a": n + 1} for n in range(9)), **thoughtful())
    write(run, store, tmp_path)
    found = refusal(run, store)
    assert "nothing to learn from: kept 0 of 9 answers: 9 wrong" in found
    assert "loosen spec.distill.chainOfThought" in found


def test_every_rank_learns_the_same_in_the_same_order(store: Store, tmp_path: Path) -> None:
    run = job(store, *({"q": f"What is {n}?"} for n in range(40)))
    write(run, store, tmp_path)
    first, second = (read_taught(context_of(run, store, tmp_path)) for _ in range(2))
    assert first is not None and first == second
    asked = [talk.messages[0].content for _, talk in first.learnt.conversations]
    assert asked == [f"What is {n}?" for n in range(40)]


def test_a_prompt_that_is_bad_for_the_student_counts_as_often_as_it_is_answered(
    store: Store, tmp_path: Path
) -> None:
    turns = {"promptField": None, "messagesField": "turns"}
    records = [{"turns": [USER]}] * 30 + [{"turns": [USER, USER]}]
    generation = {"samples": 2, "temperature": 1.0, "maxTokens": 16}
    distill = {"signal": "Responses", "generation": generation}

    def allowing(bad: int) -> RunSpec:
        data = {"maxBadRecords": bad}
        return job(
            store, *records, source=turns, student=data_kit.STRICT, distill=distill, data=data
        )

    assert "line 31" in refusal(allowing(1), store)
    run = allowing(2)
    run_preflight(context_of(run, store, tmp_path))
    write(run, store, tmp_path)
    # All that will be learnt is read here, and counted again.
    resolved = run_preflight(context_of(run, store, tmp_path)).resolved
    assert resolved is not None and resolved.stream_complete


@pytest.mark.parametrize(
    ("record", "source", "words"),
    [
        ({"text": "short"}, {}, "tokens of text in s3://"),
        ({"m": [USER, USER, {"role": "assistant", "content": "x"}]}, {"messagesField": "m"},
         "roles must alternate"),
        ({"q": "why " * 99, "a": "x"}, {"promptField": "q", "responseField": "a"},
         "has a response within 64 tokens"),
    ],
)  # fmt: skip
def test_what_people_wrote_fits_before_the_teacher_is_asked(
    store: Store, record: dict[str, Any], source: dict[str, Any], words: str
) -> None:
    store.put("data/human.jsonl", data_kit.jsonl(record))
    run = job(store, {"q": "Why?"}, student=data_kit.STRICT)
    both = [
        *run.spec.to_wire()["data"]["sources"],
        {"uri": store.uri_of("data/human.jsonl"), **source},
    ]
    run = job(store, {"q": "Why?"}, student=data_kit.STRICT, data={"sources": both})
    assert words in refusal(run, store)


def test_a_teacher_without_a_row_for_what_its_template_writes(store: Store) -> None:
    run = job(store, {"q": "Why?"}, teacher=data_kit.TURNS + "é")
    speaks = data_kit.tokenizer(data_kit.TURNS)
    end = speaks.tokenizer.token_to_id("<|im_end|>")
    sizes = {"vocab_size": end, "max_position_embeddings": POSITIONS}
    put(store, "teacher", speaks, LLAMA | sizes | {"tie_word_embeddings": True})
    found = refusal(run, store)
    assert f"spec.teacher: found an embedding of {end} rows" in found and "own tokenizer" in found


@pytest.mark.parametrize(
    "keys",
    [
        {"rms_norm_eps": "1e-5"}, {"hidden_act": "silly"}, {"rope_theta": "10000"},
        {"pad_token_id": 99_999}, {"head_dim": 0}, {"head_dim": "8"}, {"vocab_size": "many"},
        {"rope_scaling": {"rope_type": "none"}},
    ],
)  # fmt: skip
def test_a_config_that_makes_no_model(store: Store, keys: dict[str, Any]) -> None:
    run = job(store, {"q": "Why?"}, student_config=LLAMA | keys)
    found = refusal(run, store, ExitCode.BAD_CONFIGURATION)
    assert found.startswith("spec.student.config")

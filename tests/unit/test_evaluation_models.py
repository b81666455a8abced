"""What is measured of real models: tiny ones, some of which were taught what to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from data_kit import TURNS, Bucket, tokenizer
from kubedistill_api.evaluation import Evaluation, Questions
from kubedistill_api.exit_codes import ExitCode
from kubedistill_trainer.evaluation.gym import Solved, load_task
from kubedistill_trainer.evaluation.measure import Plan, measure, plan_of
from kubedistill_trainer.evaluation.prompts import TO_RECALL, Asking, asking
from kubedistill_trainer.evaluation.questions import SHOTS, Question, QuestionSet
from kubedistill_trainer.evaluation.speak import NoRoom, Said, check_room, end_ids, speak
from kubedistill_trainer.evaluation.speed import lengths, measure_speed, pace, weights_bytes
from kubedistill_trainer.failures import RunFailure
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

END = 0
CAPITALS = [
    ("What is the capital of Peru?", "Lima"), ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Cuba?", "Havana"), ("What is the capital of Egypt?", "Cairo"),
]  # fmt: skip


def tiny(positions: int = 512, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=330, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions, **settings,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny()


def by_hand(model: Any, prompt: Sequence[int], length: int) -> Said:
    """Greedy decoding by whole forward passes."""
    ids, said, sure = list(prompt), [], []
    for _ in range(length):
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
        token = int(probabilities.argmax())
        said.append(token)
        sure.append(float(probabilities[token]))
        ids.append(token)
    return Said(tuple(said), tuple(sure))


PROMPTS = [[5], [7, 8, 9, 10, 11], [3, 4], [12] * 40]


def test_answers_and_their_probabilities_are_those_of_plain_forward_passes(model: Any) -> None:
    found = speak(model, PROMPTS, max_tokens=6, end_ids=[END])
    for said, prompt in zip(found, PROMPTS, strict=True):
        wanted = by_hand(model, prompt, 6)
        assert said.ids == wanted.ids
        assert said.probabilities == pytest.approx(wanted.probabilities, rel=1e-4)


def test_an_answer_ends_before_its_end_and_before_a_break(model: Any) -> None:
    [free] = speak(model, [PROMPTS[1]], max_tokens=6, end_ids=[END])
    third = free.ids[2]
    length = free.ids.index(third)
    cuts = (
        speak(model, [PROMPTS[1]], max_tokens=6, end_ids=[END, third]),
        speak(model, [PROMPTS[1]], max_tokens=6, end_ids=[END], breaks=lambda t: t == third),
    )
    for [cut] in cuts:
        assert cut.ids == free.ids[:length]
        assert cut.probabilities == pytest.approx(free.probabilities[:length])


def test_a_prompt_that_does_not_fit_is_no_empty_answer() -> None:
    short = tiny(positions=16)
    [found] = speak(short, [[5] * 10], max_tokens=6, end_ids=[END])
    assert len(found.ids) == 6
    with pytest.raises(NoRoom, match=r"1 of 2 prompts do not fit.* 16 positions"):
        speak(short, [[5] * 11, [5] * 10], max_tokens=6, end_ids=[END])


@pytest.mark.parametrize(
    ("lengths_", "max_tokens", "words"),
    [
        ([4, 10], 6, None),
        ([], 6, None),
        (
            [4, 11],
            6,
            "1 of 2 prompts do not fit: the longest has 11 tokens, with 6 .* at most 5 for",
        ),
        ([4, 4], 16, "2 of 2 prompts .* write at most 12 for maxAnswerTokens"),
        ([16], 1, "the prompt alone fills them"),
        ([4, 0], 1, "a prompt has no tokens"),
    ],
)
def test_prompts_and_answers_have_room(
    lengths_: list[int], max_tokens: int, words: str | None
) -> None:
    prompts = [[5] * length for length in lengths_]
    if words is None:
        check_room(prompts, 16, max_tokens)
        return
    with pytest.raises(NoRoom, match=words):
        check_room(prompts, 16, max_tokens)


def test_a_folders_generation_settings_are_set_aside_and_kept(model: Any) -> None:
    plain = speak(model, PROMPTS, max_tokens=6, end_ids=[END])
    kept = model.generation_config
    settings = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=3.0, eos_token_id=[7, 9]
    )
    model.generation_config = settings
    try:
        assert speak(model, PROMPTS, max_tokens=6, end_ids=[END]) == plain
        assert model.generation_config is settings
        assert end_ids(model, END) == {END, 7, 9}
    finally:
        model.generation_config = kept


def taught(facts: Sequence[tuple[str, str]], how: Asking) -> Any:
    """A model that has learnt by heart what to answer to some questions."""
    model = tiny()
    rows = []
    for question, answer in facts:
        prompt = how.encode(question, SHOTS, TO_RECALL)
        said = how.tokenizer.tokenizer.encode(f" {answer}\n" if how.one_line else answer).ids
        rows.append((prompt, [*said, END]))
    width = max(len(p) + len(s) for p, s in rows)
    ids, labels = np.zeros((len(rows), width), int), np.full((len(rows), width), -100)
    for row, (prompt, said) in enumerate(rows):
        ids[row, : len(prompt) + len(said)] = prompt + said
        labels[row, len(prompt) : len(prompt) + len(said)] = said
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.05:
            break
    assert loss.item() < 0.1
    return model.eval()


def plan(**parts: Any) -> Plan:
    questions = tuple(Question(question, (answer,)) for question, answer in CAPITALS)
    own: dict[str, Any] = {
        "tasks": (), "questions": QuestionSet("built-in", "d", questions),
        "max_answer_tokens": 12, "latency": False,
    }  # fmt: skip
    return Plan(**own | parts)


def nothing() -> None:
    """Nobody watches."""


@pytest.mark.parametrize("template", [None, TURNS])
def test_a_model_that_knows_the_answers_is_right_and_one_that_was_taught_others_hallucinates(
    template: str | None,
) -> None:
    how = asking(tokenizer(template), "spec.teacher")
    wrong = [(CAPITALS[i][0], CAPITALS[(i + 1) % 4][1]) for i in range(4)]
    knows, believes = (
        measure(taught(facts, how), how, plan(), nothing) for facts in (CAPITALS, wrong)
    )
    assert knows.questions is not None and believes.questions is not None
    assert (knows.questions.right, knows.questions.hallucinated) == (4, 0)
    assert knows.questions.confidence > 0.8
    assert (believes.questions.right, believes.questions.hallucinated) == (0, 4)
    assert {slip.said for slip in believes.questions.slips} == {answer for _, answer in CAPITALS}
    assert knows.figures() == {"questionAccuracy": 1.0, "hallucinationRate": 0.0}


def test_a_model_that_knows_nothing_is_wrong_without_being_sure(model: Any) -> None:
    how = asking(tokenizer(None), "spec.teacher")
    found = measure(model, how, plan(tasks=(load_task("chain_sum", 3),)), nothing)
    assert found.questions is not None and found.prompting == "Examples"
    assert (found.questions.right, found.questions.hallucinated) == (0, 0)
    assert [(task.right, task.examples) for task in found.tasks] == [(0, 3)]
    assert found.figures()["simpleAccuracy"] == 0
    assert not found.problems


def test_a_solved_task_counts(model: Any) -> None:
    """The model learns the answers to two sums by heart."""
    how = asking(tokenizer(None), "spec.teacher")
    task = load_task("chain_sum", 2)
    solved = [(q, str(e["answer"])) for q, e in zip(task.questions, task._entries, strict=True)]

    class Shown(Asking):
        def encode(self, question: str, shots: Sequence[Solved], request: str) -> list[int]:
            return super().encode(question, task.shots, request)

    knows = taught(solved, Shown(how.tokenizer, None))
    found = measure(knows, how, plan(tasks=(task,), questions=None), nothing)
    assert [(one.right, one.examples) for one in found.tasks] == [(2, 2)]
    assert found.figures() == {"simpleAccuracy": 1.0}


def test_a_part_that_fails_is_named_and_the_others_are_there(model: Any) -> None:
    refuses = asking(tokenizer("{{ raise_exception('not today') if messages }}"), "spec.teacher")
    found = measure(model, refuses, plan(latency=True), nothing)
    assert found.questions is None and found.performance is not None
    assert list(found.problems) == ["questions"] and "not today" in found.problems["questions"]


def test_what_a_model_has_no_room_for_is_named_and_has_no_figure() -> None:
    how = asking(tokenizer(None), "spec.teacher")
    tasks = (load_task("basic_arithmetic", 2), load_task("gsm_symbolic", 2))
    found = measure(tiny(positions=256), how, plan(tasks=tasks), nothing)
    assert list(found.problems) == ["gsm_symbolic"]
    assert "do not fit" in found.problems["gsm_symbolic"]
    assert [task.name for task in found.tasks] == ["basic_arithmetic"]
    full = measure(tiny(positions=64), how, plan(max_answer_tokens=64, latency=True), nothing)
    assert full.figures() == {} and list(full.problems) == ["questions"]
    assert full.problems["questions"].startswith("4 of 4 prompts do not fit")
    assert full.performance is not None and full.performance.prompt_tokens == 32


def test_speed_of_a_model_without_room_is_a_problem_by_name() -> None:
    how = asking(tokenizer(None), "spec.teacher")
    found = measure(tiny(positions=2), how, plan(questions=None, latency=True), nothing)
    assert found.performance is None and "2 positions" in found.problems["performance"]
    fewest = measure_speed(tiny(positions=3), nothing)
    assert (fewest.prompt_tokens, fewest.answer_tokens) == (1, 2)


def test_what_has_gone_since_the_preflight_is_a_problem_and_costs_no_training(model: Any) -> None:
    settings = Evaluation(
        tasks=["chain_sum", "no_such_task"], examples=2, latency=False,
        questions=Questions(uri="s3://data/gone.jsonl"),
    )  # fmt: skip
    made = plan_of(settings, Bucket().open)
    assert [task.name for task in made.tasks] == ["chain_sum"] and made.questions is None
    found = measure(model, asking(tokenizer(None), "spec.teacher"), made, nothing)
    assert [task.examples for task in found.tasks] == [2]
    assert "no such object s3://data/gone.jsonl" in found.problems["questions"]
    assert "no_such_task" in found.problems


def test_no_examples_ask_nothing() -> None:
    made = plan_of(Evaluation(examples=0), Bucket().open)
    assert (made.tasks, made.questions, made.problems) == ((), None, {})


def test_whoever_is_to_stop_stops_at_the_next_token(model: Any) -> None:
    asked = []

    def stop() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise RunFailure(ExitCode.GRACEFUL_CHECKPOINT, "asked to stop")

    how = asking(tokenizer(None), "spec.teacher")
    with pytest.raises(RunFailure, match="asked to stop"):
        measure(model, how, plan(), stop)
    assert len(asked) == 3


def test_speed_and_memory_of_a_model(model: Any) -> None:
    found = measure_speed(model, nothing)
    assert [one.batch for one in found.paces] == [1, 8]
    assert all(one.first_token_seconds > 0 and one.tokens_per_second > 0 for one in found.paces)
    assert (found.device, found.memory) == ("CPU", "growth of the process")
    assert (found.prompt_tokens, found.answer_tokens) == (64, 32)
    assert found.weights_bytes == weights_bytes(model)
    assert found.memory_bytes == found.weights_bytes + found.working_bytes
    assert found.working_bytes >= 0


def test_tied_weights_are_counted_once() -> None:
    def size(tied: bool) -> int:
        return weights_bytes(tiny(tie_word_embeddings=tied))

    assert size(False) - size(True) == 330 * 48 * 4


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (1 << 30, (64, 32)),
        (96, (48, 32)),
        (40, (20, 20)),
        (4, (2, 2)),
        (3, (1, 2)),
    ],
)
def test_prompt_and_answer_fit_a_models_positions(
    positions: int, expected: tuple[int, int]
) -> None:
    assert lengths(positions) == expected


def test_a_pace_is_the_median_of_the_rounds() -> None:
    rounds = [[0.1, 0.2, 0.3], [0.5, 0.6, 0.7], [0.2, 0.4, 0.6]]
    found = pace(8, rounds)
    assert found.first_token_seconds == 0.2
    # 8 rows, two tokens after the first in 0.2, 0.2 and 0.4 seconds.
    assert found.tokens_per_second == pytest.approx(80)

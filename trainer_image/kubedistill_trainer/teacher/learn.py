"""From a whole stream of text to what a student learns of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kubedistill_api.generation import ChainOfThought
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.status import TeacherStreamStatus

from kubedistill_trainer.data.conversation import Prompt
from kubedistill_trainer.data.tokenizer import TextTokenizer
from kubedistill_trainer.failures import InputsRefused, unreadable
from kubedistill_trainer.teacher.endpoint_refusals import likeness
from kubedistill_trainer.teacher.endpoint_reply import MAX_TOKENS, TOO_LONG
from kubedistill_trainer.teacher.filters import Learnt, TokenCount, responses, thoughts
from kubedistill_trainer.teacher.text import TextAnswer
from kubedistill_trainer.teacher.text_request import generation_of
from kubedistill_trainer.teacher.text_view import StreamView, price_of


@dataclass(frozen=True)
class TaughtText:
    """What a run learns of a teacher's text; `status`: the stream that it is from."""

    learnt: Learnt
    status: TeacherStreamStatus


def learn(
    spec: DistillationJobSpec,
    prompts: Sequence[Prompt],
    answers: Mapping[int, TextAnswer],
    tokenizer: TextTokenizer,
) -> Learnt:
    """The answers that pass the job's filters, in the same order in every process.

    InputsRefused when none does.
    """
    samples = generation_of(spec).samples
    if spec.distill is not None and spec.distill.signal == "ChainOfThought":
        settings = spec.distill.chain_of_thought or ChainOfThought()
        learnt = thoughts(prompts, answers, samples, settings, token_count(tokenizer))
    else:
        learnt = responses(prompts, answers, samples)
    if not learnt.conversations:
        raise _nothing_learnt(learnt, answers)
    return learnt


def _nothing_learnt(learnt: Learnt, answers: Mapping[int, TextAnswer]) -> InputsRefused:
    """The advice is about what most answers were dropped for."""
    found = f"nothing to learn from: {learnt.sentence()}"
    if 2 * learnt.dropped.get("refused", 0) < max(1, learnt.asked):
        return unreadable(
            "spec.distill", found,
            "loosen spec.distill.chainOfThought, raise spec.distill.generation.maxTokens where "
            "answers are unfinished, or give other prompts",
        )  # fmt: skip
    words, count = _most_frequent_refusal(answers)
    found += f" ({count:,} times as in “{words}”)"
    if TOO_LONG.search(words) or "have room for" in words:
        advice = "lower spec.distill.generation.maxTokens, give shorter prompts, or serve a larger context"
        return unreadable(MAX_TOKENS, found, advice)
    return unreadable("spec.teacher", found, "mend what the refusal names, or give other prompts")


def _most_frequent_refusal(answers: Mapping[int, TextAnswer]) -> tuple[str, int]:
    """(an example of the most frequent refusal, how often it was met); counts in it may differ."""
    refusals = [answer.refusal for answer in answers.values() if answer.refusal]
    [(kind, count)] = Counter(map(likeness, refusals)).most_common(1)
    return next(words for words in refusals if likeness(words) == kind), count


def token_count(tokenizer: TextTokenizer) -> TokenCount:
    """Tokens of a text by the student's tokenizer."""
    return lambda text: len(tokenizer.tokenizer.encode(text, add_special_tokens=False).ids)


def status_of(
    view: StreamView, spec: DistillationJobSpec, *, complete: bool, learnt: str = ""
) -> TeacherStreamStatus:
    """What the status says of a stream of text."""
    totals = view.totals
    price = price_of(spec.teacher.endpoint if spec.teacher else None)
    return TeacherStreamStatus(
        uri=view.stream.uri,
        digest=view.manifest.identity.digest(),
        payload="Text",
        bytes=totals.size_bytes,
        tokens=totals.answer_tokens,
        complete=complete,
        answers=totals.answers,
        prompt_tokens=totals.prompt_tokens,
        answer_tokens=totals.answer_tokens,
        evaluation_tokens=totals.beside.tokens,
        cost=round(totals.cost(price), 6) if price else None,
        learnt=learnt,
    )

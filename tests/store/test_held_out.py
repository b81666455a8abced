"""The teacher's states over held-out answers: written by its pod, read by the ranks. A real store."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import data_kit
import pytest
import torch
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.runspec import ResolvedModel, RunSpec
from kubedistill_trainer.context import Context
from kubedistill_trainer.data.dataset import Dataset
from kubedistill_trainer.exporter import ProgressBoard
from kubedistill_trainer.failures import InputsRefused, RunFailure
from kubedistill_trainer.methods import held_out, own_teacher
from kubedistill_trainer.methods.held_out import NotComparable, held_out_teacher
from kubedistill_trainer.methods.learn_text import text_there
from kubedistill_trainer.methods.signal import OnlineTeacher
from kubedistill_trainer.methods.write_text import run_text_teacher
from kubedistill_trainer.preflight import run_preflight
from kubedistill_trainer.report.evaluate import measure
from kubedistill_trainer.store import Store
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)
from text_kit import Clerk, context_of, put_prompts, text_job
from transformers import AutoConfig, AutoModelForCausalLM

PROMPTS = 24
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def store(s3: S3Server) -> Store:  # noqa: F811
    return s3.store()


def tiny(seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    # The student's head has the tokenizer's rows, the teacher's a few more.
    sizes = {
        "vocab_size": data_kit.tokenizer().vocab_size + 6,
        "initializer_range": 0.2,
        **settings,
    }
    config = AutoConfig.for_model(**{**LLAMA, **sizes})
    return AutoModelForCausalLM.from_config(config).eval()


def job(
    store: Store,
    tmp_path: Path,
    *,
    teacher: str | None = data_kit.TURNS,
    gates: tuple[dict[str, Any], ...] = (),
    **settings: Any,
) -> RunSpec:
    tiny(**settings).save_pretrained(tmp_path / "teacher")
    for path in (tmp_path / "teacher").iterdir():
        store.put(f"teacher/{path.name}", path.read_bytes())
    for name, body in data_kit.tokenizer(teacher).files.items():
        store.put(f"teacher/{name}", body)
    for name, body in data_kit.tokenizer().files.items():
        store.put(f"tokenizer/{name}", body)
    data = {
        "sources": [
            {"uri": put_prompts(store, PROMPTS), "origin": "Teacher", "promptField": "q"}
        ],
        "tokenizer": {"uri": store.uri_of("tokenizer")}, "sequenceLength": 128, "holdout": 0.6,
    }  # fmt: skip
    run = text_job(
        store, "", data=data, teacher={"model": {"uri": store.uri_of("teacher")}}, gates=list(gates),
        student={"config": {**LLAMA, "hidden_size": 16}}, workers={"gpusPerNode": 0},
        training={"globalBatchSize": 2, "precision": "FP32"},
    )  # fmt: skip
    return run.model_copy(update={"teacher_model": ResolvedModel(uri=store.uri_of("teacher"))})


def teach(context: Context) -> None:
    """A random model would not come to an end: the answers are the clerk's, the states its own."""
    run_text_teacher(context, ProgressBoard(), Clerk().open)
    own_teacher.run_own_teacher(context, ProgressBoard())


class Engine:
    """A student, as the evaluation sees it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._model = tiny(7, hidden_size=16, vocab_size=data_kit.tokenizer().vocab_size)

    def eval(self) -> None:
        """It is."""

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(input_ids=tokens, position_ids=positions).logits
        return logits.flatten(0, 1)


def learnt(context: Context) -> Dataset:
    found = text_there(context)
    assert found is not None
    return found


def figures(dataset: Dataset, teacher: Any, ranks: int = 1) -> dict[str, float]:
    sums = [measure(Engine(), teacher, dataset, rank, ranks) for rank in range(ranks)]
    for other in sums[1:]:
        sums[0].vector += other.vector
    return dict(sums[0].evaluation(dataset.sources).figures)


def test_the_figures_are_those_beside_the_teacher_itself(store: Store, tmp_path: Path) -> None:
    # The same in other words.
    run = job(store, tmp_path, teacher=data_kit.TURNS + "{# as ever #}")
    context = context_of(run, store, tmp_path)
    teach(context)
    dataset = learnt(context)
    assert len(dataset.split.heldout) > 2
    wanted = figures(dataset, OnlineTeacher(tiny()))
    beside = held_out_teacher(context, dataset, torch.device("cpu"))
    found = figures(dataset, beside, ranks=2)
    beside.close()
    assert not beside.problem
    assert {"perplexityRatio", "teacherAgreement", "teacherKL", "teacherEce"} <= found.keys()
    assert found == pytest.approx(wanted, rel=0.02)
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-6)


def test_the_preflight_starts_the_teacher_for_it_alone(store: Store, tmp_path: Path) -> None:
    run = job(store, tmp_path)
    context = context_of(run, store, tmp_path)
    teach(context)
    resolved = run_preflight(context).resolved
    assert resolved is not None and resolved.stream_complete
    stream = store.child(held_out.held_out(context, learnt(context)).identity.address)
    [shard] = [o.key for o in stream.list("partitions/") if o.key.endswith(".shard")]
    stream.delete([shard])
    resolved = run_preflight(context).resolved
    assert resolved is not None and not resolved.stream_complete
    teach(context)
    resolved = run_preflight(context).resolved
    assert resolved is not None and resolved.stream_complete


@pytest.mark.parametrize(
    ("error", "raised", "tries"),
    [(AttributeError("no decoder"), False, 3), (torch.OutOfMemoryError("full"), False, 3),
     (RunFailure(ExitCode.OUT_OF_MEMORY, "split"), True, 3),
     (RunFailure(ExitCode.INTERRUPTED, "stop"), True, 5)],
)  # fmt: skip
def test_states_that_cannot_be_written_cost_no_job(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    raised: bool,
    tries: int,
) -> None:
    context = context_of(job(store, tmp_path), store, tmp_path)
    tried: list[int] = []

    def fails(*arguments: Any) -> Any:
        tried.append(1)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(held_out, "teacher_outputs", fails)
        for _ in range(5):
            with pytest.raises(RunFailure) if raised and len(tried) < tries else nullcontext():
                teach(context)
    assert len(tried) == tries
    resolved = run_preflight(context).resolved
    given_up = tries == 3
    assert resolved is not None and resolved.stream_complete == given_up
    with pytest.raises(NotComparable, match="has not written its states"):
        held_out_teacher(context, learnt(context), torch.device("cpu"))


def test_another_split_is_another_stream(store: Store, tmp_path: Path) -> None:
    context = context_of(job(store, tmp_path), store, tmp_path)
    teach(context)
    dataset = learnt(context)
    other = replace(dataset.split, heldout=dataset.split.heldout[:-1])
    with pytest.raises(NotComparable, match="has not written its states"):
        held_out_teacher(context, replace(dataset, split=other), torch.device("cpu"))


def test_what_rots_is_left_out_of_the_figures_and_named(store: Store, tmp_path: Path) -> None:
    context = context_of(job(store, tmp_path), store, tmp_path)
    teach(context)
    dataset = learnt(context)
    stream = store.child(held_out.held_out(context, dataset).identity.address)
    [shard] = [o.key for o in stream.list("partitions/") if o.key.endswith(".shard")]
    data = bytearray(stream.get(shard))
    data[len(data) // 2] ^= 1
    stream.put(shard, bytes(data))
    beside = held_out_teacher(context, dataset, torch.device("cpu"))
    found = figures(dataset, beside)
    beside.close()
    assert "the teacher is asked to write it again" in beside.problem
    assert "perplexityRatio" not in found and found["perplexity"] > 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"teacher": data_kit.STRICT}, "another chat template"),
        ({"teacher": data_kit.TURNS + "!"}, "another chat template"),
    ],
)
def test_a_teacher_of_other_tokens_is_not_held_beside(
    store: Store, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    run = job(store, tmp_path, **change)
    context = context_of(run, store, tmp_path)
    teach(context)
    resolved = run_preflight(context).resolved
    assert resolved is not None and resolved.stream_complete
    with pytest.raises(NotComparable, match=why):
        held_out_teacher(context, learnt(context), torch.device("cpu"))
    gate = {"metric": "teacherKL", "max": 1}
    gated = job(store, tmp_path, gates=(gate,), **change)
    with pytest.raises(InputsRefused) as refused:
        run_preflight(context_of(gated, store, tmp_path))
    assert (
        f"spec.gates[0].metric: found teacherKL, which nobody can measure: the teacher has {why}"
        in (str(refused.value))
    )


def test_a_gate_beside_the_teacher_is_taken_where_tokens_are_one(
    store: Store, tmp_path: Path
) -> None:
    gates = ({"metric": "hallucinationRate", "max": 1}, {"metric": "perplexityRatio", "max": 2})
    assert run_preflight(context_of(job(store, tmp_path, gates=gates), store, tmp_path)).resolved


def test_a_server_has_none(store: Store, tmp_path: Path) -> None:
    run = job(store, tmp_path).model_copy(update={"teacher_model": None})
    with pytest.raises(NotComparable, match="a server says what it answers"):
        held_out.check_comparable(context_of(run, store, tmp_path), data_kit.tokenizer(), None)

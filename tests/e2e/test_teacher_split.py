"""A teacher over two processes writes what it writes in one: the real launcher, gloo, a real store."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from devcluster.s3 import S3Server
from devcluster.zygote import Zygote
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import ResolvedModel
from kubedistill_trainer.data.template import EXAMPLE
from kubedistill_trainer.evaluation.results import Abilities
from kubedistill_trainer.store import Store
from kubedistill_trainer.teacher.manifest import Manifest
from kubedistill_trainer.teacher.payload import TeacherOutputs
from kubedistill_trainer.teacher.stream_reader import StreamReader
from kubedistill_trainer.teacher.text import TextAnswer
from kubedistill_trainer.teacher.text_manifest import TextManifest
from kubedistill_trainer.teacher.text_reader import read_text, wait_for_text
from transformers import LlamaConfig, LlamaForCausalLM

from e2e.gang import Trainer, put_inputs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
TEACHER = "teachers/split"
EVALUATION = {"tasks": ["chain_sum"], "examples": 8, "maxAnswerTokens": 12, "latency": True}


@dataclass(frozen=True)
class Bench:
    trainer: Trainer
    server: S3Server
    folder: Path

    @property
    def model(self) -> ResolvedModel:
        return ResolvedModel(uri=f"s3://{self.server.access.bucket}/{TEACHER}", digest="", job="")

    def spec(self, name: str, gpus: int, payload: str) -> DistillationJobSpec:
        """A job with a storage prefix of its own: the stream's address says nothing of GPUs."""
        return self.trainer.spec(
            distill={"objective": {"temperature": 1.0}},
            teacher={
                "model": {"uri": self.model.uri},
                "payload": payload,
                "topK": 20,
                "maxGradientError": 1.0,
                "workers": {"gpusPerReplica": gpus},
            },
            student={"fromTeacher": {"layers": 1}},
            storage={"uri": f"s3://{self.server.access.bucket}/{name}"},
            evaluation=EVALUATION,
        )

    def figures(self, name: str) -> Abilities:
        """What was found of the teacher of the job with this prefix."""
        store = Store(
            f"s3://{self.server.access.bucket}/{name}", endpoint=self.server.access.endpoint
        )
        [key] = [k.key for k in store.list("evaluations/") if k.key.endswith(".json")]
        return Abilities.model_validate_json(store.get(key))

    def written(self, name: str, gpus: int, payload: str) -> list[TeacherOutputs]:
        """What a teacher's pod wrote, sample by sample."""
        spec = self.spec(name, gpus, payload)
        result = self.trainer.run("teacher", spec, name=name, teacher=self.model)
        assert result.codes == [0], result.log
        assert result.outcomes[0].progress is not None
        store = Store(spec.storage.uri, endpoint=spec.storage.endpoint)
        [manifest] = [k.key for k in store.list("streams/") if k.key.endswith("manifest.json")]
        layout = Manifest.model_validate_json(store.get(manifest))
        with StreamReader(store, layout.identity, cache=self.folder / name) as reader:
            hashes = _hashes(reader, layout)
            return [reader.get(sample, hashes[sample]) for sample in range(layout.samples)]


def _hashes(reader: StreamReader, layout: Manifest) -> dict[int, int]:
    """The token hash of each sample, from the shards themselves."""
    reader.refresh()
    found: dict[int, int] = {}
    for log in reader._logs:
        for shard in log.shards:
            opened = reader._cache._reader(shard)
            found |= {sample: entry[0] for sample, entry in opened._samples.items()}
    assert sorted(found) == list(range(layout.samples))
    return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, warm: Zygote) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("split")
    server = S3Server(folder / "s3")
    server.start()
    access = server.access
    keys = {"AWS_ACCESS_KEY_ID": access.access_key, "AWS_SECRET_ACCESS_KEY": access.secret_key}
    try:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in keys.items():
                environment.setenv(name, value)
            put_inputs(access)
            _put_teacher(access, folder / "model")
            yield Bench(Trainer(folder, access, warm), server, folder)
    finally:
        server.stop()


def _put_teacher(access: Any, folder: Path) -> None:
    import corpus

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    # So that it can be asked: the tokenizer of the data, and a template.
    for name, body in corpus.tokenizer_files(512).items():
        (folder / name).write_bytes(body)
    (folder / "chat_template.jinja").write_text(EXAMPLE)
    client = access.client()
    for path in folder.iterdir():
        client.put_object(
            Bucket=access.bucket, Key=f"{TEACHER}/{path.name}", Body=path.read_bytes()
        )


def test_hidden_states_of_a_split_teacher(bench: Bench) -> None:
    whole, split = (bench.written(f"hidden-{gpus}", gpus, "Hidden") for gpus in (1, 2))
    assert len(whole) == len(split) > 5
    for one, other in zip(whole, split, strict=True):
        assert one.hidden is not None
        assert other.hidden is not None
        # A rounding apart: one step of the 8 bits, where a value lay between two.
        step = one.hidden.states.abs().amax() / 100
        difference = (one.hidden.states - other.hidden.states).abs()
        assert float(difference.max()) <= step
        assert float((difference > step / 1000).float().mean()) < 0.01
    _measured_alike(bench.figures("hidden-1"), bench.figures("hidden-2"))


def _measured_alike(whole: Abilities, split: Abilities) -> None:
    """All of it, with keys and values in both processes; the time is each machine's own."""
    assert not whole.problems
    assert not split.problems
    assert split.tasks == whole.tasks
    assert whole.questions is not None
    assert split.questions is not None
    assert whole.questions.confidence
    # An answer that falls on the other side of a tie is another one from there on.
    assert split.questions.confidence == pytest.approx(whole.questions.confidence, rel=0.05)
    assert whole.performance is not None
    assert split.performance is not None
    assert (whole.performance.device, split.performance.device) == ("CPU", "2 × CPU")
    assert split.performance.weights_bytes == whole.performance.weights_bytes
    assert all(pace.tokens_per_second > 0 for pace in split.performance.paces)


def test_a_split_teacher_measures_its_payloads(bench: Bench) -> None:
    """The measurement runs the decoder with fewer layers: the other process has to follow."""
    whole, split = (bench.written(f"auto-{gpus}", gpus, "Auto") for gpus in (1, 2))
    for one, other in zip(whole, split, strict=True):
        assert one.sparse is not None
        assert other.sparse is not None
        same = (one.sparse.token_ids == other.sparse.token_ids).all(-1)
        assert float(same.float().mean()) > 0.98
        assert torch.allclose(one.sparse.log_z, other.sparse.log_z, atol=1e-3)


def _answers(bench: Bench, name: str, gpus: int) -> dict[int, TextAnswer]:
    bucket = f"s3://{bench.server.access.bucket}"
    prompts = {"uri": f"{bucket}/data/sums.jsonl", "origin": "Teacher", "promptField": "question"}
    generation = {"maxTokens": 6, "samples": 2, "temperature": 0.5}
    spec = bench.trainer.spec(
        distill={"signal": "Responses", "generation": generation},
        teacher={"model": {"uri": bench.model.uri}, "workers": {"gpusPerReplica": gpus}},
        student={"fromTeacher": {"layers": 1}},
        data={"sources": [prompts]},
        storage={"uri": f"{bucket}/{name}"},
        evaluation=EVALUATION,
    )
    result = bench.trainer.run("teacher", spec, name=name, teacher=bench.model)
    assert result.codes == [0], result.log
    store = Store(spec.storage.uri, endpoint=spec.storage.endpoint)
    [manifest] = [k.key for k in store.list("streams/") if k.key.endswith("manifest.json")]
    layout = TextManifest.model_validate_json(store.get(manifest))
    return read_text(wait_for_text(store, layout.identity, stall_seconds=0))


def test_a_split_teacher_says_the_same(bench: Bench) -> None:
    whole, split = (_answers(bench, f"text-{gpus}", gpus) for gpus in (1, 2))
    assert len(whole) == len(split) == 128
    assert len({answer.text for answer in whole.values()}) > 64
    # Sums are made in another order: now and then a draw falls on the other side.
    same = sum(whole[n] == split[n] for n in whole)
    assert same >= 120
    _measured_alike(bench.figures("text-1"), bench.figures("text-2"))


def test_its_states_over_held_out_answers_reach_all_ranks(bench: Bench) -> None:
    """A teacher that is learnt by its text, split, beside two ranks that evaluate."""
    bucket = f"s3://{bench.server.access.bucket}"
    prompts = {"uri": f"{bucket}/data/sums.jsonl", "origin": "Teacher", "promptField": "question"}
    spec = bench.trainer.spec(
        # It says what nobody taught it, and seldom ends by itself: enough is left to learn from.
        distill={"signal": "Responses", "generation": {"maxTokens": 96, "temperature": 2.0}},
        teacher={"model": {"uri": bench.model.uri}, "workers": {"gpusPerReplica": 2}},
        student={"fromTeacher": {"layers": 1}},
        data={"sources": [prompts], "sequenceLength": 128, "chatTemplate": EXAMPLE},
        training={"maxSteps": 1},
        storage={"uri": f"{bucket}/held-out"},
        evaluation={**EVALUATION, "latency": False},
    )
    written = bench.trainer.run("teacher", spec, name="held-out", teacher=bench.model)
    assert written.codes == [0], written.log
    learnt = bench.trainer.run("student", spec, name="held-out", teacher=bench.model)
    assert learnt.codes == [0, 0], learnt.log
    figures = {metric.name: metric.value for metric in learnt.outcomes[0].metrics}
    ratio = figures["perplexity"] / figures["teacherPerplexity"]
    assert figures["perplexityRatio"] == pytest.approx(ratio, rel=1e-4)
    assert figures["teacherKL"] > 0 and 0 <= figures["teacherAgreement"] <= 1


def test_the_death_of_one_process_ends_the_other(bench: Bench) -> None:
    spec = bench.spec("dies", 2, "Hidden")
    killed: list[int] = []

    def strike(pids: list[int]) -> None:
        pid = pids[0]
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            ours = [int(c) for c in children if b"teacher_rank\0001" in _command(int(c))]
            if ours:
                time.sleep(3)
                os.kill(ours[0], signal.SIGKILL)
                killed.append(ours[0])
            time.sleep(0.05)

    result = bench.trainer.run("teacher", spec, name="killed", teacher=bench.model, strike=strike)
    assert killed
    assert result.codes != [0], result.log
    assert bench.written("dies", 1, "Hidden"), "the next writer takes it up"


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""

"""A batch whose gradient is no number, in real gangs under ZeRO: left out by policy, or the end.

The poison is a row of the student's embedding, as a broken file has it: of two bytes that only a few
records hold. Its square is beyond float32, so the norm of its vector is infinite.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from devcluster.s3 import S3Access
from devcluster.zygote import Zygote
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.names import run_uri
from kubedistill_api.runspec import ProgressReport, ResolvedModel
from kubedistill_trainer.checkpoint.records import Commit, decode
from safetensors.torch import load
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from e2e.gang import Result, Trainer, committed, exported
from e2e.test_restart_in_place import rank_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
POISON = "\u07ff"
SICK_RECORDS = (5, 30)
STEPS = 24


@pytest.fixture(scope="module")
def sick_model(access: S3Access, tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    """A student with the poison in it, and text that holds it in two places."""
    client = access.client()
    key = "tokenizer/tokenizer.json"
    body = client.get_object(Bucket=access.bucket, Key=key)["Body"].read()
    tokenizer = Tokenizer.from_str(body.decode())
    ids = tokenizer.encode(POISON, add_special_tokens=False).ids
    texts = [f"{n} and {n + 1} make {2 * n + 1}; " * 8 for n in range(160)]
    assert not set(ids) & {i for text in texts for i in tokenizer.encode(text).ids}
    for number in SICK_RECORDS:
        texts[number] += POISON
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    client.put_object(Bucket=access.bucket, Key="data/sick.jsonl", Body=lines.encode())
    folder = tmp_path_factory.mktemp("sick")
    _sick(ids[0]).save_pretrained(folder)
    for path in folder.iterdir():
        key = f"models/sick/{path.name}"
        client.put_object(Bucket=access.bucket, Key=key, Body=path.read_bytes())
    return ResolvedModel(uri=f"s3://{access.bucket}/models/sick")


def _sick(row: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[row] = 3e38
    return model


def spec_of(
    trainer: Trainer, access: S3Access, stage: int, policy: str, precision: str = "FP32"
) -> DistillationJobSpec:
    return trainer.spec(
        fineTune={},
        student={"model": {"uri": f"s3://{access.bucket}/models/sick"}},
        data={"sources": [{"uri": f"s3://{access.bucket}/data/sick.jsonl"}], "holdout": 0.05},
        training={
            "maxSteps": STEPS,
            "epochs": 1,
            "onNonFiniteLoss": policy,
            "precision": precision,
            "deepSpeed": {"zeroStage": stage},
        },
        checkpoint={"interval": 2},
    )


def progress_of(result: Result) -> ProgressReport:
    progress = result.outcomes[0].progress
    assert progress is not None
    return progress


@pytest.fixture(scope="module")
def calm(
    access: S3Access,
    sick_model: ResolvedModel,
    tmp_path_factory: pytest.TempPathFactory,
    warm: Zygote,
) -> Callable[[int], Result]:
    """A run under a ZeRO stage that leaves the sick steps out and that nothing happens to."""
    trainer = Trainer(tmp_path_factory.mktemp("calm"), access, warm)

    @cache
    def run(stage: int) -> Result:
        spec = spec_of(trainer, access, stage, "Skip")
        result = trainer.run("student", spec, name=f"calm-{stage}", student=sick_model)
        assert set(result.codes) == {0}, result.log
        return result

    return run


@pytest.mark.parametrize("stage", [1, 3])
def test_the_sick_batches_are_left_out_and_the_others_are_not(
    access: S3Access, calm: Callable[[int], Result], stage: int
) -> None:
    progress = progress_of(calm(stage))
    assert 1 <= len(progress.skipped_steps) <= len(SICK_RECORDS)
    assert progress.step == STEPS
    for name, tensor in load(exported(access, calm(stage))).items():
        assert torch.isfinite(tensor).all(), name


def test_all_stages_of_zero_learn_the_same_of_a_head_that_is_not_tied(
    access: S3Access, calm: Callable[[int], Result]
) -> None:
    one, three = (load(exported(access, calm(stage))) for stage in (1, 3))
    assert "lm_head.weight" in one
    for name, tensor in one.items():
        torch.testing.assert_close(three[name], tensor, rtol=0, atol=1e-4, msg=name)
    assert progress_of(calm(1)).skipped_steps == progress_of(calm(3)).skipped_steps


@pytest.mark.parametrize("stage", [1, 3])
def test_skipped_alike_when_a_rank_is_killed(
    access: S3Access,
    sick_model: ResolvedModel,
    calm: Callable[[int], Result],
    tmp_path: Path,
    warm: Zygote,
    stage: int,
) -> None:
    trainer, left_out = Trainer(tmp_path, access, warm), progress_of(calm(stage)).skipped_steps
    spec, name = spec_of(trainer, access, stage, "Skip"), f"struck-{stage}"
    uri = run_uri(spec.storage.uri, "test", name, f"uid-{name}")

    def strike(pids: list[int]) -> None:
        # A commit behind the first step that is left out: what is resumed from knows of it.
        committed(access, uri, 2 + left_out[0] // 2)
        rank_of(pids[1]).send_signal(signal.SIGKILL)

    struck = trainer.run("student", spec, name=name, student=sick_model, strike=strike)
    assert set(struck.codes) == {0}, struck.log
    assert progress_of(struck).rank_restarts == 1
    assert progress_of(struck).skipped_steps == left_out
    assert exported(access, struck) == exported(access, calm(stage))


def test_by_default_it_stops_and_keeps_its_commits(
    access: S3Access, sick_model: ResolvedModel, tmp_path: Path, warm: Zygote
) -> None:
    trainer = Trainer(tmp_path, access, warm)
    spec = spec_of(trainer, access, 1, "Stop", "BF16")
    result = trainer.run("student", spec, name="sick-stop", student=sick_model)
    assert set(result.codes) == {ExitCode.NON_FINITE_LOSS}, result.log
    for outcome in result.outcomes:
        assert outcome.reason == "NonFiniteLoss"
        assert "is no number; lower spec.training.learningRate" in outcome.message
    ended_at = progress_of(result).step
    uri = run_uri(spec.storage.uri, "test", "sick-stop", "uid-sick-stop")
    prefix = f"{uri.removeprefix(f's3://{access.bucket}/')}/log/"
    client = access.client()
    found = client.list_objects_v2(Bucket=access.bucket, Prefix=prefix)["Contents"]
    bodies = [
        client.get_object(Bucket=access.bucket, Key=item["Key"])["Body"].read() for item in found
    ]
    commits = [record for record in map(decode, bodies) if isinstance(record, Commit)]
    assert commits
    assert max(commit.step for commit in commits) <= ended_at < STEPS

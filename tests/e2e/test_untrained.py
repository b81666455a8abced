"""Models that real ranks prune, quantise and measure; and students cut out of their teachers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from devcluster.s3 import S3Server
from devcluster.zygote import Zygote
from kubedistill_api.exit_codes import ExitCode
from kubedistill_api.job import DistillationJobSpec
from kubedistill_api.runspec import ResolvedModel
from safetensors.torch import load

from e2e.gang import Result, Trainer, llama, model_of, put_inputs, stored

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Bench:
    trainer: Trainer
    server: S3Server
    large: ResolvedModel

    def spec(self, **parts: Any) -> DistillationJobSpec:
        """Prunes the large model, and compares the result with it."""
        own: dict[str, Any] = {
            "teacher": {"model": {"uri": self.large.uri}, "workers": {"gpusPerReplica": 0}},
            "student": {"model": {"uri": self.large.uri}},
            **parts,
        }
        return self.trainer.spec(**own)

    def run(self, role: str, spec: DistillationJobSpec, name: str) -> Result:
        return self.trainer.run(role, spec, name=name, teacher=self.large, student=self.large)

    def object(self, uri: str, name: str) -> bytes:
        return stored(self.server.access, uri, name)

    def made(self, result: Result) -> tuple[dict[str, Any], dict[str, Any]]:
        """config.json and report.json of the model."""
        uri = model_of(result, "any").uri
        return tuple(json.loads(self.object(uri, name)) for name in ("config.json", "report.json"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, warm: Zygote) -> Iterator[Bench]:
    folder: Path = tmp_path_factory.mktemp("untrained")
    server = S3Server(folder / "s3")
    server.start()
    try:
        put_inputs(server.access)
        trainer = Trainer(folder, server.access, warm)
        shape = {**llama(32, 4), "num_attention_heads": 4, "intermediate_size": 104}
        made = trainer.run(
            "student",
            trainer.spec(
                fineTune={}, student={"config": shape}, workers={"nodes": 1},
                training={"maxSteps": 40},
            ),
            name="large",
        )  # fmt: skip
        assert made.codes == [0], made.log
        yield Bench(trainer, server, model_of(made, "large"))
    finally:
        server.stop()


def test_a_model_is_pruned_by_two_ranks_and_compared_with_what_it_was(bench: Bench) -> None:
    kept = {"layers": 3, "heads": 0.5, "ffn": 64, "embedding": 24, "calibrationSequences": 6}
    spec = bench.spec(prune={"structured": kept})
    looked = bench.run("preflight", spec, "pruned")
    assert looked.codes == [0], looked.log
    measured = bench.run("teacher", spec, "pruned")
    assert measured.codes == [0], measured.log
    result = bench.run("student", spec, "pruned")
    assert result.codes == [0, 0], result.log
    config, report = bench.made(result)
    assert (config["num_hidden_layers"], config["num_attention_heads"]) == (3, 2)
    assert (config["intermediate_size"], config["hidden_size"], config["head_dim"]) == (64, 24, 8)
    resolved = looked.outcomes[0].resolved
    assert resolved is not None and resolved.total_steps == 0
    assert resolved.student_parameters == report["student"]["parameters"]
    assert report["job"]["method"] == "prune" and report["notMeasured"] == {}
    assert (
        report["pruning"]["before"]["hidden"] == 32 and report["pruning"]["after"]["hidden"] == 24
    )
    assert len(report["pruning"]["kept_layers"]) == 3
    metrics = report["metrics"]
    assert metrics["teacherPerplexity"] == pytest.approx(metrics["initialPerplexity"], rel=1e-4)
    assert metrics["perplexityRatio"] > 1


def test_a_student_is_cut_out_of_its_teacher_within_a_budget(bench: Bench) -> None:
    kept = {"parameters": 0.8, "calibrationSequences": 6}
    spec = bench.spec(
        distill={}, student={"model": None, "fromTeacher": kept},
        teacher={"model": {"uri": bench.large.uri}, "delivery": "Online"},
        training={"maxSteps": 2, "deepSpeed": {"zeroStage": 3}},
    )  # fmt: skip
    result = bench.trainer.run("student", spec, name="cut", teacher=bench.large)
    assert result.codes == [0, 0], result.log
    _, report = bench.made(result)
    pruning = report["pruning"]
    assert report["student"]["parameters"] == pruning["parameters_after"]
    assert pruning["parameters_after"] <= 0.8 * pruning["parameters_before"]
    losses = [one["loss"] for one in pruning["candidates"]]
    chosen = [one["loss"] for one in pruning["candidates"] if one["sizes"] == pruning["after"]]
    assert len(losses) > 1 and chosen == [min(losses)]


@pytest.mark.parametrize(
    "kept,sentence",
    [
        ({"heads": 0.3}, "spec.prune.structured.heads: found 0.3, which is 1.2 of 4 heads"),
        ({"layers": 9}, "spec.prune.structured.layers: found 9; the model has 4 layers"),
        ({"parameters": 0.01}, "spec.prune.structured.parameters: found 0.01"),
    ],
)
def test_what_no_model_can_have_is_refused_before_a_pod_is_asked_for(
    bench: Bench, kept: dict[str, Any], sentence: str
) -> None:
    spec = bench.spec(prune={"structured": kept})
    looked = bench.run("preflight", spec, f"no-{next(iter(kept))}")
    assert looked.codes == [int(ExitCode.BAD_CONFIGURATION)], looked.log
    assert sentence in looked.outcomes[0].message


def test_a_quantised_model_is_compared_with_what_it_was_and_measured_again(bench: Bench) -> None:
    alone = {"nodes": 1}
    online = {"model": {"uri": bench.large.uri}, "delivery": "Online"}
    spec = bench.spec(
        quantize={"scheme": "W8A16", "calibrationSequences": 8}, workers=alone, teacher=online
    )
    looked = bench.run("preflight", spec, "quantised")
    assert looked.codes == [0], looked.log
    result = bench.run("student", spec, "quantised")
    assert result.codes == [0], result.log
    config, report = bench.made(result)
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert report["job"]["method"] == "quantize" and report["notMeasured"] == {}
    assert report["sizeOnDisk"]["student"] < 0.6 * report["sizeOnDisk"]["teacher"]
    metrics = report["metrics"]
    assert metrics["perplexityRatio"] == pytest.approx(1, abs=0.05)

    small = model_of(result, "quantised")
    again = bench.spec(evaluate={}, workers=alone, teacher=online)
    found = bench.trainer.run("student", again, name="measured", teacher=bench.large, student=small)
    assert found.codes == [0], found.log
    model = found.outcomes[0].model
    assert model is not None and (model.uri, model.digest) == (small.uri, small.digest)
    measured = json.loads(bench.object(model.report or "", "report.json"))
    assert measured["metrics"]["perplexity"] == pytest.approx(metrics["perplexity"], rel=1e-6)
    methods: list[dict[str, Any]] = [
        {"quantize": {}}, {"prune": {"structured": {"layers": 1}}}, {"fineTune": {}},
    ]  # fmt: skip
    for method in methods:
        spec = bench.spec(**method, workers=alone, teacher=online)
        refused = bench.trainer.run(
            "preflight", spec, name=f"twice-{next(iter(method)).lower()}", teacher=bench.large,
            student=small,
        )  # fmt: skip
        assert refused.codes == [int(ExitCode.BAD_CONFIGURATION)], refused.log
        assert (
            "spec.student: found a model that is quantised already" in refused.outcomes[0].message
        )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zeros_stay_zero_while_a_sparse_model_is_trained(bench: Bench, stage: int) -> None:
    alone, name = {"nodes": 1}, f"sparse-{stage}"
    prune = {"unstructured": {"pattern": "2:4", "criterion": "Magnitude"}}
    result = bench.run("student", bench.spec(prune=prune, teacher=None, workers=alone), name)
    assert result.codes == [0], result.log
    _, report = bench.made(result)
    assert report["sparsity"] == {"pattern": "2:4", "asked": 0.5, "share": 0.5}
    sparse = model_of(result, name)
    spec = bench.spec(
        fineTune={}, teacher=None, student={"model": {"uri": sparse.uri}},
        training={"maxSteps": 6, "precision": "BF16", "deepSpeed": {"zeroStage": stage}},
    )  # fmt: skip
    tuned = bench.trainer.run("student", spec, name=f"tuned-{stage}", student=sparse)
    assert tuned.codes == [0, 0], tuned.log
    _, report = bench.made(tuned)
    assert report["sparsity"] == {"pattern": "2:4", "asked": 0.5, "share": 0.5}
    metrics = report["metrics"]
    assert metrics["perplexity"] < metrics["initialPerplexity"]
    zero = [
        mask(bench.object(model_of(one, "any").uri, "model.safetensors")) for one in (result, tuned)
    ]
    assert zero[0].keys() == zero[1].keys()
    for key, before in zero[0].items():
        assert torch.equal(before, zero[1][key]), key


def mask(weights: bytes) -> dict[str, torch.Tensor]:
    """Where the matrices of the layers are zero."""
    return {name: tensor == 0 for name, tensor in load(weights).items() if "proj" in name}

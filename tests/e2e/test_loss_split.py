"""Loss and gradients are the same for any split: ranks, accumulation, micro-batches, ZeRO 1, 2 and 3.

The trainer's own loop and engine over gloo, with an online teacher, all divergences mixed, feature
matching and sequences of unequal numbers of labels; in the first step the second rank has none at
all. A process of one rank that takes the whole batch at once is the
reference. Each process writes what it saw; the tests look at that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from devcluster.process import free_port

pytestmark = pytest.mark.e2e
BATCH, LENGTH, VOCABULARY = 8, 24, 61
SPLITS = {1: [(1, 8), (1, 2), (2, 1), (3, 4)], 2: [(1, 4), (1, 1), (2, 2), (2, 1), (3, 4), (3, 1)]}
"""By the number of ranks: (ZeRO stage, micro-batch)."""
REFERENCE = "1 ranks, ZeRO 1, micro-batch 8"
LAUNCH_SECONDS = 400


def name_of(ranks: int, stage: int, micro: int) -> str:
    return f"{ranks} ranks, ZeRO {stage}, micro-batch {micro}"


NAMES = [name_of(ranks, *split) for ranks, splits in SPLITS.items() for split in splits]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """By split: the losses of each step, and the gradient of each parameter of the first."""
    folder = tmp_path_factory.mktemp("split")
    processes = [
        (ranks, rank, _start(folder, ranks, rank, port))
        for ranks in SPLITS
        for port in [free_port()]
        for rank in range(ranks)
    ]
    try:
        for ranks, rank, process in processes:
            process.wait(LAUNCH_SECONDS)
            log = (folder / f"log-{ranks}-{rank}").read_text(errors="replace")
            assert process.returncode == 0, log[-5000:]
    finally:
        for _, _, process in processes:
            process.kill()
    found: dict[str, dict[str, torch.Tensor]] = {}
    for ranks in SPLITS:
        found |= torch.load(folder / f"seen-{ranks}.pt")
    return found


def _start(folder: Path, ranks: int, rank: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TEST_FOLDER": str(folder),
    }
    with (folder / f"log-{ranks}-{rank}").open("wb") as log:
        command = [sys.executable, __file__, str(ranks), str(rank), str(port)]
        return subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("name", [name for name in NAMES if name != REFERENCE])
def test_the_split_changes_nothing(seen: dict[str, dict[str, torch.Tensor]], name: str) -> None:
    found, expected = dict(seen[name]), dict(seen[REFERENCE])
    losses, wanted = found.pop("losses"), expected.pop("losses")
    assert _relative(losses[0], wanted[0]) < 1e-6
    # Later losses speak of weights that an optimizer moved by the sign of tiny gradients.
    assert _relative(losses, wanted) < 1e-4
    assert found.keys() == expected.keys()
    whole = [torch.cat([g.flatten() for g in grads.values()]) for grads in (found, expected)]
    assert _relative(*whole) < 1e-6
    for parameter, gradient in found.items():
        assert _relative(gradient, expected[parameter]) < 5e-6, parameter


def test_the_comparison_can_fail(seen: dict[str, dict[str, torch.Tensor]]) -> None:
    losses = seen[REFERENCE]["losses"]
    assert len(losses) == 3
    assert _relative(losses[1], losses[0]) > 1e-3
    assert any("projections" in name for name in seen[REFERENCE])


def test_a_rank_without_a_label_is_among_them() -> None:
    found = data()
    halves = found.order.batch(0)[: BATCH // 2], found.order.batch(0)[BATCH // 2 :]
    assert [found.packed.take(half).valid_tokens > 0 for half in halves] == [True, False]


# What the ranks run.


def main() -> None:
    from kubedistill_trainer.methods.engine import join_gang

    ranks, rank, port = (int(argument) for argument in sys.argv[1:])
    group = join_gang("127.0.0.1", port, rank, ranks, rank).control
    found = {name_of(ranks, *split): run(ranks, rank, group, *split) for split in SPLITS[ranks]}
    if rank == 0:
        torch.save(found, Path(os.environ["TEST_FOLDER"]) / f"seen-{ranks}.pt")


def run(ranks: int, rank: int, group: Any, stage: int, micro: int) -> dict[str, torch.Tensor]:
    """Three steps of the loop; this process's view of losses and of the first step's gradients."""
    from kubedistill_api.training import Training
    from kubedistill_trainer.exporter import ProgressBoard
    from kubedistill_trainer.methods.engine import wrap
    from kubedistill_trainer.methods.signal import OnlineTeacher
    from kubedistill_trainer.methods.train import Loop
    from loop_kit import Commits, run_of

    training = Training.model_validate(
        {
            "globalBatchSize": BATCH, "learningRate": 1e-3, "precision": "FP32",
            "gradientClipping": 0, "warmupRatio": 0, "deepSpeed": {"zeroStage": stage},
        }
    )  # fmt: skip
    engine = Recorder(wrap(student(), training, ranks, micro))
    context: Any = SimpleNamespace(
        run=run_of(training, 100),
        world_size=ranks,
        rank=rank,
        mean_seconds_between_failures=None,
    )
    calm: Any = SimpleNamespace(asked=False, has_work=lambda: None)
    teacher = OnlineTeacher(llama(40, 3, seed=7), (1, 3))
    commits: Any = Commits()
    loop = Loop(context, data(), engine, teacher, commits, ProgressBoard(), calm, group)
    loop.run()
    losses = torch.tensor([point.total for point in loop.history.points], dtype=torch.float64)
    return {"losses": losses, **engine.gradients}


class Recorder:
    """An engine that keeps the gradients of its first step."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.gradients: dict[str, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def step(self) -> None:
        from deepspeed.utils import safe_get_full_grad

        if self._engine.is_gradient_accumulation_boundary() and not self.gradients:
            self.gradients = {
                name: safe_get_full_grad(parameter).clone()
                for name, parameter in self._engine.module.named_parameters()
            }
        self._engine.step()


def llama(width: int, layers: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width,
            num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def student() -> Any:
    from kubedistill_api.objective import Objective
    from kubedistill_trainer.losses import FeatureMatcher
    from kubedistill_trainer.losses.features import FeaturePair
    from kubedistill_trainer.methods.student import StudentWithLoss

    pairs = [FeaturePair(1, 1, "MSE", 0.5), FeaturePair(2, 3, "Cosine", 0.5)]
    objective = Objective.model_validate(
        {
            "temperature": 3, "softWeight": 0.6, "loss": "Mix", "beta": 0.3,
            "mix": {"forwardKL": 0.5, "reverseKL": 0.3, "jsd": 0.7},
        }
    )  # fmt: skip
    return StudentWithLoss(
        llama(32, 2, seed=3), objective, VOCABULARY, FeatureMatcher(pairs, 32, 40)
    )


def data() -> Any:
    """Sequences of documents of unequal lengths: each has another number of labels.

    Of the first batch the second half, which is the second rank's, has none.
    """
    from kubedistill_trainer.data.order import Order, Part
    from kubedistill_trainer.data.packing import IGNORED, pack

    draw = np.random.default_rng(5)
    lengths = draw.integers(2, 30, size=60)
    packed = pack([draw.integers(0, VOCABULARY, size=n) for n in lengths], LENGTH)
    order = Order([Part(np.arange(len(packed)))], BATCH, seed=1)
    packed.labels[order.batch(0)[BATCH // 2 :]] = IGNORED
    return SimpleNamespace(total_steps=3, order=order, packed=packed)


if __name__ == "__main__":
    main()

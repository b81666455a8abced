"""Resume is bit-exact: two ranks under DeepSpeed, ZeRO 1, 2 and 3, on a real S3 server.

One launch of two processes runs all cases, because importing DeepSpeed takes longer than they do.
Each process writes what it saw; the tests look at that.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devcluster.process import free_port
from s3_fixture import S3Server, s3  # noqa: F401  (s3 is a fixture)

pytestmark = pytest.mark.e2e
WORLD = 2
DIMENSION = 16
CASES = [f"zero{stage}-{dtype}" for stage in (1, 2, 3) for dtype in ("bf16", "fp32")]
LAUNCH_SECONDS = 800


# What the tests check.


@pytest.fixture(scope="module")
def seen(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:  # noqa: F811
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("zero")
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(WORLD),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TEST_URI": s3.uri(),
        "TEST_ENDPOINT": s3.endpoint,
        "TEST_FOLDER": str(folder),
    } | s3.environment()
    processes = []
    for rank in range(WORLD):
        with (folder / f"log-{rank}").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__],
                    env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                )
            )
    _wait(processes, folder)
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(WORLD)]


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Until all have ended; when one fails or takes too long the others are ended."""
    deadline = time.monotonic() + LAUNCH_SECONDS
    try:
        while any(process.poll() is None for process in processes):
            failed = any(process.poll() for process in processes)
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        log = (folder / f"log-{rank}").read_text(errors="replace")
        assert process.returncode == 0, f"rank {rank}: {log[-5000:]}"


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_exact(seen: list[dict[str, Any]], case: str, rank: int) -> None:
    mine = seen[rank][case]
    assert mine["restored"] == {"step": 3, "cursor": {"step": 3}, "rejected": 0}
    assert mine["at_restore"] == mine["at_save"]
    assert mine["resumed"] == mine["uninterrupted"]


@pytest.mark.parametrize("case", CASES)
def test_the_comparison_can_fail(seen: list[dict[str, Any]], case: str) -> None:
    """Training goes on after the save, depends on the generators, and ranks hold other parts."""
    first, second = (mine[case] for mine in seen)
    assert first["uninterrupted"] != first["at_save"]
    assert first["other_draws"]["weights"] != first["uninterrupted"]["weights"]
    assert first["uninterrupted"]["optimizer"] != second["uninterrupted"]["optimizer"]
    assert first["uninterrupted"]["weights"] == second["uninterrupted"]["weights"]
    assert first["uninterrupted"]["draws"] != second["uninterrupted"]["draws"]


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_bad_shard_of_one_rank_sends_all_to_the_older_commit(
    seen: list[dict[str, Any]], rank: int
) -> None:
    mine = seen[rank]["bad shard"]
    assert mine["restored"] == {"step": 3, "cursor": {"step": 3}, "rejected": 1}
    assert mine["at_restore"] == seen[rank]["zero1-bf16"]["at_save"]


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_failure_of_one_rank_is_everyones(seen: list[dict[str, Any]], rank: int) -> None:
    name, text = seen[rank]["lost upload"]
    assert name == "StoreUnavailable"
    assert "(rank 1)" in text
    assert "optim_states.pt" in text or "rng-00001.json" in text, "it names the upload"
    assert seen[rank]["full disk"] == ["CheckpointFailed", "rank 1: OSError: [Errno 28] full"]
    assert seen[rank]["no scratch"][0] == "CheckpointFailed"
    assert seen[rank]["no scratch"][1].startswith("rank 1: ")
    assert seen[rank]["zombie"][0] == "Fenced"
    assert seen[rank]["second open"][0] == "Fenced"


# What the processes do.


def build(case: str, seed: int) -> Any:
    """A DeepSpeed engine around a small network with dropout, and a schedule."""
    import deepspeed

    torch.manual_seed(seed)
    stage, dtype = int(case[4]), case[6:]
    model = torch.nn.Sequential(
        torch.nn.Linear(DIMENSION, 3 * DIMENSION),
        torch.nn.GELU(),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(3 * DIMENSION, DIMENSION),
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "bf16": {"enabled": dtype == "bf16"},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
            "gradient_clipping": 1.0,
        },
    )
    return engine


def seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def train(engine: Any, steps: int) -> None:
    """Every generator takes part: data, noise and dropout."""
    dtype = next(engine.module.parameters()).dtype
    for _ in range(steps):
        data = np.random.standard_normal((4, DIMENSION)) + random.random()
        inputs = torch.from_numpy(data).to(dtype)
        loss = ((engine(inputs) - inputs.flip(1)) ** 2).float().mean()
        engine.backward(loss)
        engine.step()


def digest_of(value: Any) -> str:
    """SHA-256 over every tensor and number in a nested value, bit by bit."""
    whole = hashlib.sha256()

    def add(item: Any, path: str) -> None:
        whole.update(path.encode())
        if isinstance(item, torch.Tensor):
            flat = item.detach().cpu().contiguous().flatten()
            whole.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(item, np.ndarray):
            whole.update(item.tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                add(item[key], f"{path}/{key}")
        elif isinstance(item, list | tuple):
            for number, part in enumerate(item):
                add(part, f"{path}/{number}")
        elif isinstance(item, int | float | str | None):
            whole.update(repr(item).encode())

    add(value, "")
    return whole.hexdigest()


def state_of(engine: Any) -> dict[str, str]:
    import deepspeed

    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        weights = digest_of([parameter.data.clone() for parameter in parameters])
    generators = (random.getstate(), tuple(np.random.get_state())[1:], torch.get_rng_state())
    return {
        "weights": weights,
        "optimizer": digest_of(engine.optimizer.state_dict()),
        "schedule": digest_of(engine.lr_scheduler.state_dict()),
        "counters": digest_of([engine.global_steps, engine.global_samples, engine.skipped_steps]),
        "draws": digest_of([np.asarray(part).tolist() for part in generators[1]])
        + digest_of(generators[0])
        + digest_of(generators[2]),
    }


def outcome(action: Callable[[], object]) -> list[str]:
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


class Rank:
    """One process: its store, its group, and how it makes a Checkpointer."""

    def __init__(self, group: Any, uploads: Any) -> None:
        from kubedistill_trainer.store import Limits, Store

        self.number = int(os.environ["RANK"])
        self.group = group
        self.uploads = uploads
        self.root = Store(
            os.environ["TEST_URI"],
            endpoint=os.environ["TEST_ENDPOINT"],
            limits=Limits(attempts=3),
        )

    def open(self, case: str, fence: int) -> Any:
        from kubedistill_trainer.checkpoint import Checkpointer

        checkpointer = Checkpointer(
            store=self.root.child(case),
            scratch=Path(os.environ["TEST_FOLDER"]) / f"scratch-{self.number}",
            fence=fence,
            attempt=f"a{fence}",
            rank=self.number,
            world_size=WORLD,
            config_digest="c",
            keep_last=3,
            control_group=self.group,
            upload_group=self.uploads,
        )
        checkpointer.open()
        return checkpointer

    def restore(self, case: str, fence: int, engine: Any) -> tuple[Any, dict[str, Any]]:
        checkpointer = self.open(case, fence)
        restored = checkpointer.restore(engine)
        assert restored is not None
        told = {
            "step": restored.step,
            "cursor": restored.cursor,
            "rejected": len(restored.rejected),
        }
        return checkpointer, told


def run_case(rank: Rank, case: str) -> dict[str, Any]:
    """3 steps, save, 3 more; then a fresh engine, restore, 3 more."""
    engine = build(case, seed=1)
    seed_generators(100 + rank.number)
    train(engine, 3)
    rank.open(case, 1).save(engine, step=3, cursor={"step": 3})
    seen: dict[str, Any] = {"at_save": state_of(engine)}
    train(engine, 3)
    seen["uninterrupted"] = state_of(engine)
    engine.destroy()
    engine = build(case, seed=2)
    seed_generators(200 + rank.number)
    _, seen["restored"] = rank.restore(case, 2, engine)
    seen["at_restore"] = state_of(engine)
    train(engine, 3)
    seen["resumed"] = state_of(engine)
    engine.destroy()
    engine = build(case, seed=2)
    rank.restore(case, 3, engine)
    seed_generators(300 + rank.number)
    train(engine, 3)
    seen["other_draws"] = state_of(engine)
    engine.destroy()
    return seen


def run_bad_shard(rank: Rank) -> dict[str, Any]:
    """A second commit on top of the first case's, whose shard of rank 1 is then altered."""
    import torch.distributed as dist

    case = "zero1-bf16"
    engine = build(case, seed=1)
    checkpointer, _ = rank.restore(case, 4, engine)
    train(engine, 1)
    checkpointer.save(engine, step=4, cursor={"step": 4})
    engine.destroy()
    store = rank.root.child(case)
    if rank.number == 0:
        [key] = [i.key for i in store.list("data/e4/") if "_1_mp_rank_00_optim" in i.key]
        content = bytearray(store.get(key))
        content[len(content) // 2] ^= 1
        store.put(key, bytes(content))
    dist.barrier(group=rank.group)
    engine = build(case, seed=5)
    _, told = rank.restore(case, 5, engine)
    seen = {"restored": told, "at_restore": state_of(engine)}
    engine.destroy()
    return seen


def run_failures(rank: Rank) -> dict[str, list[str]]:
    """What every rank raises when one of them fails."""
    from s3_fixture import Faults

    engine = build("zero2-bf16", seed=1)
    seed_generators(rank.number)
    train(engine, 1)
    seen = {"second open": outcome(lambda: rank.open("zero2-bf16", 1))}
    checkpointer = rank.open("failures", 1)
    faults = Faults(rank.root)
    if rank.number == 1:
        faults.lose_answers("PUT", 1000)
    seen["lost upload"] = outcome(lambda: checkpointer.save(engine, step=1, cursor={}))
    faults.lose_answers("PUT", 0)

    def full_after(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        if rank.number == 1:
            raise OSError(28, "full")

    save, engine.save_checkpoint = engine.save_checkpoint, full_after
    seen["full disk"] = outcome(lambda: checkpointer.save(engine, step=1, cursor={}))
    engine.save_checkpoint = save
    scratch = Path(os.environ["TEST_FOLDER"]) / f"scratch-{rank.number}"
    if rank.number == 1:
        shutil.rmtree(scratch)
        scratch.touch()  # no folder can be made in it
    seen["no scratch"] = outcome(lambda: checkpointer.save(engine, step=1, cursor={}))
    if rank.number == 1:
        scratch.unlink()
    rank.open("failures", 2)
    seen["zombie"] = outcome(lambda: checkpointer.save(engine, step=1, cursor={}))
    return seen


def main() -> None:
    import deepspeed
    import torch.distributed as dist

    # Gloo does the same without a compiler. (`deepspeed.comm.torch` as an attribute is torch.)
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    rank = Rank(dist.new_group(backend="gloo"), dist.new_group(backend="gloo"))
    seen: dict[str, Any] = {case: run_case(rank, case) for case in CASES}
    seen["bad shard"] = run_bad_shard(rank)
    seen |= run_failures(rank)
    path = Path(os.environ["TEST_FOLDER"]) / f"seen-{rank.number}.json"
    path.write_text(json.dumps(seen))
    dist.barrier(group=rank.group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

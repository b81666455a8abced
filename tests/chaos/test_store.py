"""A small part of the store families, with seeds of its own; all of them run in `make chaos`."""

from __future__ import annotations

import hashlib

import pytest
from e2e.gang import Trainer, model_of
from kubedistill_api.exit_codes import ExitCode

from chaos.faults import At, Fault, Kind
from chaos.figures import Run, run_case
from chaos.store_bench import StoreBench
from chaos.store_families import store_families, wake_late
from chaos.store_harm import harm_families
from chaos.store_run import IN_PARTS, ZERO1

pytestmark = pytest.mark.e2e
SEED = 11


def cases(bench: StoreBench, name: str, *indices: int) -> list[str]:
    """What some cases of a family find wrong."""
    families = {
        family.name: family for family in store_families(bench, name) + harm_families(bench)
    }
    runs = [run_case(families[name], index, SEED) for index in indices]
    assert any(run.faults for run in runs), "no fault was met"
    return [text for run in runs for text in run.bad]


def test_a_forked_run_is_an_ordinary_run(store_bench: StoreBench) -> None:
    """Bit for bit: so that what is found about forks is found about containers."""
    assert store_bench.zygote.ready["threads"] == 1
    trainer = Trainer(store_bench.folder / "ordinary", store_bench.s3)
    result = trainer.run("student", ZERO1.spec(store_bench.s3), name="ordinary")
    assert result.codes == [0, 0], result.log
    prefix = model_of(result, "ordinary").uri.removeprefix(f"s3://{store_bench.s3.bucket}/")
    found = dict(store_bench.gang.objects(f"{prefix}/model.safetensors"))
    [weights] = [hashlib.sha256(body).hexdigest() for body in found.values()]
    assert weights == store_bench.calm(ZERO1).weights


def test_killed_at_any_call_the_next_attempt_goes_on(store_bench: StoreBench) -> None:
    # An upload, the record of a commit, a clean-up; before and after.
    assert cases(store_bench, "store-kill", 25, 41, 78) == []


def test_single_faults_are_absorbed(store_bench: StoreBench) -> None:
    assert cases(store_bench, "store-fault", 3, 63, 123) == []


@pytest.mark.parametrize(
    ("name", "indices"),
    [
        # What a RETIRE left is deleted; the REJECT is written.
        ("store-kill-resume", [22, 51]),
        # A record is garbled on its way.
        ("store-garble-resume", [1]),
        ("store-kill-parts", [5]),
        ("store-lost-parts", [1]),
    ],
)
def test_a_later_attempt_and_uploads_in_parts_go_on(
    store_bench: StoreBench, name: str, indices: list[int]
) -> None:
    assert cases(store_bench, name, *indices) == []


@pytest.mark.parametrize(
    ("name", "indices"),
    [
        ("store-weather", [1]),
        ("store-outage", [1]),
        ("store-term", [1, 2]),
        ("store-zombie", [1, 2]),
    ],
)
def test_seeded_trouble_changes_nothing(
    store_bench: StoreBench, name: str, indices: list[int]
) -> None:
    assert cases(store_bench, name, *indices) == []


def test_harmed_bytes_are_seen_and_an_older_commit_is_used(store_bench: StoreBench) -> None:
    assert cases(store_bench, "store-damage", 0, 2, 4) == []


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("store-stall", 1),
        ("store-conflict", 4),
        ("store-late", 0),
        ("store-refused", 3),
        ("store-clock", 0),
    ],
)
def test_a_service_in_trouble_changes_nothing(
    store_bench: StoreBench, name: str, index: int
) -> None:
    assert cases(store_bench, name, index) == []


def test_a_rank_without_memory_harms_no_commit(store_bench: StoreBench) -> None:
    assert cases(store_bench, "store-memory", 0) == []


def test_a_full_disk_is_told_and_harms_no_commit(store_bench: StoreBench) -> None:
    assert cases(store_bench, "store-overflow", 1) == []


def test_half_an_export_is_not_taken_for_a_model(store_bench: StoreBench) -> None:
    """Its config.json came before its weights."""
    [config] = [
        call for call in store_bench.calm(ZERO1).of(0) if call.path.endswith("/config.json")
    ]
    assert cases(store_bench, "store-kill", 2 * config.number + 1) == []


def test_a_peer_that_dies_while_it_loads_is_noticed(store_bench: StoreBench) -> None:
    """DeepSpeed waited for it in the making of a group, which takes half an hour to give up."""
    [_, config, *_] = [call for call in store_bench.calm(ZERO1).of(1) if "/tokenizer/" in call.path]
    script = At("rank-1", config.number, Fault(Kind.SIGNAL_BEFORE))
    with store_bench.attempt("peer-dies", 1, ZERO1, script) as attempt:
        ended = attempt.wait()
    assert (ended.codes, ended.left_alone) == ([int(ExitCode.PEER_LOST), -9], []), ended.tail


def test_a_zombie_whose_uploads_were_collected_is_fenced(store_bench: StoreBench) -> None:
    """It found its shards missing, and ended as an unknown error."""
    heads = [
        call.number
        for call in store_bench.calm(ZERO1).of(0)
        if call.method == "HEAD" and "/data/e1/" in call.path
    ]
    run = Run("zombie-collected", 0, "0")
    wake_late(store_bench, run, heads[0], Kind.SIGNAL_BEFORE)
    assert run.bad == []


def test_a_zombie_does_not_go_on_from_a_newer_attempts_commit(store_bench: StoreBench) -> None:
    """It read the log, took the newer attempt's last commit, exported it and ended with success."""
    uploads = [call.number for call in store_bench.calm(ZERO1).of(0) if "uploads" in call.target]
    run = Run("zombie-resumes", 0, "0")
    wake_late(store_bench, run, uploads[-1], Kind.SIGNAL_AFTER)
    assert run.bad == []


def test_a_zombie_whose_upload_was_aborted_is_fenced(store_bench: StoreBench) -> None:
    """It was told that there is no such upload, and ended as one whose store is away."""
    own = store_bench.calm(IN_PARTS).of(0)
    ends = [call for call in own if call.method == "POST" and "/s8/" in call.path]
    run = Run("zombie-aborted", 0, "0")
    wake_late(store_bench, run, ends[-1].number, Kind.SIGNAL_BEFORE, IN_PARTS)
    assert run.bad == []

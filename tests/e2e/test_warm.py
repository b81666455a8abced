"""A container that is a fork of a warm interpreter is a container like any other."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from devcluster.node import warm as module
from devcluster.node.container import Recipe, Run
from devcluster.node.image import PROJECT, image_of
from devcluster.node.volumes import Mount
from devcluster.node.warm import Warm
from devcluster.process import wait_until

PROBE = "e2e.container_probe"


def told(recipe: Recipe, folder: Path, warm: Warm | None) -> dict[str, Any]:
    """What the probe in a container tells."""
    run = Run(recipe, folder / "container", folder / "log", folder / "hosts", "probe", warm)
    deadline = time.monotonic() + 120
    while (ended := run.ended()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.remove()
    text = (folder / "log").read_text()
    assert ended.exit_code == 7, text
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_fork_tells_the_same_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = image_of("local/kubedistill-trainer:dev")
    volumes = [tmp_path / name for name in ("own", "tmp")]
    for volume in volumes:
        volume.mkdir()
        volume.chmod(0o777)
    recipe = Recipe(
        name="trainer",
        command=[sys.executable, "-m", PROBE, "an argument"],
        env={
            **image.env, "HOME": "/tmp", "PATH": os.environ["PATH"], "OWN": "1",
            # Without a locale a fresh interpreter adds one to its environment (PEP 538).
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(PROJECT / "tests"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        },
        mounts=[Mount(str(volumes[0]), "/var/own"), Mount(str(volumes[1]), "/tmp")],
        workdir="/var/own",
        user=image.user,
        group=image.group,
        groups=[4321],
        read_only_root=True,
        termination_path="/dev/termination-log",
        log_as_message=False,
        hostname="a-pod",
    )  # fmt: skip
    (tmp_path / "hosts").touch()
    fresh = told(recipe, tmp_path, None)
    monkeypatch.setitem(module._MODULES, "probe", PROBE)
    warm = Warm(tmp_path / "warm.log")
    assert warm.zygote(recipe.env) is None, "not ready yet: the first containers start their own"
    wait_until(lambda: warm.zygote(recipe.env) is not None, "the warm interpreter")
    forked = told(replace(recipe, command=["probe", "an argument"]), tmp_path, warm)
    assert forked == fresh
    assert forked["ids"][0] == 1
    assert warm.zygote({**recipe.env, "HF_HUB_OFFLINE": "0"}) is None
    assert warm.zygote({**recipe.env, "OWN": "2"}) is not None

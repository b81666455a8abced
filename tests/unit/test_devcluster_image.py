"""Images as the node maps them, and what it reads from a Dockerfile."""

from __future__ import annotations

from pathlib import Path

import pytest
from devcluster.node.image import Image, ImageMissing, image_of, parse_target

DOCKERFILE = """\
# syntax=docker/dockerfile:1
ARG BASE=python:3.11
FROM --platform=linux/amd64 ${BASE} AS base
ENV A=1 B="two words"
RUN groupadd --gid 65532 runner \\
    && useradd --uid 65532 --gid 65532 --home-dir /home/runner \\
       runner
WORKDIR /workspace
USER 65532:65532

FROM base AS operator
ENTRYPOINT ["kubedistill-operator"]

FROM base as trainer
ENV A=3
USER 1000
WORKDIR /data
ENTRYPOINT ["kubedistill-trainer"]
CMD ["--help"]

FROM other AS plain
"""


def test_stages_inherit_from_their_base() -> None:
    assert parse_target(DOCKERFILE, "operator") == Image(
        entrypoint=("kubedistill-operator",),
        user=65532,
        group=65532,
        workdir="/workspace",
        env={"A": "1", "B": "two words"},
        home="/home/runner",
        passwd="runner:x:65532:65532::/home/runner:/usr/sbin/nologin",
    )


def test_later_instructions_win() -> None:
    image = parse_target(DOCKERFILE, "trainer")
    assert (image.user, image.group, image.workdir, image.home) == (1000, 1000, "/data", "/")
    assert (image.env["A"], image.command) == ("3", ("--help",))


def test_without_a_user_an_image_runs_as_root() -> None:
    image = parse_target(DOCKERFILE, "plain")
    assert (image.user, image.group, image.entrypoint) == (0, 0, ())


def test_missing_target() -> None:
    with pytest.raises(ImageMissing, match="no target other"):
        parse_target(DOCKERFILE, "other")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("operator", "operator"),
        ("kubedistill-operator:0.1.0", "operator"),
        ("registry.example:5000/team/kubedistill/trainer:1.2", "trainer"),
        ("registry.example/kubedistill-trainer@sha256:0123", "trainer"),
        ("registry.example/trainer:1@sha256:0123", "trainer"),
    ],
)
def test_names_of_the_projects_images(tmp_path: Path, name: str, target: str) -> None:
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    image = image_of(name, tmp_path / "Dockerfile")
    assert image.entrypoint == (f"kubedistill-{target}",)


@pytest.mark.parametrize("name", ["local/shell", "busybox:1.36", "docker.io/library/python:3.11"])
def test_shell_images(name: str) -> None:
    assert image_of(name) == Image()


@pytest.mark.parametrize("name", ["nginx", "operators:1", "trainer/other", "kubedistill"])
def test_unknown_images(name: str) -> None:
    with pytest.raises(ImageMissing, match="pull"):
        image_of(name)

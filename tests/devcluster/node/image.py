"""Image names → the project's own virtual environment, as the Dockerfile says it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
SHELL_IMAGE = "shell"
"""`local/shell`: no entry point; the interpreter and the system's programs are on its PATH."""


@dataclass(frozen=True)
class Image:
    """What an image says of a container."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    user: int = 65532
    group: int = 65532
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)


class ImageMissing(LookupError):
    """The node has no such image; the text is what a kubelet says."""


def image_of(name: str, dockerfile: Path = PROJECT / "Dockerfile") -> Image:
    """The image behind `registry/path/NAME:tag`. Raises ImageMissing."""
    last = name.split("@")[0].rsplit("/", 1)[-1].split(":")[0]
    if last == SHELL_IMAGE:
        return Image()
    target = last.removeprefix("kubedistill-")
    if target not in ("operator", "trainer"):
        raise ImageMissing(
            f'Failed to pull image "{name}": this node has only operator, trainer and shell'
        )
    return parse_target(dockerfile.read_text(), target)


def parse_target(text: str, target: str) -> Image:
    """The final stage `target` of a Dockerfile; instructions of its base stages are inherited."""
    stages: dict[str, list[tuple[str, str]]] = {}
    bases: dict[str, str] = {}
    current = ""
    for keyword, rest in _instructions(text):
        if keyword == "FROM":
            found = re.match(r"(?:--\S+\s+)*(\S+)(?:\s+AS\s+(\S+))?$", rest, re.I)
            if found is None:
                raise ValueError(f"cannot read FROM {rest}")
            current = found.group(2) or f"stage-{len(stages)}"
            stages[current], bases[current] = [], found.group(1)
        elif current:
            stages[current].append((keyword, rest))
    if target not in stages:
        raise ImageMissing(f"the Dockerfile has no target {target}")
    chain: list[tuple[str, str]] = []
    stage: str | None = target
    while stage in stages:
        chain = stages[stage] + chain
        stage = bases.get(stage)
    return _image(chain)


def _instructions(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\s*\n", " ", "\n".join(lines))
    found = []
    for line in joined.splitlines():
        keyword, _, rest = line.strip().partition(" ")
        if keyword:
            found.append((keyword.upper(), rest.strip()))
    return found


def _image(instructions: list[tuple[str, str]]) -> Image:
    image = Image()
    entrypoint, command, user, group, workdir = image.entrypoint, image.command, 0, 0, "/"
    env: dict[str, str] = {}
    for keyword, rest in instructions:
        if keyword == "ENTRYPOINT":
            entrypoint = tuple(json.loads(rest))
        elif keyword == "CMD":
            command = tuple(json.loads(rest))
        elif keyword == "USER":
            numbers = rest.split(":")
            user, group = int(numbers[0]), int(numbers[-1])
        elif keyword == "WORKDIR":
            workdir = rest
        elif keyword == "ENV":
            env |= dict(part.split("=", 1) for part in shlex.split(rest) if "=" in part)
    return Image(entrypoint, command, user, group, workdir, env)

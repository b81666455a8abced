"""Image names → the project's own virtual environment, as the Dockerfile says it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
SHELL_IMAGES = ("shell", "busybox", "python")
"""No entry point; the interpreter and the system's programs are on their PATH. Their user is not
root, unlike in the real ones: nothing here should run as root by accident."""


@dataclass(frozen=True)
class Image:
    """What an image says of a container."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    user: int = 65532
    group: int = 65532
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    home: str = "/"
    passwd: str = ""
    """The line of its user in /etc/passwd, when a `useradd` made one."""


class ImageMissing(LookupError):
    """The node has no such image; the text is what a kubelet says."""


def image_of(name: str, dockerfile: Path = PROJECT / "Dockerfile") -> Image:
    """The image behind `registry/path/NAME:tag`. Raises ImageMissing."""
    last = name.split("@")[0].rsplit("/", 1)[-1].split(":")[0]
    if last in SHELL_IMAGES:
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
    image = Image(user=0, group=0)
    for keyword, rest in instructions:
        if keyword == "ENTRYPOINT":
            image = replace(image, entrypoint=tuple(json.loads(rest)))
        elif keyword == "CMD":
            image = replace(image, command=tuple(json.loads(rest)))
        elif keyword == "USER":
            numbers = rest.split(":")
            image = replace(image, user=int(numbers[0]), group=int(numbers[-1]))
        elif keyword == "WORKDIR":
            image = replace(image, workdir=rest)
        elif keyword == "ENV":
            given = dict(part.split("=", 1) for part in shlex.split(rest) if "=" in part)
            image = replace(image, env={**image.env, **given})
    return _with_home(image, instructions)


def _with_home(image: Image, instructions: list[tuple[str, str]]) -> Image:
    """Home and name of the image's user, from the `useradd` that makes it."""
    for keyword, rest in instructions:
        made = re.search(rf"useradd (?=.*--uid {image.user}\b)([^&|;]*)", rest)
        if keyword == "RUN" and made:
            words = shlex.split(made.group(1))
            home = words[words.index("--home-dir") + 1] if "--home-dir" in words else "/"
            line = f"{words[-1]}:x:{image.user}:{image.group}::{home}:/usr/sbin/nologin"
            return replace(image, home=home, passwd=line)
    return image

